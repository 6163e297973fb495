"""The points of a cell's search space."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.spec import Cell, Dimension, SweepSpec, cells_of
from orchestrator.spec.space import default_params, grid_points, point_count, study_name
from orchestrator.spec.sweep import Search

COUNTS = Dimension(key="images_per_class", values=(0, 20, 40))
WEIGHTS = Dimension(key="fusion_weight", values=(0.5, 0.25))
KINDS = Dimension(key="auxiliary.kind", values=("prototype", "lda"))


def cell(*space: Dimension, sampler: Any = "grid", points: int = 100, **fixed: Any) -> Cell:
    return cells_of(sweep(*space, sampler=sampler, points=points, **fixed))[0]


def sweep(*space: Dimension, sampler: Any = "grid", points: int = 100, **fixed: Any) -> SweepSpec:
    settings = {"method": "air", **{k.replace("__", "."): v for k, v in fixed.items()}}
    search = Search(sampler=sampler, points=points, space=space)
    return SweepSpec(name="x", fixed=settings, search=search)


def search(sampler: Any, points: int) -> Search:
    return Search(sampler=sampler, points=points, space=())


# ---------------------------------------------------------------- the grid


def test_a_grid_starts_with_the_default_point():
    points = grid_points(cell(COUNTS, WEIGHTS, images_per_class=20))
    assert points[0] == {"images_per_class": 20, "fusion_weight": 0.5}
    assert points[1:] == [
        {"images_per_class": 0, "fusion_weight": 0.5},  # without images the weight has no effect
        {"images_per_class": 20, "fusion_weight": 0.25},
        {"images_per_class": 40, "fusion_weight": 0.5},
        {"images_per_class": 40, "fusion_weight": 0.25},
    ]


# ---------------------------------------------------------------- the default


@pytest.mark.parametrize(
    ("dimension", "fixed", "first"),
    [
        (COUNTS, {}, 40),  # 120 is the default, 40 the nearest
        (COUNTS, {"images_per_class": 22}, 20),
        (KINDS, {}, "prototype"),
        (Dimension(key="fusion_weight", min=0.85, max=0.9), {}, 0.85),
        (Dimension(key="images_per_class", min=8, max=64), {}, 64),
        (
            Dimension(key="auxiliary.refresh", values=(True, False)),
            {"auxiliary.source": "both"},
            False,
        ),
    ],
)
def test_the_default_point_is_the_setting_of_the_cell_or_the_nearest_in_the_space(
    dimension, fixed, first
):
    point = default_params(cell(dimension, sampler="tpe", **fixed))
    assert point == {dimension.key: first}
    assert type(point[dimension.key]) is type(first)


# ---------------------------------------------------------------- number of points


@pytest.mark.parametrize(
    ("sampler", "points", "count"),
    [("grid", 100, 5), ("grid", 3, 3), ("tpe", 3, 3), ("random", 100, 5)],
)
def test_the_number_of_points_is_limited_by_the_search_and_by_the_grid(sampler, points, count):
    assert point_count(cell(COUNTS, WEIGHTS), search(sampler, points)) == count


# ---------------------------------------------------------------- studies


def test_the_name_of_a_study_depends_on_space_and_settings_but_not_on_the_number_of_points():
    def name(spec: SweepSpec) -> str:
        return study_name(cells_of(spec)[0], spec.search)

    plain = name(sweep(COUNTS))
    assert name(sweep(COUNTS, points=7)) == plain
    others = [
        sweep(KINDS),
        sweep(Dimension(key="images_per_class", values=(0, 20, 50))),
        sweep(COUNTS, sampler="tpe"),
        sweep(COUNTS, iterations=3),
    ]
    assert len({plain, *map(name, others)}) == 5

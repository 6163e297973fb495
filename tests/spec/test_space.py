"""Which points a cell's space holds, without a sampler."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.spec import Cell, Dimension, SweepSpec, cells_of
from orchestrator.spec.space import (
    applies,
    default_params,
    grid_points,
    point_count,
    study_name,
)
from orchestrator.spec.sweep import Search

COUNTS = Dimension(key="images_per_class", values=(0, 20, 40))
WEIGHTS = Dimension(key="fusion_weight", values=(0.5, 0.25), when="images_per_class > 0")
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


def test_the_default_comes_first_and_the_rest_keeps_its_order():
    found = grid_points(cell(COUNTS, WEIGHTS, images_per_class=20))
    assert found[0] == {"images_per_class": 20, "fusion_weight": 0.5}
    assert found[1:] == [
        {"images_per_class": 0},
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
        (KINDS, {}, "lda"),
        (Dimension(key="fusion_weight", min=0.0, max=1.0), {}, 0.5),
        (Dimension(key="fusion_weight", min=0.6, max=0.9), {}, 0.6),
        (Dimension(key="images_per_class", min=8, max=64), {}, 64),
        (Dimension(key="train.steps", values=(None, 7)), {"train.steps": None}, None),
        (Dimension(key="auxiliary.refresh", values=(True, False)), {}, False),
    ],
)
def test_the_first_point_is_the_cells_own_setting_or_the_nearest_inside(dimension, fixed, first):
    point = default_params(cell(dimension, sampler="tpe", **fixed))
    assert point == {dimension.key: first}
    assert type(point[dimension.key]) is type(first)


def test_where_a_word_is_not_among_the_values_there_is_no_default():
    only = Dimension(key="fidelity.kind", values=("class_mean",))
    assert default_params(cell(only, COUNTS, sampler="tpe")) == {}


def test_the_default_obeys_conditions():
    chosen = default_params(cell(COUNTS, WEIGHTS, sampler="tpe", images_per_class=0))
    assert chosen == {"images_per_class": 0}


# ---------------------------------------------------------------- how many


@pytest.mark.parametrize(
    ("sampler", "points", "count"),
    [("grid", 100, 5), ("grid", 3, 3), ("tpe", 3, 3), ("random", 100, 100)],
)
def test_points_are_a_total_and_a_grid_has_no_more_than_it_holds(sampler, points, count):
    assert point_count(cell(COUNTS, WEIGHTS), search(sampler, points)) == count


def test_a_cell_with_nothing_to_search_has_one_point():
    plain = cells_of(SweepSpec(name="x", fixed={"method": "air"}))[0]
    assert point_count(plain, None) == 1
    assert point_count(plain, search("tpe", 12)) == 1


VALUES = {
    "images_per_class": [0, 10, 20],
    "fusion_weight": [0.0, 0.5, 1.0],
    "auxiliary.refresh": [False, True],
    "auxiliary.source": ["synthetic", "real", "both"],
}
CONDITIONS = [None, "images_per_class > 0", "fusion_weight > 0.25", "auxiliary.refresh"]


@st.composite
def spaces(draw: Any) -> tuple[Dimension, ...]:
    """Dimensions that may depend on those before them."""
    names = draw(st.permutations(sorted(VALUES)))[: draw(st.integers(1, 4))]
    found: list[Dimension] = []
    for name in names:
        values = tuple(draw(st.lists(st.sampled_from(VALUES[name]), min_size=1, unique=True)))
        when = draw(st.sampled_from(CONDITIONS))
        found.append(Dimension(key=name, values=values, when=when))
    return tuple(found)


@given(spaces())
def test_grids_of_any_space_hold_what_their_conditions_allow_each_once(space):
    one = cell(*space)
    found = grid_points(one)
    assert all(found.count(point) == 1 for point in found)
    assert point_count(one, search("grid", 1000)) == len(found)
    for point in found:
        known = dict(one.flat)
        for dimension in one.space:
            assert (dimension.key in point) == applies(dimension, known)
            if dimension.key in point:
                known[dimension.key] = point[dimension.key]
                assert point[dimension.key] in dimension.values


# ---------------------------------------------------------------- studies


def test_another_space_or_setting_is_another_study_another_budget_is_not():
    def name(spec: SweepSpec) -> str:
        assert spec.search is not None
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

"""An edited search: which points stay, and which trials run.

The tests write records as trials would; the objective is a function of the settings.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.planning import Resolver
from orchestrator.planning.search import study_of
from orchestrator.spec import Dimension, SweepSpec
from orchestrator.spec.sweep import Search, Seeds
from orchestrator.stages import TrialSpec
from tests.planning.test_plan import World

LENGTHS = Dimension(key="prompt.length", values=(1, 2, 3, 4))
STEPS = Dimension(key="train.steps", min=10, max=100)


def measured(spec: TrialSpec) -> dict[str, float]:
    value = -abs(spec.prompt.length - 3) - abs(spec.train.steps - 40) / 50 + spec.seed / 1000
    return {"mutual_information": value, "validation_accuracy": -value}


def opposite(spec: TrialSpec) -> dict[str, float]:
    return {objective: -10 * value for objective, value in measured(spec).items()}


def points(world: World, sweep: SweepSpec) -> list[dict[str, Any]]:
    study = study_of(world.plan(sweep), world.store, None)
    return [dict(trial.params) for trial in study.trials]


@pytest.fixture
def world(tmp_path, resolver) -> World:
    return world_in(tmp_path / "world", resolver)


def world_in(folder: Path, resolver: Resolver) -> World:
    world = World(folder, folder, resolver)
    world.measured = measured
    return world


def sweep(
    *space: Dimension,
    points: int = 8,
    width: int = 2,
    sampler: Any = "tpe",
    seeds: tuple[int, ...] = (1,),
    **search: Any,
) -> SweepSpec:
    space = space or (LENGTHS, STEPS)
    return SweepSpec(
        name="x",
        fixed={"method": "fpl"},
        search=Search(sampler=sampler, points=points, width=width, space=space, **search),
        seeds=Seeds(values=tuple((seed,) for seed in seeds)),
    )


def test_more_points_another_width_and_more_seeds_are_no_edit(world):
    first = sweep()
    assert world.run(first) == 8
    known = points(world, first)
    for edited, added in [
        (sweep(points=12), 4),
        (sweep(points=12, width=5), 0),
        (sweep(points=12, seeds=(1, 2)), 12),
    ]:
        assert world.run(edited) == added
        assert points(world, edited)[:8] == known


def test_objectives_of_added_seeds_count_for_later_points(tmp_path, resolver):
    """The objective of a point is the mean over the seeds that the sweep has now."""
    found, edited = [], sweep(points=14, seeds=(1, 2))
    for then in (measured, opposite):
        world = world_in(tmp_path / then.__name__, resolver)
        world.run(sweep())
        world.measured = then
        world.run(edited)
        found.append(points(world, edited))
    assert found[0][:8] == found[1][:8]
    assert found[0][8:] != found[1][8:]


@pytest.mark.parametrize(
    "edited",
    [
        sweep(LENGTHS, replace(STEPS, max=60)),
        sweep(seed=1),
        sweep(sampler="random"),
        sweep(objective="validation_accuracy"),
    ],
    ids=["space", "seed", "sampler", "objective"],
)
def test_an_edited_search_starts_anew_and_reuses_equal_trials(tmp_path, world, resolver, edited):
    fresh = world_in(tmp_path / "fresh", resolver)
    world.run(sweep())
    computed = world.run(edited)
    assert fresh.run(edited) == 8
    assert points(world, edited) == points(fresh, edited)
    earlier = points(world, sweep())
    assert computed == sum(point not in earlier for point in points(fresh, edited))

"""An edited search: which points stay, and which trials run.

The tests write records as trials would; the objective is a function of the settings.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from orchestrator.planning.search import study_of
from orchestrator.spec import Dimension, SweepSpec
from orchestrator.spec.sweep import Search, Seeds
from orchestrator.stages import TrialSpec
from tests.planning.test_plan import World as Planned

LENGTHS = Dimension(key="prompt.length", values=(1, 2, 3, 4))
STEPS = Dimension(key="train.steps", min=10, max=100)


class World(Planned):
    """Store and event log of one sweep, and the runs of its drivers."""

    def measured(self, spec: TrialSpec) -> dict[str, float]:
        value = -abs(spec.prompt.length - 3) - abs(spec.train.steps - 40) / 50 + spec.seed / 1000
        return {"mutual_information": value, "validation_accuracy": -value}

    def trials(self, sweep: SweepSpec) -> int:
        """Run a sweep and count the trials that it computes."""
        scheduler, computed = self.scheduler(sweep), 0
        while (job := scheduler.next()) is not None:
            computed += len(job.trials)
            self.finish(job.trials)
            scheduler.complete(job.number, {})
        assert self.plan(sweep).to_run == 0
        return computed

    def points(self, sweep: SweepSpec) -> list[dict[str, Any]]:
        study = study_of(self.plan(sweep), self.store, None)
        return [dict(trial.params) for trial in study.trials]


@pytest.fixture
def world(tmp_path, resolver) -> World:
    return World(tmp_path, tmp_path, resolver)


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
    assert world.trials(first) == 8
    points = world.points(first)
    for edited, added in [
        (sweep(points=12), 4),
        (sweep(points=12, width=5), 0),
        (sweep(points=12, seeds=(1, 2)), 12),
    ]:
        assert world.trials(edited) == added
        assert world.points(edited)[:8] == points


def test_objectives_of_added_seeds_count_for_later_points(tmp_path, resolver):
    """The objective of a point is the mean over the seeds that the sweep has now."""
    found = []
    for name in ("as before", "another winner"):
        world = World(tmp_path / name, tmp_path, resolver)
        world.trials(sweep())
        if name == "another winner":
            measured = world.measured
            world.measured = lambda spec, of=measured: {  # type: ignore[method-assign]
                objective: -10 * value for objective, value in of(spec).items()
            }
        world.trials(sweep(points=14, seeds=(1, 2)))
        found.append(world.points(sweep(points=14, seeds=(1, 2))))
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
    fresh = World(tmp_path / "fresh", tmp_path, resolver)
    world.trials(sweep())
    computed = world.trials(edited)
    assert fresh.trials(edited) == 8
    assert world.points(edited) == fresh.points(edited)
    earlier = world.points(sweep())
    assert computed == sum(point not in earlier for point in fresh.points(edited))

"""An edited sweep file: which trials are kept, which points count, and what the sampler uses.

The tests write records as trials would; the objective is a function of the settings.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import FrozenTrial

from air_core.specs import TrialSpec
from orchestrator.execution._scheduler import Failure
from orchestrator.spec import Dimension, SweepSpec
from orchestrator.spec.sweep import Search, Seeds
from tests.planning.test_plan import World as Planned

LENGTHS = Dimension(key="prompt.length", values=(1, 2, 3, 4))
STEPS = Dimension(key="train.steps", min=10, max=100)
SPACE = (LENGTHS, STEPS)
FAILED = Failure("nan", "the loss became nan")


class World(Planned):
    """Store and event log of one sweep, and the runs of its drivers."""

    def __init__(self, folder: Path, resolver: Any, sign: int = 1) -> None:
        super().__init__(folder, folder, resolver)
        self.sign = sign

    def measured(self, spec: TrialSpec) -> dict[str, float]:
        value = -abs(spec.prompt.length - 3) - abs(spec.train.steps - 40) / 50 + spec.seed / 1000
        return {
            "mutual_information": self.sign * value,
            "validation_accuracy": -self.sign * value,
        }

    def run(self, sweep: SweepSpec, jobs: int = 1000, failing: Any = lambda spec: False) -> int:
        """Run a sweep, or only its first jobs as a killed driver would; count the trials."""
        plan = self.plan(sweep)
        self.event_log.append(
            "sweep_started", spec="", total=plan.total, to_run=0, asks=plan.request_digest
        )
        scheduler = self.scheduler(sweep)
        handed = 0
        while jobs and (job := scheduler.next()) is not None:
            jobs -= 1
            handed += len(job.trials)
            failed = {
                k: FAILED for k, spec in zip(job.keys, job.trials, strict=True) if failing(spec)
            }
            self.finish(spec for spec in job.trials if not failing(spec))
            scheduler.complete(job.number, failed)
        return handed

    def trials(self) -> list[FrozenTrial]:
        """The points in the study of the only cell, by number."""
        (search,) = self.searches.values()
        found = [t for t in search.study.get_trials(deepcopy=False) if "point" in t.user_attrs]
        return sorted(found, key=lambda trial: trial.user_attrs["point"])

    def points(self) -> list[tuple[int, dict[str, Any], float | None]]:
        return [(t.user_attrs["point"], dict(t.params), t.value) for t in self.trials()]

    def carried(self) -> list[dict[str, Any]]:
        return [dict(t.params) for t in self.trials() if "carried" in t.user_attrs]


@pytest.fixture
def world(tmp_path, resolver) -> World:
    return World(tmp_path, resolver)


def sweep(
    *space: Dimension,
    points: int = 8,
    sampler: Any = "tpe",
    seeds: tuple[int, ...] = (1,),
    fixed: dict[str, Any] | None = None,
    **search: Any,
) -> SweepSpec:
    return SweepSpec(
        name="x",
        fixed={"method": "fpl", **(fixed or {})},
        search=Search(sampler=sampler, points=points, width=2, space=space or SPACE, **search),
        seeds=Seeds(values=tuple((seed,) for seed in seeds)),
    )


def count(world: World, event: str) -> int:
    return sum(one["event"] == event for one in world.event_log.events())


def steps(low: int, high: int) -> Dimension:
    return replace(STEPS, min=low, max=high)


# ---------------------------------------------------------------- the space


def test_a_narrower_space_carries_and_counts_the_points_inside(world):
    world.run(sweep())
    before = world.points()
    fitting = [params for _, params, _ in before if params["train.steps"] <= 60]
    narrow = sweep(LENGTHS, steps(10, 60))
    assert 0 < len(fitting) < 8
    plan = world.plan(narrow)
    assert (plan.edit.carried, plan.edit.left_out) == (len(fitting), 8 - len(fitting))
    assert (plan.edit.kept, plan.edit.added) == (len(fitting), 8 - len(fitting))
    assert world.run(narrow) <= 8 - len(fitting)
    after = world.points()
    assert [number for number, *_ in after] == list(range(8))
    assert sorted(map(repr, world.carried())) == sorted(map(repr, fitting))
    values = {repr(params): value for _, params, value in before}
    for _, params, value in after:
        assert params["train.steps"] <= 60
        assert repr(params) not in values or value == values[repr(params)]


def test_a_wider_space_counts_all_points_and_runs_only_new_ones(world):
    world.run(sweep())
    wide = sweep(replace(LENGTHS, values=(1, 2, 3, 4, 8)), steps(5, 200), points=12)
    assert "8 fit the new space and count, 0 do not" in str(world.plan(wide).edit)
    assert 0 < world.run(wide) <= 4
    assert len(world.carried()) == 8
    assert world.plan(wide).to_run == 0


def test_the_first_point_is_the_default_even_if_points_are_carried(world):
    world.run(sweep(fixed={"train.batch": 8}))
    world.run(sweep(steps(10, 60), fixed={"train.batch": 8, "prompt.length": 2}))
    number, params, _ = world.points()[0]
    assert (number, params) == (0, {"train.steps": 60})  # the default 100, clipped to the space
    wider = sweep(steps(10, 90), fixed={"train.batch": 8, "prompt.length": 2})
    world.run(wider)
    assert world.points()[0][1] == {"train.steps": 90}


def test_fixing_a_searched_setting_keeps_the_points_with_that_value(world):
    world.run(sweep())
    had = [params["train.steps"] for _, params, _ in world.points() if params["prompt.length"] == 3]
    assert had
    world.run(sweep(STEPS, fixed={"prompt.length": 3}))
    assert [params["train.steps"] for params in world.carried()] == had


def test_searching_a_fixed_setting_keeps_all_points(world):
    world.run(sweep(STEPS, fixed={"prompt.length": 3}))
    world.run(sweep(points=10))
    assert {params["prompt.length"] for params in world.carried()} == {3}
    assert len(world.carried()) == 8


def test_another_fixed_setting_sampler_or_seed_carries_no_points(world):
    world.run(sweep())
    for other in (sweep(fixed={"train.batch": 8}), sweep(sampler="random"), sweep(seed=1)):
        world.run(other)
        assert world.carried() == []


def test_carried_points_have_the_values_of_the_new_objective(world):
    world.run(sweep())
    before = world.points()
    world.run(sweep(points=10, objective="validation_accuracy"))
    values = {repr(params): value for _, params, value in world.points()}
    for _, params, value in before:
        assert values[repr(params)] == pytest.approx(-value)


def test_a_restored_space_carries_the_points_of_the_study_in_between(world):
    world.run(sweep(points=4))
    world.run(sweep(LENGTHS, steps(10, 60), points=8))
    between = [params for _, params, _ in world.points()]
    world.run(sweep(points=12))
    known = [params for _, params, _ in world.points()]
    assert all(params in known for params in between)
    assert len(known) == 12


def test_points_that_failed_are_not_carried(world):
    world.run(sweep(), failing=lambda spec: spec.prompt.length == 1)
    failed = [params for _, params, value in world.points() if value is None]
    assert failed
    plan = world.plan(sweep(LENGTHS, steps(5, 200)))
    assert plan.edit.left_out == len(failed)


@pytest.mark.parametrize("jobs", [0, 1, 3])
def test_an_edited_search_that_is_killed_resumes_with_the_same_points(tmp_path, resolver, jobs):
    narrow = sweep(LENGTHS, steps(10, 60), points=10)
    uninterrupted, killed = (
        World(tmp_path / name, resolver) for name in ("uninterrupted", "killed")
    )
    for one in (uninterrupted, killed):
        one.run(sweep())
    uninterrupted.run(narrow)
    killed.run(narrow, jobs=jobs)
    killed.run(narrow)
    assert killed.points() == uninterrupted.points()
    assert killed.carried() == uninterrupted.carried()
    killed.run(narrow)
    assert count(killed, "study_opened") == count(uninterrupted, "study_opened") == 2


def test_the_sampler_uses_objectives_from_before_the_edit(tmp_path, resolver):
    """The same four points with opposite objectives, and the same edit."""
    found = []
    for name, sign in (("a", 1), ("again", 1), ("opposite", -1)):
        one = World(tmp_path / name, resolver, sign)
        one.run(sweep(points=4))
        one.run(sweep(LENGTHS, steps(10, 101), points=10))
        found.append([params for _, params, _ in one.points()])
        assert len(one.carried()) == 4
    one, again, opposite = found
    assert one == again
    assert one[:4] == opposite[:4]
    assert all(a != b for a, b in zip(one[4:], opposite[4:], strict=True))


# ---------------------------------------------------------------- messages


def test_a_file_with_the_same_trials_is_not_edited(world):
    assert world.plan(sweep()).edit is None  # it was never run
    world.run(sweep())
    same = replace(sweep(), question="in other words", text="# a comment")
    assert world.plan(same).edit is None


def test_added_and_dropped_cells_and_seeds_are_counted(world):
    def grid(*lengths: int, seeds: tuple[int, ...] = (1,)) -> SweepSpec:
        return SweepSpec(
            name="x",
            grid={"prompt.length": lengths},
            fixed={"method": "fpl"},
            seeds=Seeds(values=tuple((seed,) for seed in seeds)),
        )

    world.run(grid(1, 2, 3))
    edited = grid(2, 3, 4, seeds=(1, 2))
    plan = world.plan(edited)
    assert str(plan.edit) == (
        "edited: keeps 2 trials, reuses 0, adds 4; drops 1 that are no longer part of the sweep"
    )
    assert plan.json(world.store)["edit"]["kept"] == 2
    assert world.run(edited) == 4
    both = SweepSpec(
        name="x", grid={}, fixed={"method": "zero_shot"}, seeds=Seeds(values=((1,), (2,)))
    )
    assert "keeps 0 trials, reuses 0, adds 1;" in str(world.plan(both).edit)  # one computation


# ---------------------------------------------------------------- patience


def test_a_search_ends_after_patience_points_without_improvement(world):
    impatient = sweep(points=40, patience=6)
    world.run(impatient)
    values = [value for _, _, value in world.points()]
    best = values.index(max(values))
    assert len(values) < 40
    assert len(values) - 1 - best in (6, 7)  # at the end of a round of two
    plan = world.plan(impatient)
    assert (plan.points, plan.to_run) == (len(values), 0)
    assert world.run(impatient) == 0
    ends = [event for event in world.event_log.events() if event["event"] == "search_ended"]
    assert [(event["points"], event["trials_left"]) for event in ends] == [
        (len(values), 40 - len(values))
    ]


def test_more_patience_continues_a_search_that_ended(world):
    world.run(sweep(points=40, patience=2))
    few = world.points()
    assert world.plan(sweep(points=40)).points == 40
    world.run(sweep(points=40, patience=8))
    assert world.points()[: len(few)] == few
    assert len(world.points()) > len(few)


def test_carried_points_do_not_count_for_patience(world):
    world.run(sweep(points=12))
    world.run(sweep(LENGTHS, steps(10, 90), points=40, patience=4))
    new = [t for t in world.trials() if "carried" not in t.user_attrs]
    assert len(new) >= 4

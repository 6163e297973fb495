"""The order of jobs and the outcomes of slots, with small real trials and no cluster."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from orchestrator.execution._scheduler import Job, TrialScheduler
from orchestrator.failures import Failure
from orchestrator.planning import Outcome, Resolver
from orchestrator.planning.plan import plan_sweep, suggested_points
from orchestrator.planning.search import CellSearch
from orchestrator.spec import Dimension, SweepSpec, cells_of
from orchestrator.spec.space import study_name
from orchestrator.spec.sweep import Search, Seeds
from orchestrator.stages.context import WorkerContext
from orchestrator.stages.trial_run import run_trial, run_trials
from orchestrator.store import ArtifactStore, EventLog, read_trial
from tests.helpers.features import digit_features, store_with

IMAGES = 240  # of the digits: some of each class, and quick
QUICK = {"train.steps": 2, "prompt.length": 2, "iterations": 2}
LENGTHS = (Dimension(key="prompt.length", values=(1, 2, 3, 4)),)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tiny_clip, resolver) -> Path:
    """A store with the features of some digits."""
    spec = resolver.trial({"precision": "fp32", "images_per_class": 0}).features
    arrays = digit_features(tiny_clip.encode_images, IMAGES)
    return store_with(tmp_path_factory.mktemp("prepared") / "runs", spec, arrays).root


class RecordedSearch(CellSearch):
    """A search that keeps the objectives of its rounds."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.rounds: list[dict[int, float | None]] = []

    def record_round(self, values: Mapping[int, float | None]) -> None:
        self.rounds.append(dict(values))
        super().record_round(values)


class World:
    """The store and the event log of one sweep, which several schedulers use in turn."""

    def __init__(self, folder: Path, prepared: Path, resolver: Resolver) -> None:
        self.store = ArtifactStore(shutil.copytree(prepared, folder / "runs"))
        self.event_log = EventLog(folder / "sweep")
        self.event_log.folder.mkdir()
        self.resolver = resolver
        self.outcomes: list[Outcome] = []
        self.searches: dict[str, RecordedSearch] = {}

    def scheduler(self, sweep: SweepSpec, groups: Any = None, **more: Any) -> TrialScheduler:
        """A new scheduler that resumes the sweep of the earlier schedulers."""
        self.outcomes, self.searches = [], {}
        cells = cells_of(sweep)
        if sweep.search is not None:
            logged = suggested_points(self.event_log)
            for cell in cells:
                if cell.space:
                    points = logged.get(study_name(cell, sweep.search), {})
                    self.searches[cell.id] = RecordedSearch(cell, sweep.search, points)
        inputs = self.store, self.resolver, self.event_log
        return TrialScheduler(
            sweep, groups or [cells], self.searches, *inputs, self.on_outcome, **more
        )

    def on_outcome(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        if not outcome.already_logged:
            slot: dict[str, Any] = {"slot": outcome.slot.id, "key": outcome.slot.key.digest}
            self.event_log.append(f"trial_{outcome.state}", **slot)

    def run(self, job: Job, failing: Callable[[Any], bool] = lambda spec: False) -> dict[str, Any]:
        """Run a job's trials; returns the failures by key."""
        failures, runs = {}, []
        for spec, key in zip(job.trials, job.keys, strict=True):
            if failing(spec):
                failures[key] = Failure("nan", "the loss became nan")
            else:
                runs.append(spec)
        results = run_trials(runs, WorkerContext(self.store))
        assert not [result for result in results if isinstance(result, Exception)], results
        return failures

    def run_all(
        self, scheduler: TrialScheduler, failing: Callable[[Any], bool] = lambda spec: False
    ) -> list[Job]:
        jobs = []
        while (job := scheduler.next()) is not None:
            jobs.append(job)
            scheduler.complete(job.number, self.run(job, failing))
        assert scheduler.is_complete
        return jobs

    def states(self) -> list[str]:
        return [outcome.state for outcome in self.outcomes]

    def points(self) -> list[tuple[int, dict[str, Any], float | None]]:
        """(number, parameters, value) of the points of the only search."""
        (search,) = self.searches.values()
        (points,) = suggested_points(self.event_log).values()
        values = {number: value for of in search.rounds for number, value in of.items()}
        return [(number, points[number], values[number]) for number in sorted(values)]


@pytest.fixture
def world(tmp_path, prepared, resolver) -> World:
    return World(tmp_path, prepared, resolver)


def sweep(*methods: str, seeds: Iterable[int] = (1, 2), **parts: Any) -> SweepSpec:
    fixed = {**QUICK, **parts.pop("fixed", {})}
    searched = {dimension.key for dimension in parts["search"].space} if "search" in parts else ()
    fixed = {key: value for key, value in fixed.items() if key not in searched}
    grid = {"method": methods} if len(methods) > 1 else {}
    if not grid:
        fixed["method"] = methods[0]
    values = tuple((seed,) for seed in seeds)
    return SweepSpec(name="x", grid=grid, fixed=fixed, seeds=Seeds(values=values), **parts)


def searching(points: int = 4, width: int = 2, sampler: Any = "random") -> Search:
    return Search(sampler=sampler, points=points, width=width, space=LENGTHS)


# ---------------------------------------------------------------- jobs and outcomes


def test_a_job_is_a_point_with_the_seeds_that_are_trained_together(world):
    scheduler = world.scheduler(sweep("fpl", "cpl"))
    jobs = world.run_all(scheduler)
    assert [(job.cell, job.point) for job in jobs] == [
        ("digits-ul-text-fpl", 0),
        ("digits-ul-text-cpl", 0),
    ]
    assert [[spec.seed for spec in job.trials] for job in jobs] == [[1, 2], [1, 2]]
    assert world.states() == ["done"] * 4
    for outcome in world.outcomes:
        assert outcome.record == read_trial(outcome.slot.spec, world.store)
        assert not outcome.already_logged


def test_runs_of_a_point_that_are_one_computation_are_one_trial(world):
    jobs = world.run_all(world.scheduler(sweep("zero_shot", seeds=(1, 2, 3))))
    assert [len(job.trials) for job in jobs] == [1]
    assert world.states() == ["done", "reused", "reused"]
    assert [outcome.slot.seeds["seed"] for outcome in world.outcomes] == [1, 2, 3]


def test_a_trial_that_another_job_computes_is_not_started_twice(world):
    """`air` without images and `cpl` are one trial."""
    scheduler = world.scheduler(sweep("cpl", "air", seeds=(1,), fixed={"images_per_class": 0}))
    job = scheduler.next()
    assert len(job.trials) == 1
    assert scheduler.next() is None  # air needs the same trial
    assert not scheduler.is_complete
    assert world.outcomes == []
    scheduler.complete(job.number, world.run(job))
    assert [(o.slot.cell.method, o.state) for o in world.outcomes] == [
        ("cpl", "done"),
        ("air", "reused"),
    ]
    assert world.outcomes[0].record == world.outcomes[1].record
    assert scheduler.next() is None
    assert scheduler.is_complete


def test_trials_of_another_sweep_are_reused_from_the_store(world):
    run_trial(next(iter(world.scheduler(sweep("fpl")).next().trials)), world.store)
    jobs = world.run_all(world.scheduler(sweep("fpl")))
    assert [[spec.seed for spec in job.trials] for job in jobs] == [[2]]
    assert world.states() == ["reused", "done"]


def test_a_finished_sweep_has_no_jobs_and_repeats_its_outcomes(world):
    world.run_all(world.scheduler(sweep("fpl", "zero_shot")))
    states = {outcome.slot.id: outcome.state for outcome in world.outcomes}
    assert sorted(states.values()) == ["done", "done", "done", "reused"]
    assert world.run_all(world.scheduler(sweep("fpl", "zero_shot"))) == []
    assert {outcome.slot.id: outcome.state for outcome in world.outcomes} == states
    assert all(outcome.already_logged and outcome.record is not None for outcome in world.outcomes)


def test_cells_of_the_same_group_take_turns(world):
    scheduler = world.scheduler(sweep("fpl", "cpl", search=searching(sampler="grid"), seeds=(1,)))
    jobs = [scheduler.next() for _ in range(4)]
    assert [job.cell.rpartition("-")[2] for job in jobs] == ["fpl", "cpl", "fpl", "cpl"]


# ---------------------------------------------------------------- failures


def second_seed(spec: Any) -> bool:
    return spec.seed == 2


def test_a_trial_that_fails_does_not_hold_up_the_others(world):
    scheduler = world.scheduler(sweep("fpl", "cpl"))
    world.run_all(scheduler, second_seed)
    assert world.states() == ["done", "failed", "done", "failed"]
    failed = world.outcomes[1]
    assert (failed.failure_class, failed.message) == ("nan", "the loss became nan")
    assert failed.record is None


def test_all_slots_of_a_failed_trial_fail(world):
    scheduler = world.scheduler(sweep("cpl", "air", seeds=(1,), fixed={"images_per_class": 0}))
    job = scheduler.next()
    assert scheduler.next() is None
    scheduler.complete(job.number, dict.fromkeys(job.keys, Failure("data", "")))
    assert world.states() == ["failed", "failed"]
    assert scheduler.next() is None
    assert scheduler.is_complete


def fail(world: World, scheduler: TrialScheduler, *classes: str) -> list[Job]:
    """Fail one job with each class in turn, then run the rest; returns all jobs."""
    jobs = []
    for name in classes:
        job = scheduler.next()
        jobs.append(job)
        scheduler.complete(job.number, dict.fromkeys(job.keys, Failure(name, f"a case of {name}")))
    return jobs + world.run_all(scheduler)


@pytest.mark.parametrize("name", ["oom", "infra", "preempted", "timeout"])
def test_a_temporary_failure_is_retried_in_the_same_run(world, name):
    jobs = fail(world, world.scheduler(sweep("fpl", seeds=(1,))), name)
    assert [job.keys for job in jobs] == [jobs[0].keys] * 2
    assert world.states() == ["done"]
    (retried,) = [e for e in world.event_log.events() if e["event"] == "trial_retried"]
    assert (retried["failure_class"], retried["attempt"]) == (name, 1)


def test_out_of_memory_is_retried_with_half_as_many_images_at_a_time(world):
    jobs = fail(world, world.scheduler(sweep("fpl", seeds=(1,))), "oom", "infra", "oom")
    assert [job.halvings for job in jobs] == [0, 1, 1, 2]
    assert [WorkerContext(world.store, batch=10).with_thrift(n).batch for n in (0, 1, 4)] == [
        10,
        5,
        1,
    ]


@pytest.mark.parametrize("name", ["user", "data"])
def test_a_permanent_failure_is_not_retried(world, name):
    assert len(fail(world, world.scheduler(sweep("fpl", seeds=(1,))), name)) == 1
    assert world.states() == ["failed"]


def test_each_class_has_its_own_limit_and_then_the_last_failure_counts(world):
    classes = ["oom", "infra", "oom", "infra", "infra"]
    jobs = fail(world, world.scheduler(sweep("fpl", seeds=(1,))), *classes)
    assert len(jobs) == len(classes)
    assert [(o.state, o.failure_class) for o in world.outcomes] == [("failed", "infra")]


def test_a_loss_that_is_not_finite_in_tf32_is_not_repeated_in_fp32(world):
    scheduler = world.scheduler(sweep("fpl", seeds=(1,), fixed={"precision": "tf32"}))
    job = scheduler.next()
    scheduler.complete(job.number, dict.fromkeys(job.keys, Failure("nan", "the loss became nan")))
    assert scheduler.fp32_slots == []


def test_a_trial_whose_loss_is_not_finite_is_repeated_in_fp32(world):
    half = sweep("fpl", "zero_shot", seeds=(1,), fixed={"precision": "bf16"})
    scheduler = world.scheduler(half)
    first = scheduler.next()
    scheduler.complete(
        first.number, dict.fromkeys(first.keys, Failure("nan", "the loss became nan"))
    )
    assert [slot.id for slot in scheduler.fp32_slots] == ["digits-ul-text-fpl/0/seed=1"]
    again = world.scheduler(sweep("fpl", seeds=(1,), fixed={"precision": "bf16"}))
    (job,) = world.run_all(again)  # its features exist in fp32
    assert [spec.precision for spec in (*first.trials, *job.trials)] == ["bf16", "fp32"]
    (outcome,) = world.outcomes
    assert (outcome.state, outcome.slot.key.digest) == ("done", job.keys[0])
    # Later plans of the sweep have the trial in fp32.
    plan = plan_sweep(half, world.store, world.resolver, world.event_log)
    by_slot = {slot.id: slot.spec.precision for slot in plan.slots}
    assert by_slot == {
        "digits-ul-text-fpl/0/seed=1": "fp32",
        "digits-ul-text-zero_shot/0/seed=1": "bf16",
    }
    assert {requirement.spec.precision for requirement in plan.requirements} == {"bf16", "fp32"}


def test_a_loss_that_is_not_finite_in_fp32_is_a_failure(world):
    assert len(fail(world, world.scheduler(sweep("fpl", seeds=(1,))), "nan")) == 1
    assert [(o.state, o.failure_class) for o in world.outcomes] == [("failed", "nan")]


def test_three_equal_errors_of_the_user_stop_the_sweep_with_one_message(world):
    scheduler = world.scheduler(sweep("fpl", "cpl", "grip", "ifpl", seeds=(1,)))
    fail(world, scheduler, "user", "infra", "user", "user")
    assert world.states() == ["failed"] * 3  # the fourth method never started
    assert scheduler.stopping_failure() == Failure("user", "a case of user")
    assert scheduler.is_complete


def test_a_full_disk_stops_the_sweep_at_once(world):
    scheduler = world.scheduler(sweep("fpl", "cpl", seeds=(1,)))
    fail(world, scheduler, "disk")
    assert world.states() == ["failed"]  # the second method never started
    assert scheduler.stopping_failure() == Failure("disk", "a case of disk")
    assert scheduler.is_complete


def test_a_trial_with_a_failed_dependency_fails_without_starting(world):
    def failed_dependency(spec: Any) -> Failure | None:
        return Failure("oom", "its LoRA failed") if spec.pseudo_labels.kind == "top_k" else None

    scheduler = world.scheduler(
        sweep("fpl", "cpl", seeds=(1,)), failed_dependency=failed_dependency
    )
    assert [spec.pseudo_labels.kind for job in world.run_all(scheduler) for spec in job.trials] == [
        "candidates"
    ]
    assert sorted((o.state, o.message) for o in world.outcomes) == [
        ("done", ""),
        ("failed", "its LoRA failed"),
    ]


def test_a_failed_seed_makes_a_failed_point_which_the_next_run_repeats(world):
    failing = sweep("fpl", search=searching(points=2, sampler="grid"))
    world.run_all(world.scheduler(failing), lambda spec: spec.seed == 2 and spec.prompt.length == 1)
    (four, one) = world.points()
    assert (four[1], one[1:]) == ({"prompt.length": 4}, ({"prompt.length": 1}, None))
    assert four[2] is not None
    (job,) = world.run_all(world.scheduler(failing))
    assert [(spec.seed, spec.prompt.length) for spec in job.trials] == [(2, 1)]
    (_, repeated) = world.points()
    assert repeated[:2] == one[:2]
    assert repeated[2] is not None


# ---------------------------------------------------------------- rounds


def mean_objective(world: World, point: int) -> float:
    """The mean of the search's objective over the seeds of a point."""
    records = [o.record for o in world.outcomes if o.slot.point == point]
    return sum(record.objectives["mutual_information"] for record in records) / len(records)


def test_a_round_ends_when_all_its_points_have_ended_in_any_order(world):
    scheduler = world.scheduler(sweep("fpl", search=searching(points=4, width=2, sampler="grid")))
    first, second = scheduler.next(), scheduler.next()
    assert scheduler.next() is None  # the next round waits for this one
    scheduler.complete(second.number, world.run(second))
    assert scheduler.next() is None
    scheduler.complete(first.number, world.run(first))
    third = scheduler.next()
    assert [job.point for job in (first, second, third)] == [0, 1, 2]
    expected = [mean_objective(world, point) for point in (0, 1)]
    assert [value for _, _, value in world.points()[:2]] == expected


def test_a_point_that_equals_an_earlier_point_is_reused(world):
    """Five points of four lengths: at least one length comes twice."""
    space = (Dimension(key="prompt.length", min=1, max=4),)
    search = Search(sampler="random", points=5, width=2, space=space)
    jobs = world.run_all(world.scheduler(sweep("fpl", search=search, seeds=(1,))))
    lengths = {params["prompt.length"] for _, params, _ in world.points()}
    assert len(jobs) == len(lengths) < 5
    assert world.states().count("reused") == 5 - len(lengths)


def test_the_validation_images_can_be_the_objective(world):
    search = Search(
        sampler="grid", objective="validation_accuracy", points=2, width=2, space=LENGTHS
    )
    jobs = world.run_all(world.scheduler(sweep("fpl", search=search, seeds=(1,))))
    expected = [read_trial(job.trials[0], world.store).objectives for job in jobs]
    assert [value for _, _, value in world.points()] == [
        objectives["validation_accuracy"] for objectives in expected
    ]


# ---------------------------------------------------------------- resume


def test_the_event_log_has_each_point_once_however_often_the_sweep_resumes(world):
    spec = sweep("fpl", search=searching(points=4, width=2), seeds=(1,))
    world.scheduler(spec).next()
    world.run_all(world.scheduler(spec))
    world.run_all(world.scheduler(spec))
    events = [e for e in world.event_log.events() if e["event"] == "point_asked"]
    assert sorted(event["point"] for event in events) == [0, 1, 2, 3]
    assert [event["params"] for event in sorted(events, key=lambda e: e["point"])] == [
        params for _, params, _ in world.points()
    ]


def test_seeds_that_share_no_computation_are_separate_jobs(world):
    visual = sweep("fpl", seeds=(1, 2, 3), fixed={"modality": "visual"})
    scheduler = world.scheduler(visual)
    jobs = [scheduler.next() for _ in range(3)]
    assert [job.slots for job in jobs] == [
        (f"digits-ul-visual-fpl/0/seed={seed}",) for seed in (1, 2, 3)
    ]
    assert scheduler.next() is None
    assert not scheduler.is_complete
    for job in jobs:
        scheduler.complete(job.number, dict.fromkeys(job.keys, Failure("data", "lost")))
    assert world.states() == ["failed"] * 3
    assert scheduler.next() is None
    assert scheduler.is_complete


def test_a_job_has_at_most_the_class_texts_of_one_pass(world):
    scheduler = world.scheduler(sweep("grip", seeds=range(30)))
    jobs = [scheduler.next(), scheduler.next()]
    assert [len(job.trials) for job in jobs] == [25, 5]  # 10 names each; 256 texts


def test_a_cell_without_its_images_waits_and_the_other_cells_run(world):
    ready = {"digits-ul-text-fpl"}
    spec = sweep("cpl", "fpl", seeds=(1,))
    scheduler = world.scheduler(spec, is_ready=lambda cell: cell.id in ready)
    first = scheduler.next()
    assert first.cell == "digits-ul-text-fpl"
    assert scheduler.next() is None
    scheduler.complete(first.number, dict.fromkeys(first.keys, Failure("data", "lost")))
    assert scheduler.next() is None
    assert not scheduler.is_complete
    ready.add("digits-ul-text-cpl")
    second = scheduler.next()
    assert second.cell == "digits-ul-text-cpl"
    scheduler.complete(second.number, dict.fromkeys(second.keys, Failure("data", "lost")))
    assert scheduler.next() is None
    assert scheduler.is_complete


def test_ready_cells_run_in_the_order_of_their_groups(world):
    spec = sweep("cpl", "fpl", search=searching(sampler="grid"), seeds=(1,))
    first, second = cells_of(spec)
    scheduler = world.scheduler(spec, groups=[[second], [first]])
    jobs = [scheduler.next().cell for _ in range(4)]
    assert jobs == [second.id, second.id, first.id, first.id]


def test_a_trial_that_fails_beside_others_is_retried_alone(world):
    scheduler = world.scheduler(sweep("grip", seeds=(1, 2, 3)))
    job = scheduler.next()
    lost = job.keys[2]
    for spec, key in zip(job.trials, job.keys, strict=True):
        if key != lost:
            run_trial(spec, world.store)
    scheduler.complete(job.number, {lost: Failure("infra", "the process that ran it died")})
    assert world.states() == ["done"] * 2
    again = scheduler.next()
    assert (again.keys, again.point) == ((lost,), job.point)
    scheduler.complete(again.number, world.run(again))
    assert world.states() == ["done"] * 3
    assert scheduler.next() is None

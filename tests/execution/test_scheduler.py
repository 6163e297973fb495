"""The order of jobs and the outcomes of slots, with trials that take no time and no cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.execution._scheduler import Job, TrialScheduler
from orchestrator.execution._tuning import _JobSearcher
from orchestrator.failures import Failure
from orchestrator.planning import Outcome, Resolver, requirements_of
from orchestrator.planning.history import read_history
from orchestrator.planning.search import CellSearch
from orchestrator.spec import Dimension, SweepSpec, cells_of
from orchestrator.spec.space import study_name
from orchestrator.spec.sweep import Search, Seeds
from orchestrator.store import ArtifactStore, EventLog, read_trial
from tests.helpers import trivial

LENGTHS = (Dimension(key="prompt.length", values=(1, 2, 3, 4)),)
LOST = Failure("data", "lost")


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

    def __init__(self, folder: Path, resolver: Resolver) -> None:
        self.store = ArtifactStore(folder / "runs")
        self.store.root.mkdir()
        self.event_log = EventLog(folder / "sweep")
        self.event_log.folder.mkdir()
        self.resolver = resolver
        self.outcomes: list[Outcome] = []
        self.searches: dict[str, RecordedSearch] = {}

    def scheduler(self, sweep: SweepSpec, groups: Any = None, **more: Any) -> TrialScheduler:
        """A new scheduler that resumes the sweep of the earlier schedulers."""
        self.outcomes, self.searches = [], {}
        cells = cells_of(sweep)
        history = read_history(self.event_log)
        if sweep.search is not None:
            for cell in cells:
                if cell.space:
                    points = history.suggested.get(study_name(cell, sweep.search), {})
                    self.searches[cell.id] = RecordedSearch(cell, sweep.search, points)
        inputs = self.store, self.resolver, self.event_log, history
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
        failures = {}
        for spec, key in zip(job.trials, job.keys, strict=True):
            if failing(spec):
                failures[key] = Failure("nan", "the loss became nan")
                continue
            for requirement in requirements_of([spec]):
                self.store.get_or_build(requirement.spec, lambda folder: {})
            trivial.run_trial(spec, self.store)
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

    def fail(self, scheduler: TrialScheduler, *classes: str) -> list[Job]:
        """Fail one job with each class in turn, then run the rest; returns all jobs."""
        jobs = []
        for name in classes:
            job = scheduler.next()
            assert job is not None
            jobs.append(job)
            failure = Failure(name, f"a case of {name}")
            scheduler.complete(job.number, dict.fromkeys(job.keys, failure))
        return jobs + self.run_all(scheduler)

    def states(self) -> list[str]:
        return [outcome.state for outcome in self.outcomes]

    def points(self) -> list[tuple[int, dict[str, Any], float | None]]:
        """(number, parameters, value) of the points of the only search."""
        (search,) = self.searches.values()
        (points,) = read_history(self.event_log).suggested.values()
        values = {number: value for of in search.rounds for number, value in of.items()}
        return [(number, points[number], values[number]) for number in sorted(values)]

    def objective(self, point: int) -> float:
        """The mean of the search's objective over the seeds of a point."""
        found = [o.record for o in self.outcomes if o.slot.point == point]
        return sum(record.objectives["mutual_information"] for record in found) / len(found)


@pytest.fixture
def world(tmp_path, resolver) -> World:
    return World(tmp_path, resolver)


def sweep(*methods: str, seeds: Iterable[int] = (1, 2), **parts: Any) -> SweepSpec:
    fixed = {"train.steps": 2, **parts.pop("fixed", {})}
    grid = {"method": methods} if len(methods) > 1 else {}
    if not grid:
        fixed["method"] = methods[0]
    values = tuple((seed,) for seed in seeds)
    return SweepSpec(name="x", grid=grid, fixed=fixed, seeds=Seeds(values=values), **parts)


def searching(points: int = 4, width: int = 2, sampler: Any = "random") -> Search:
    return Search(sampler=sampler, points=points, width=width, space=LENGTHS)


# ---------------------------------------------------------------- jobs and outcomes


def test_a_job_is_a_point_with_the_seeds_that_are_trained_together(world):
    jobs = world.run_all(world.scheduler(sweep("fpl", "cpl")))
    assert [(job.cell, job.point) for job in jobs] == [
        ("digits-ul-text-fpl", 0),
        ("digits-ul-text-cpl", 0),
    ]
    assert [[spec.seed for spec in job.trials] for job in jobs] == [[1, 2], [1, 2]]
    assert world.states() == ["done"] * 4
    for outcome in world.outcomes:
        assert outcome.record == read_trial(outcome.slot.spec, world.store)
        assert not outcome.already_logged
    # Images of visual prompts share no computation, and the texts of a pass are limited.
    visual = world.scheduler(sweep("fpl", fixed={"modality": "visual"}))
    assert [len(visual.next().trials) for _ in range(2)] == [1, 1]
    many = world.scheduler(sweep("grip", seeds=range(30)))
    assert [len(many.next().trials) for _ in range(2)] == [25, 5]  # 10 names each; 256 texts


@pytest.mark.parametrize(
    ("failure", "states"), [(None, ["done", "reused"]), (LOST, ["failed"] * 2)]
)
def test_a_trial_that_another_job_computes_is_not_started_twice(world, failure, states):
    """`air` without images and `cpl` are one trial."""
    scheduler = world.scheduler(sweep("cpl", "air", seeds=(1,), fixed={"images_per_class": 0}))
    job = scheduler.next()
    assert len(job.trials) == 1
    assert scheduler.next() is None  # air needs the same trial
    assert not scheduler.is_complete
    assert world.outcomes == []
    failures = dict.fromkeys(job.keys, failure) if failure else world.run(job)
    scheduler.complete(job.number, failures)
    assert world.states() == states
    assert [outcome.slot.cell.method for outcome in world.outcomes] == ["cpl", "air"]
    assert scheduler.next() is None
    assert scheduler.is_complete


def test_stored_trials_are_reused_and_a_finished_sweep_repeats_its_outcomes(world):
    spec = sweep("fpl", "zero_shot")
    world.run(world.scheduler(spec).next(), failing=lambda trial: trial.seed == 2)
    jobs = world.run_all(world.scheduler(spec))
    assert [[trial.seed for trial in job.trials] for job in jobs] == [[2], [0]]
    assert sorted(world.states()) == ["done", "done", "reused", "reused"]
    states = {outcome.slot.id: outcome.state for outcome in world.outcomes}
    assert world.run_all(world.scheduler(spec)) == []
    assert {outcome.slot.id: outcome.state for outcome in world.outcomes} == states
    assert all(outcome.already_logged and outcome.record is not None for outcome in world.outcomes)


def test_cells_of_a_group_take_turns_and_groups_come_in_order(world):
    spec = sweep("fpl", "cpl", search=searching(sampler="grid"), seeds=(1,))
    scheduler = world.scheduler(spec)
    cells = [scheduler.next().cell for _ in range(4)]
    assert [cell.rpartition("-")[2] for cell in cells] == ["fpl", "cpl", "fpl", "cpl"]
    first, second = cells_of(spec)
    scheduler = world.scheduler(spec, groups=[[second], [first]])
    cells = [scheduler.next().cell for _ in range(4)]
    assert cells == [second.id, second.id, first.id, first.id]


def test_a_cell_without_its_inputs_waits_and_the_other_cells_run(world):
    ready = {"digits-ul-text-fpl"}
    spec = sweep("cpl", "fpl", seeds=(1,))
    scheduler = world.scheduler(spec, is_ready=lambda cell: cell.id in ready)
    for cell in ("digits-ul-text-fpl", "digits-ul-text-cpl"):
        assert not scheduler.is_complete
        ready.add(cell)
        job = scheduler.next()
        assert job.cell == cell
        assert scheduler.next() is None
        scheduler.complete(job.number, dict.fromkeys(job.keys, LOST))
    assert scheduler.next() is None
    assert scheduler.is_complete


# ---------------------------------------------------------------- failures


@pytest.mark.parametrize(
    ("classes", "state"),
    [
        *[([name], "done") for name in ("oom", "infra", "preempted")],
        *[([name], "failed") for name in ("user", "data", "nan")],
        (["oom", "infra", "oom", "infra", "infra"], "failed"),  # each class has its own limit
    ],
)
def test_a_temporary_failure_is_retried_in_the_same_run(world, classes, state):
    jobs = world.fail(world.scheduler(sweep("fpl", seeds=(1,))), *classes)
    assert [job.keys for job in jobs] == [jobs[0].keys] * (len(classes) + (state == "done"))
    halvings = [classes[:number].count("oom") for number in range(len(jobs))]
    assert [job.halvings for job in jobs] == halvings
    (outcome,) = world.outcomes
    assert (outcome.state, outcome.failure_class) == (
        state,
        classes[-1] if state == "failed" else None,
    )
    retried = [e for e in world.event_log.events() if e["event"] == "trial_retried"]
    assert [e["failure_class"] for e in retried] == classes[: len(jobs) - 1]


def test_a_trial_that_fails_beside_others_is_retried_alone(world):
    scheduler = world.scheduler(sweep("grip", "fpl", seeds=(1, 2, 3)))
    job = scheduler.next()
    lost = job.keys[2]
    world.run(job, failing=lambda spec: spec.seed == 3)
    scheduler.complete(job.number, {lost: Failure("infra", "the process that ran it died")})
    assert world.states() == ["done"] * 2
    jobs = world.run_all(scheduler)
    assert [job.keys for job in jobs if job.cell.endswith("grip")] == [(lost,)]
    assert world.states() == ["done"] * 6


@pytest.mark.parametrize(
    ("classes", "ended"), [(["user", "infra", "user", "user"], 3), (["disk"], 1)]
)
def test_equal_errors_of_the_user_and_a_full_disk_stop_the_sweep(world, classes, ended):
    scheduler = world.scheduler(sweep("fpl", "cpl", "grip", "ifpl", seeds=(1,)))
    world.fail(scheduler, *classes)
    assert world.states() == ["failed"] * ended  # the others never started
    assert scheduler.stopping_failure() == Failure(classes[-1], f"a case of {classes[-1]}")
    assert scheduler.is_complete


def test_a_trial_with_a_failed_dependency_fails_without_starting(world):
    def failed(spec: Any) -> Failure | None:
        return LOST if spec.pseudo_labels.kind == "top_k" else None

    scheduler = world.scheduler(sweep("fpl", "cpl", seeds=(1,)), failed_dependency=failed)
    started = [spec.pseudo_labels.kind for job in world.run_all(scheduler) for spec in job.trials]
    assert started == ["candidates"]
    assert sorted((o.state, o.message) for o in world.outcomes) == [
        ("done", ""),
        ("failed", "lost"),
    ]


# ---------------------------------------------------------------- rounds


def test_a_failed_seed_makes_a_failed_point_which_the_next_run_repeats(world):
    spec = sweep("fpl", search=searching(points=3, width=1))
    world.run_all(world.scheduler(spec), lambda trial: trial.seed == 2)
    assert [value for _, _, value in world.points()] == [None] * 3
    jobs = world.run_all(world.scheduler(spec))
    assert [[trial.seed for trial in job.trials] for job in jobs] == [[2]] * 3
    assert None not in [value for _, _, value in world.points()]


def test_a_round_ends_when_all_its_points_have_ended_in_any_order(world):
    scheduler = world.scheduler(sweep("fpl", search=searching(sampler="grid")))
    first, second = scheduler.next(), scheduler.next()
    assert scheduler.next() is None  # the next round waits for this one
    scheduler.complete(second.number, world.run(second))
    assert scheduler.next() is None
    scheduler.complete(first.number, world.run(first))
    third = scheduler.next()
    assert [job.point for job in (first, second, third)] == [0, 1, 2]
    values = [value for _, _, value in world.points()[:2]]
    assert values == [world.objective(point) for point in (0, 1)]


def test_a_point_that_equals_an_earlier_point_is_reused(world):
    """Five points of four lengths: at least one length comes twice."""
    space = (Dimension(key="prompt.length", min=1, max=4),)
    search = Search(sampler="random", points=5, width=2, space=space)
    jobs = world.run_all(world.scheduler(sweep("fpl", search=search, seeds=(1,))))
    lengths = {params["prompt.length"] for _, params, _ in world.points()}
    assert len(jobs) == len(lengths) < 5
    assert world.states().count("reused") == 5 - len(lengths)


# ---------------------------------------------------------------- Ray Tune


def test_preparation_goes_on_while_the_first_trial_waits_for_a_pool():
    """Until a trial runs, Tune calls nothing but `suggest`, and that once a second."""
    ticks: list[str] = []
    job = SimpleNamespace(number=1)
    scheduler = SimpleNamespace(peek=lambda: job, next=lambda: job, running={})
    searcher = _JobSearcher(scheduler, lambda: len(ticks) // 3, lambda: ticks.append("tick"))
    assert searcher.suggest("first") == {"job": job}
    assert len(ticks) == 3
    scheduler.running[1] = job  # from now on Tune calls `_JobCallback`
    assert searcher.suggest("second") is None
    assert len(ticks) == 3

"""Which trial runs next and who waits for whom, with small real trials and no cluster."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.trial import TrialState
from safetensors.numpy import save_file

from air_core import side_by_side
from air_core.datasets import get_dataset
from orchestrator.execution._scheduler import Job, TrialScheduler
from orchestrator.failures import Failure
from orchestrator.planning import Outcome, Resolver
from orchestrator.planning.plan import finished_slots, plan_sweep
from orchestrator.planning.search import CellSearch
from orchestrator.planning.studies import searches
from orchestrator.reporting.results import entries_of
from orchestrator.spec import Dimension, SweepSpec, cells_of
from orchestrator.spec.sweep import Pruning, Search, Seeds
from orchestrator.stages.build import PARTS
from orchestrator.stages.context import WorkerContext
from orchestrator.stages.image_rows import build_image_block, open_generator
from orchestrator.stages.side_by_side import run_trials
from orchestrator.stages.trial import run_trial
from orchestrator.store import ArtifactStore, EventLog, read_trial

IMAGES = 240  # of the digits: enough for every class, and quick
QUICK = {"train.steps": 2, "prompt.length": 2, "iterations": 2}
LENGTHS = (Dimension(key="prompt.length", values=(1, 2, 3, 4)),)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tiny_clip, resolver) -> Path:
    """A store with the features of some digits."""
    spec = resolver.trial({"images_per_class": 0}).features

    def build(folder: Path) -> dict[str, Any]:
        examples = get_dataset("digits").load(None)
        parts = [PARTS.index(part) for part in examples.parts[:IMAGES]]
        arrays = {
            "features": tiny_clip.encode_images(examples.images[:IMAGES]).numpy(),
            "labels": examples.labels[:IMAGES],
            "parts": np.array(parts, dtype=np.int8),
        }
        save_file(arrays, folder / "features.safetensors")
        return {}

    store = ArtifactStore(tmp_path_factory.mktemp("prepared") / "runs")
    store.get_or_build(spec, build)
    return store.root


class World:
    """One sweep's store and ledger, and drivers that come and go."""

    def __init__(self, folder: Path, prepared: Path, resolver: Resolver) -> None:
        self.store = ArtifactStore(shutil.copytree(prepared, folder / "runs"))
        self.event_log = EventLog(folder / "sweep")
        self.event_log.folder.mkdir()
        self.resolver = resolver
        self.outcomes: list[Outcome] = []
        self.searches: dict[str, CellSearch] = {}

    def driver(self, sweep: SweepSpec, *more: Any) -> TrialScheduler:
        """A new driver on what the ones before left."""
        self.outcomes, self.searches = [], {}
        cells = cells_of(sweep)
        if sweep.search is not None:
            found = searches(self.event_log)
            for cell in cells:
                if cell.space:
                    self.searches[cell.id] = CellSearch(cell, sweep.search, found)
        place = self.store, self.resolver, self.event_log
        return TrialScheduler(sweep, cells, self.searches, *place, self.outcome, *more)

    def outcome(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        if not outcome.known:
            slot: dict[str, Any] = {"slot": outcome.slot.id, "key": outcome.slot.key.digest}
            if outcome.pruned is not None:
                slot |= {"rung": outcome.pruned.rung, "value": outcome.pruned.value}
            self.event_log.append(f"trial_{outcome.state}", **slot)

    def run(self, job: Job, failing: Callable[[Any], bool] = lambda spec: False) -> dict[str, Any]:
        """Run a job's trials; failures by key."""
        failures, runs = {}, []
        for spec, key in zip(job.trials, job.keys, strict=True):
            if failing(spec):
                failures[key] = Failure("nan", "the loss became nan")
            else:
                runs.append(spec)
        ends = run_trials(runs, self.store, segments=job.segments)
        assert not [end for end in ends if isinstance(end, Exception)], ends
        return failures

    def run_all(
        self, driver: TrialScheduler, failing: Callable[[Any], bool] = lambda spec: False
    ) -> list[Job]:
        jobs = []
        while (job := driver.next()) is not None:
            jobs.append(job)
            driver.complete(job.number, self.run(job, failing))
        assert driver.finished
        return jobs

    def states(self) -> list[str]:
        return [outcome.state for outcome in self.outcomes]

    def told(self) -> list[tuple[int, dict[str, Any], float | None]]:
        """(number, parameters, value) of the points of the only search."""
        asked = [trial for trial in world_study(self) if "point" in trial.user_attrs]
        return [(t.user_attrs["point"], dict(t.params), t.value) for t in asked]


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


def test_one_job_is_one_point_with_the_seeds_that_are_trained_together(world):
    driver = world.driver(sweep("fpl", "cpl"))
    jobs = world.run_all(driver)
    assert [(job.cell, job.point) for job in jobs] == [
        ("digits-ul-text-fpl", 0),
        ("digits-ul-text-cpl", 0),
    ]
    assert [[spec.seed for spec in job.trials] for job in jobs] == [[1, 2], [1, 2]]
    assert world.states() == ["done"] * 4
    for outcome in world.outcomes:
        assert outcome.record == read_trial(outcome.slot.spec, world.store)
        assert not outcome.known


def test_while_jobs_run_there_is_nothing_to_hand_out_and_it_is_not_over(world):
    driver = world.driver(sweep("fpl"))
    job = driver.next()
    assert driver.next() is None
    assert not driver.finished
    driver.complete(job.number, world.run(job))
    assert driver.next() is None
    assert driver.finished


def test_a_job_that_was_only_looked_at_has_not_started_and_comes_next(world):
    driver = world.driver(sweep("fpl", "cpl"))
    job = driver.peek()
    assert driver.peek() is job
    assert not [event for event in world.event_log.events() if event["event"] == "trials_started"]
    assert driver.next() is job
    (started,) = [event for event in world.event_log.events() if event["event"] == "trials_started"]
    assert started["slots"] == list(job.slots)
    assert driver.next().cell != job.cell


def test_runs_of_a_point_that_are_one_computation_are_one_trial(world):
    jobs = world.run_all(world.driver(sweep("zero_shot", seeds=(1, 2, 3))))
    assert [len(job.trials) for job in jobs] == [1]
    assert world.states() == ["done", "reused", "reused"]
    assert [outcome.slot.seeds["seed"] for outcome in world.outcomes] == [1, 2, 3]


def test_what_another_job_computes_is_waited_for(world):
    """`air` without images and `cpl` are one trial."""
    driver = world.driver(sweep("cpl", "air", seeds=(1,), fixed={"images_per_class": 0}))
    job = driver.next()
    assert len(job.trials) == 1
    assert driver.next() is None  # air waits for it
    assert not driver.finished
    assert world.outcomes == []
    driver.complete(job.number, world.run(job))
    assert [(o.slot.cell.method, o.state) for o in world.outcomes] == [
        ("cpl", "done"),
        ("air", "reused"),
    ]
    assert world.outcomes[0].record == world.outcomes[1].record
    assert driver.next() is None
    assert driver.finished


def test_the_store_saves_what_another_sweep_has_computed(world):
    run_trial(next(iter(world.driver(sweep("fpl")).next().trials)), world.store)
    jobs = world.run_all(world.driver(sweep("fpl")))
    assert [[spec.seed for spec in job.trials] for job in jobs] == [[2]]
    assert world.states() == ["reused", "done"]


def test_a_run_of_a_finished_sweep_hands_out_nothing_and_says_what_is_known(world):
    world.run_all(world.driver(sweep("fpl", "zero_shot")))
    states = {outcome.slot.id: outcome.state for outcome in world.outcomes}
    assert sorted(states.values()) == ["done", "done", "done", "reused"]
    assert world.run_all(world.driver(sweep("fpl", "zero_shot"))) == []
    assert {outcome.slot.id: outcome.state for outcome in world.outcomes} == states
    assert all(outcome.known and outcome.record is not None for outcome in world.outcomes)


def test_cells_take_turns(world):
    driver = world.driver(sweep("fpl", "cpl", search=searching(sampler="grid"), seeds=(1,)))
    jobs = [driver.next() for _ in range(4)]
    assert [job.cell.rpartition("-")[2] for job in jobs] == ["fpl", "cpl", "fpl", "cpl"]


def test_once_the_budget_is_spent_nothing_more_starts_and_what_runs_may_end(world):
    money = iter([True, True, False])
    driver = world.driver(sweep("fpl", "cpl", "grip"), lambda under_way: next(money))
    jobs = [driver.next(), driver.next()]
    assert driver.next() is None
    assert driver.out_of_budget()
    assert not driver.finished
    for job in jobs:
        driver.complete(job.number, world.run(job))
    assert driver.next() is None
    assert driver.finished
    assert len(world.run_all(world.driver(sweep("fpl", "cpl", "grip")))) == 1  # another day


def test_the_budget_is_asked_for_what_would_run_together_and_not_for_what_is_there(world):
    run_trial(next(iter(world.driver(sweep("fpl")).next().trials)), world.store)
    asked: list[Any] = []
    driver = world.driver(sweep("fpl", "cpl"), lambda under_way: asked.append(under_way) or True)
    driver.next()
    driver.next()
    fpl, cpl = "digits-ul-text-fpl", "digits-ul-text-cpl"
    assert asked == [[(fpl, 1)], [(fpl, 1), (cpl, 2)]]


def test_a_point_that_is_too_dear_is_left_and_comes_first_another_day(world):
    spec = sweep("fpl", search=searching(points=4, sampler="grid"), seeds=(1,))
    jobs = []
    driver = world.driver(spec, lambda under_way: len(jobs) < 2)
    while (job := driver.next()) is not None:
        jobs.append(job)
        driver.complete(job.number, world.run(job))
    assert driver.out_of_budget()
    assert [job.point for job in jobs] == [0, 1]
    assert [job.point for job in world.run_all(world.driver(spec))] == [2, 3]


def test_what_costs_nothing_needs_no_budget(world):
    world.run_all(world.driver(sweep("fpl")))
    driver = world.driver(sweep("fpl"), lambda under_way: False)
    assert driver.next() is None
    assert not driver.out_of_budget()
    assert driver.finished


# ---------------------------------------------------------------- failures


def second_seed(spec: Any) -> bool:
    return spec.seed == 2


def test_a_trial_that_fails_does_not_hold_up_the_others(world):
    driver = world.driver(sweep("fpl", "cpl"))
    world.run_all(driver, second_seed)
    assert world.states() == ["done", "failed", "done", "failed"]
    failed = world.outcomes[1]
    assert (failed.failure_class, failed.message) == ("nan", "the loss became nan")
    assert failed.record is None


def test_who_waits_for_a_trial_that_fails_fails_too(world):
    driver = world.driver(sweep("cpl", "air", seeds=(1,), fixed={"images_per_class": 0}))
    job = driver.next()
    assert driver.next() is None
    driver.complete(job.number, dict.fromkeys(job.keys, Failure("data", "")))
    assert world.states() == ["failed", "failed"]
    assert driver.next() is None
    assert driver.finished


def test_a_failed_trial_is_tried_again_by_the_next_run(world):
    world.run_all(world.driver(sweep("fpl")), second_seed)
    jobs = world.run_all(world.driver(sweep("fpl")))
    assert [[spec.seed for spec in job.trials] for job in jobs] == [[2]]
    assert [(o.state, o.known) for o in world.outcomes] == [("done", True), ("done", False)]


def fail(world: World, driver: TrialScheduler, *classes: str) -> list[Job]:
    """Jobs that fail one after the other, each by the next class; what comes after succeeds."""
    jobs = []
    for name in classes:
        job = driver.next()
        assert job is not None
        jobs.append(job)
        driver.complete(job.number, dict.fromkeys(job.keys, Failure(name, f"a case of {name}")))
    return jobs + world.run_all(driver)


@pytest.mark.parametrize("name", ["oom", "infra", "preempted", "timeout"])
def test_a_failure_that_may_pass_is_tried_again_in_the_same_run(world, name):
    jobs = fail(world, world.driver(sweep("fpl", seeds=(1,))), name)
    assert [job.keys for job in jobs] == [jobs[0].keys] * 2
    assert world.states() == ["done"]
    (retried,) = [e for e in world.event_log.events() if e["event"] == "trial_retried"]
    assert (retried["failure_class"], retried["attempt"]) == (name, 1)


def test_out_of_memory_is_tried_again_with_half_as_many_images_at_a_time(world):
    jobs = fail(world, world.driver(sweep("fpl", seeds=(1,))), "oom", "infra", "oom")
    assert [job.halvings for job in jobs] == [0, 1, 1, 2]
    assert [WorkerContext(world.store, batch=10).with_less(n).batch for n in (0, 1, 4)] == [
        10,
        5,
        1,
    ]


@pytest.mark.parametrize("name", ["user", "data"])
def test_a_failure_that_would_come_again_is_not_tried_again(world, name):
    assert len(fail(world, world.driver(sweep("fpl", seeds=(1,))), name)) == 1
    assert world.states() == ["failed"]


def test_each_class_has_its_own_limit_and_then_the_last_failure_counts(world):
    classes = ["oom", "infra", "oom", "infra", "infra"]
    jobs = fail(world, world.driver(sweep("fpl", seeds=(1,))), *classes)
    assert len(jobs) == len(classes)
    assert [(o.state, o.failure_class) for o in world.outcomes] == [("failed", "infra")]


def test_a_loss_that_is_not_finite_goes_on_as_another_trial_in_fp32(world):
    half = sweep("fpl", "zero_shot", seeds=(1,), fixed={"precision": "bf16"})
    driver = world.driver(half)
    first = driver.next()
    driver.complete(first.number, dict.fromkeys(first.keys, Failure("nan", "the loss became nan")))
    assert [slot.id for slot in driver.moving] == ["digits-ul-text-fpl/0/seed=1"]
    again = world.driver(sweep("fpl", seeds=(1,), fixed={"precision": "bf16"}))
    (job,) = world.run_all(again)  # its features are there in fp32
    assert [spec.precision for spec in (*first.trials, *job.trials)] == ["bf16", "fp32"]
    (outcome,) = world.outcomes
    assert (outcome.state, outcome.slot.key.digest) == ("done", job.keys[0])
    # The sweep knows that from now on, and plans it.
    plan = plan_sweep(half, world.store, world.resolver, world.event_log)
    by_slot = {slot.id: slot.spec.precision for slot in plan.slots}
    assert by_slot == {
        "digits-ul-text-fpl/0/seed=1": "fp32",
        "digits-ul-text-zero_shot/0/seed=1": "bf16",
    }
    assert {requirement.spec.precision for requirement in plan.requirements} == {"bf16", "fp32"}


def test_in_fp32_a_loss_that_is_not_finite_is_the_end(world):
    assert len(fail(world, world.driver(sweep("fpl", seeds=(1,))), "nan")) == 1
    assert [(o.state, o.failure_class) for o in world.outcomes] == [("failed", "nan")]


def test_three_equal_errors_of_the_user_stop_the_sweep_with_one_message(world):
    driver = world.driver(sweep("fpl", "cpl", "grip", "ifpl", seeds=(1,)))
    fail(world, driver, "user", "infra", "user", "user")
    assert world.states() == ["failed"] * 3  # the fourth method never started
    assert driver.gave_up() == Failure("user", "a case of user")
    assert not driver.out_of_budget()
    assert driver.finished


def test_a_full_disk_stops_the_sweep_at_once(world):
    driver = world.driver(sweep("fpl", "cpl", seeds=(1,)))
    fail(world, driver, "disk")
    assert world.states() == ["failed"]  # the second method never started
    assert driver.gave_up() == Failure("disk", "a case of disk")
    assert driver.finished


def test_what_cannot_run_is_said_to_fail_and_does_not_start(world):
    def failed_requirements(spec: Any) -> Failure | None:
        return Failure("oom", "its LoRA failed") if spec.pseudo_labels.kind == "top_k" else None

    driver = world.driver(
        sweep("fpl", "cpl", seeds=(1,)), lambda under_way: True, failed_requirements
    )
    assert [spec.pseudo_labels.kind for job in world.run_all(driver) for spec in job.trials] == [
        "candidates"
    ]
    assert sorted((o.state, o.message) for o in world.outcomes) == [
        ("done", ""),
        ("failed", "its LoRA failed"),
    ]


def test_a_retry_of_one_class_leaves_the_other_failures_as_they_are(world):
    spec = sweep("fpl", "cpl", seeds=(1,))
    fail(world, world.driver(spec), "user", "data")
    left = {"digits-ul-text-cpl/0/seed=1": Failure("data", "a case of data")}
    again = world.driver(spec, lambda under_way: True, lambda trial: None, left)
    assert [job.cell for job in world.run_all(again)] == ["digits-ul-text-fpl"]
    assert [(o.state, o.known) for o in world.outcomes] == [("done", False), ("failed", True)]


def test_a_failed_seed_makes_a_failed_point_which_the_next_run_mends(world):
    failing = sweep("fpl", search=searching(points=2, sampler="grid"))
    world.run_all(world.driver(failing), lambda spec: spec.seed == 2 and spec.prompt.length == 1)
    (four, one) = world.told()
    assert (four[1], one[1:]) == ({"prompt.length": 4}, ({"prompt.length": 1}, None))
    assert four[2] is not None
    (job,) = world.run_all(world.driver(failing))
    assert [(spec.seed, spec.prompt.length) for spec in job.trials] == [(2, 1)]
    (_, mended) = world.told()
    assert mended[:2] == one[:2]
    assert mended[2] is not None


def world_study(world: World) -> list[Any]:
    (search,) = world.searches.values()
    return search.study.get_trials(deepcopy=False)


# ---------------------------------------------------------------- rounds


def test_a_round_is_told_when_all_of_it_is_there_in_any_order(world):
    driver = world.driver(sweep("fpl", search=searching(points=4, width=2, sampler="grid")))
    first, second = driver.next(), driver.next()
    assert driver.next() is None  # the next round waits for this one
    driver.complete(second.number, world.run(second))
    assert driver.next() is None
    driver.complete(first.number, world.run(first))
    third = driver.next()
    assert [job.point for job in (first, second, third)] == [0, 1, 2]
    expected = [mean_objective(world, job) for job in (first, second)]
    assert [value for _, _, value in world.told()[:2]] == expected


def mean_objective(world: World, job: Job) -> float:
    """The mean over seeds of what the search is after."""
    found = [read_trial(spec, world.store).objectives["mutual_information"] for spec in job.trials]
    return sum(found) / len(found)


def test_a_search_ends_with_all_its_points_told(world):
    world.run_all(world.driver(sweep("fpl", search=searching(points=5, width=2), seeds=(1,))))
    assert [number for number, _, _ in world.told()] == [0, 1, 2, 3, 4]
    assert all(value is not None for _, _, value in world.told())
    assert len(world.outcomes) == 5
    logged = [e["values"] for e in world.event_log.events() if e["event"] == "round_told"]
    assert [len(values) for values in logged] == [2, 2, 1]
    assert {int(n): v for values in logged for n, v in values.items()} == {
        number: value for number, _, value in world.told()
    }


def test_a_point_that_equals_an_earlier_one_costs_nothing(world):
    """Five points of four lengths: at least one comes twice."""
    jobs = world.run_all(world.driver(sweep("fpl", search=searching(points=5), seeds=(1,))))
    lengths = {params["prompt.length"] for _, params, _ in world.told()}
    assert len(jobs) == len(lengths) < 5
    assert world.states().count("reused") == 5 - len(lengths)


def test_the_validation_images_can_be_the_objective(world):
    search = Search(
        sampler="grid", objective="validation_accuracy", points=2, width=2, space=LENGTHS
    )
    jobs = world.run_all(world.driver(sweep("fpl", search=search, seeds=(1,))))
    expected = [read_trial(job.trials[0], world.store).objectives for job in jobs]
    assert [value for _, _, value in world.told()] == [
        found["validation_accuracy"] for found in expected
    ]


# ---------------------------------------------------------------- resume


def test_a_trial_that_was_recorded_but_not_logged_is_not_run_again(world):
    """The driver died between the two."""
    driver = world.driver(sweep("fpl"))
    world.run(driver.next())
    assert world.run_all(world.driver(sweep("fpl"))) == []
    assert world.states() == ["reused", "reused"]


def test_a_point_is_asked_once_in_the_ledger_whatever_happens_to_its_driver(world):
    spec = sweep("fpl", search=searching(points=4, width=2), seeds=(1,))
    world.driver(spec).next()
    world.run_all(world.driver(spec))
    world.run_all(world.driver(spec))
    asked = [e for e in world.event_log.events() if e["event"] == "point_asked"]
    assert sorted(event["point"] for event in asked) == [0, 1, 2, 3]
    assert [event["params"] for event in sorted(asked, key=lambda e: e["point"])] == [
        params for _, params, _ in world.told()
    ]


def test_the_ledger_says_what_was_started_and_how_it_ended(world):
    world.run_all(world.driver(sweep("fpl", seeds=(1,))))
    assert [event["event"] for event in world.event_log.events()] == [
        "trials_started",
        "trial_done",
    ]
    (slot,) = finished_slots(world.event_log)
    assert slot == "digits-ul-text-fpl/0/seed=1"


def test_seeds_that_share_no_computation_are_jobs_of_their_own(world):
    visual = sweep("fpl", seeds=(1, 2, 3), fixed={"modality": "visual"})
    driver = world.driver(visual)
    jobs = [driver.next() for _ in range(3)]
    assert [job.slots for job in jobs] == [
        (f"digits-ul-visual-fpl/0/seed={seed}",) for seed in (1, 2, 3)
    ]
    assert driver.next() is None
    assert not driver.finished
    for job in jobs:
        driver.complete(job.number, dict.fromkeys(job.keys, Failure("data", "lost")))
    assert world.states() == ["failed"] * 3
    assert driver.peek() is None
    assert driver.finished


def test_a_job_has_no_more_texts_than_go_together(world):
    driver = world.driver(sweep("grip", seeds=range(30)))
    jobs = [driver.next(), driver.next()]
    assert [len(job.trials) for job in jobs] == [25, 5]  # 10 names each; 256 texts


def test_a_cell_whose_images_are_not_there_waits_and_the_others_go_on(world):
    cells, there = cells_of(sweep("cpl", "fpl", seeds=(1,))), {"digits-ul-text-fpl"}
    rank = {cell.id: place for place, cell in enumerate(cells)}
    more = (lambda under_way: True, lambda spec: None, {}, lambda cell: cell.id in there, rank)
    driver = world.driver(sweep("cpl", "fpl", seeds=(1,)), *more)
    first = driver.next()
    assert first.cell == "digits-ul-text-fpl"
    assert driver.next() is None
    driver.complete(first.number, dict.fromkeys(first.keys, Failure("data", "lost")))
    assert driver.next() is None
    assert not driver.finished
    there.add("digits-ul-text-cpl")
    second = driver.next()
    assert second.cell == "digits-ul-text-cpl"
    driver.complete(second.number, dict.fromkeys(second.keys, Failure("data", "lost")))
    assert driver.peek() is None
    assert driver.finished


def test_of_cells_that_are_ready_the_first_in_rank_comes_first(world):
    cells = cells_of(sweep("cpl", "fpl", seeds=(1,)))
    rank = {cell.id: -place for place, cell in enumerate(cells)}
    more = (lambda under_way: True, lambda spec: None, {}, lambda cell: True, rank)
    driver = world.driver(sweep("cpl", "fpl", seeds=(1,)), *more)
    assert [driver.next().cell for _ in cells] == [cell.id for cell in reversed(cells)]


def test_what_fails_beside_others_is_tried_again_alone(world):
    driver = world.driver(sweep("grip", seeds=(1, 2, 3)))
    job = driver.next()
    lost = job.keys[2]
    for spec, key in zip(job.trials, job.keys, strict=True):
        if key != lost:
            run_trial(spec, world.store)
    driver.complete(job.number, {lost: Failure("infra", "the process that ran it died")})
    assert world.states() == ["done"] * 2
    again = driver.next()
    assert (again.keys, again.point) == ((lost,), job.point)
    driver.complete(again.number, world.run(again))
    assert world.states() == ["done"] * 3
    assert driver.next() is None


# ---------------------------------------------------------------- pruning


def pruning(rule: Any = "halving", points: int = 8, width: int = 4, **more: Any) -> SweepSpec:
    """Rounds of four lengths, three iterations each, compared after the first and the second."""
    lengths = (Dimension(key="prompt.length", values=(1, 2, 3, 4, 5, 6, 7, 8)),)
    search = Search(
        sampler="grid",
        points=points,
        width=width,
        space=lengths,
        pruning=Pruning(rule=rule, rungs=(1, 2)),
    )
    return sweep("grip", search=search, fixed={"iterations": 3}, **more)


def pruned_at(world: World) -> dict[int, int]:
    """The rung of each point that was pruned."""
    found = {o.slot.point: o.pruned.rung for o in world.outcomes if o.pruned is not None}
    return dict(sorted(found.items()))


def decisions(world: World) -> list[tuple[int, dict[str, float], list[int]]]:
    events = [e for e in world.event_log.events() if e["event"] == "rung_decided"]
    return [(e["rung"], e["values"], e["pruned"]) for e in events]


def in_some_order(
    world: World, driver: TrialScheduler, pick: Callable[[list[Job]], int]
) -> list[Job]:
    """Run all, with as many jobs at a time as there are; `pick` says which ends next."""
    running: list[Job] = []
    every: list[Job] = []
    while not driver.finished:
        while (job := driver.next()) is not None:
            running.append(job)
            every.append(job)
        if running:
            job = running.pop(pick(running))
            driver.complete(job.number, world.run(job))
    return every


@pytest.fixture
def fits(monkeypatch) -> list[int]:
    """Grows by one with each iteration of a trial."""
    fit, found = side_by_side.fit, []
    monkeypatch.setattr(
        side_by_side, "fit", lambda asked: found.extend([1] * len(asked)) or fit(asked)
    )
    return found


@pytest.mark.parametrize("rule", ["halving", "median"])
def test_the_same_points_are_pruned_in_whatever_order_trials_end(
    world, tmp_path, prepared, resolver, rule
):
    spec = pruning(rule, seeds=(1, 2))
    in_some_order(world, world.driver(spec), lambda running: 0)
    assert pruned_at(world)
    other = World(tmp_path / "other", prepared, resolver)
    in_some_order(other, other.driver(spec), lambda running: len(running) - 1)
    assert decisions(other) == decisions(world)
    assert pruned_at(other) == pruned_at(world)
    assert other.told() == world.told()


def test_half_of_a_round_stops_at_each_rung_and_the_default_goes_on(world, fits):
    jobs = world.run_all(world.driver(pruning(seeds=(1,))))
    (first, of_first, gone), (second, of_second, _), *_ = decisions(world)
    assert (first, second) == (1, 2)
    assert of_first.keys() == {"0", "1", "2", "3"}
    best = sorted(of_first, key=lambda number: (-of_first[number], int(number)))[:2]
    assert sorted(gone) == sorted(set(range(4)) - {0, *map(int, best)})
    assert of_second.keys() == {str(n) for n in range(4) if n not in gone}
    # The values are those of the trials at that iteration, and nobody computes one twice.
    stopped = pruned_at(world)
    assert 0 not in stopped
    assert len(fits) == sum(stopped.get(number, 3) for number in range(8)) < 8 * 3
    assert [job.segments.until for job in jobs if job.point == 0] == [1, 2, None]
    assert sum(job.share for job in jobs if job.point == 0) == pytest.approx(1)


def test_the_sampler_hears_of_a_pruned_point_and_where_it_stood(world):
    world.run_all(world.driver(pruning(seeds=(1,))))
    stopped = pruned_at(world)
    values = {(rung, n): v for rung, of, _ in decisions(world) for n, v in of.items()}
    for trial in world_study(world):
        number = trial.user_attrs["point"]
        if number in stopped:
            assert trial.state == TrialState.PRUNED
            rung = stopped[number]
            assert trial.intermediate_values == {rung: values[rung, str(number)]}
        else:
            assert trial.state == TrialState.COMPLETE
            assert trial.value == mean_of(world, number)
    told = [e for e in world.event_log.events() if e["event"] == "round_told"]
    assert sorted(n for event in told for n in event["pruned"]) == list(stopped)


def mean_of(world: World, number: int) -> float:
    records = [o.record for o in world.outcomes if o.slot.point == number]
    return sum(record.objectives["mutual_information"] for record in records) / len(records)


def test_pruned_points_are_counted_by_the_plan_and_are_not_run_again(world):
    spec = pruning(seeds=(1, 2))
    world.run_all(world.driver(spec))
    plan = plan_sweep(spec, world.store, world.resolver, world.event_log)
    assert plan.total == 16
    assert len(plan.pruned) == 2 * len(pruned_at(world)) > 0
    assert plan.done + len(plan.pruned) == plan.total
    assert plan.to_run == 0
    points = {entry.point for entry in entries_of(plan, world.store)}
    assert points == set(range(8)) - pruned_at(world).keys()
    # A seed that is added goes to the points that went on.
    more = pruning(seeds=(1, 2, 3))
    plan = plan_sweep(more, world.store, world.resolver, world.event_log)
    assert plan.to_run == 8 - len(pruned_at(world))
    jobs = world.run_all(world.driver(more))
    assert len(jobs) == plan.to_run
    assert {job.segments.until for job in jobs} == {None}


def test_a_point_with_a_failed_trial_is_not_compared_and_ends_with_what_it_has(world):
    spec = pruning(seeds=(1, 2), points=4)
    driver = world.driver(spec)
    jobs = world.run_all(driver, lambda s: s.seed == 2 and s.prompt.length == 2)
    (_, values, _), *_ = decisions(world)
    lost = {j.point for j in jobs for s in j.trials if s.prompt.length == 2}
    assert len(lost) == 1
    assert not {str(n) for n in lost} & values.keys()
    assert [o.state for o in world.outcomes if o.slot.point in lost] == ["failed", "done"]
    assert [value for number, _, value in world.told() if number in lost] == [None]


def test_what_another_sweep_ran_whole_is_pruned_like_the_rest(
    world, tmp_path, prepared, resolver, fits
):
    """Or the same seed would prune other points in a store that is not empty."""
    world.run_all(world.driver(pruning(seeds=(1,), points=4)))
    other = World(tmp_path / "whole", prepared, resolver)
    spec = pruning(seeds=(1,), points=4)
    whole = replace(spec, search=replace(spec.search, pruning=None))
    other.run_all(other.driver(whole))
    other.event_log = EventLog(tmp_path / "another")
    other.event_log.folder.mkdir()
    before = len(fits)
    other.run_all(other.driver(spec))
    assert decisions(other) == decisions(world)
    assert len(fits) - before == 4 + 2  # to each rung, and no further


def test_a_search_that_no_longer_prunes_takes_over_what_was_run_whole(world, fits):
    spec = pruning(seeds=(1,), points=4)
    world.run_all(world.driver(spec))
    paid = len(fits)
    whole = replace(spec, search=replace(spec.search, pruning=None))
    assert plan_sweep(whole, world.store, world.resolver, world.event_log).pruned == {}
    world.run_all(world.driver(whole))
    assert world.states().count("pruned") == 0
    assert len(fits) == 4 * 3  # pruned trials went on from where they had stopped
    assert paid < len(fits)


# ---------------------------------------------------------------- images


def test_trials_read_images_that_were_drawn_before(world, drawn_digits):
    fixed = {"generator": f"folder:{drawn_digits}", "images_per_class": 8, "iterations": 1}
    driver = world.driver(sweep("zero_shot_aux", "air", seeds=(1,), fixed=fixed))
    worker = WorkerContext(world.store)
    jobs = [driver.next(), driver.next()]
    row = jobs[0].trials[0].synthetic_features
    assert row == jobs[1].trials[0].synthetic_features
    generator = open_generator(row.images, worker)
    for c in range(10):
        build_image_block(row, c, 0, worker, lambda: generator)
    for job in jobs:
        driver.complete(job.number, world.run(job))
    assert world.states() == ["done", "done"]
    for outcome in world.outcomes:
        assert outcome.record.metrics["synthetic/images"] == 80
        assert outcome.record.metrics["test/accuracy_auxiliary"] > 0.3  # chance is 0.1

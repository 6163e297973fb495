"""Plans: what a sweep needs, what exists and what is left; and a run executes its plan."""

from __future__ import annotations

import json
import math
import random
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from air_core.datasets import get_dataset
from air_core.methods import EMBEDDED
from air_core.settings import Ref
from air_core.settings.normal import normalised
from orchestrator.execution._scheduler import TrialScheduler
from orchestrator.failures import Failure
from orchestrator.keys import artifact_key
from orchestrator.planning import Plan, Requirement, Resolver, requirements_of
from orchestrator.planning.checks import unschedulable_reason
from orchestrator.planning.estimate import START, Measured, Work, estimate, record_measurements
from orchestrator.planning.history import read_history
from orchestrator.planning.plan import plan_sweep
from orchestrator.planning.requirements import BASE_PER_CLASS
from orchestrator.planning.search import CellSearch, open_searches, study_of
from orchestrator.spec import Dimension, Resources, SweepSpec, cells_of, presets
from orchestrator.spec.resources import GeneratorResources, TrialResources
from orchestrator.spec.sweep import Search, Seeds, smoke_variant
from orchestrator.stages import TrialSpec, trial_of
from orchestrator.store import ArtifactStore, EventLog
from tests.helpers.dataset_trees import draw as draw_picture
from tests.helpers.trivial import pixel_png

Measure = Callable[[TrialSpec], dict[str, float]]
OBJECTIVES = ("mutual_information", "validation_accuracy")
REFS = {name: Ref(name="tiny", digest=name) for name in EMBEDDED}
CLASSES = ("zero", "one")


def trial(method: str = "air", **changes: Any) -> TrialSpec:
    """A trial with drawn images and inputs that do not exist."""
    flat = {n: v for n, v in presets.defaults(method, {}).items() if n not in REFS}
    return trial_of(
        {**flat, **{k.replace("__", "."): v for k, v in changes.items()}}, REFS, CLASSES
    )


def seeds(*numbers: int) -> Seeds:
    return Seeds(values=tuple((number,) for number in numbers))


class World:
    """A store, an event log and ready images in one folder."""

    def __init__(self, folder: Path, pictures: Path, resolver: Resolver | None = None) -> None:
        self.store = ArtifactStore(folder / "runs")
        self.event_log = EventLog(folder / "sweep")
        self.event_log.folder.mkdir(parents=True)
        self.searches: dict[str, CellSearch] = {}
        self.resolver = resolver or Resolver(folder / "digests.json", None)
        self.pictures = f"folder:{pictures}"
        # The objectives of a trial.
        self.measured: Measure = lambda spec: dict.fromkeys(OBJECTIVES, 1.0)

    def sweep(self, *methods: str, **parts: Any) -> SweepSpec:
        fixed = {"generator": self.pictures, **parts.pop("fixed", {})}
        grid = parts.pop("grid", {})
        if len(methods) > 1:
            return SweepSpec(name="x", grid={"method": methods, **grid}, fixed=fixed, **parts)
        return SweepSpec(name="x", grid=grid, fixed={"method": methods[0], **fixed}, **parts)

    def plan(self, sweep: SweepSpec) -> Plan:
        return plan_sweep(sweep, self.store, self.resolver, self.event_log)

    def finish(self, trials: Iterable[TrialSpec]) -> None:
        """Write the record of trials."""
        for spec in map(normalised, trials):
            info = {"metrics": {"test/accuracy": 0.5}, "curves": {}, "per_class": []}
            info["objectives"] = self.measured(spec)
            self.store.get_or_build(spec, lambda folder, info=info: info)

    def scheduler(self, sweep: SweepSpec) -> TrialScheduler:
        self.searches = {}
        if sweep.search is not None:
            self.searches = open_searches(self.plan(sweep))
        parts = self.store, self.resolver, self.event_log, read_history(self.event_log)
        return TrialScheduler(sweep, [cells_of(sweep)], self.searches, *parts, self.log)

    def log(self, outcome: Any) -> None:
        if not outcome.already_logged:
            event: dict[str, Any] = {"slot": outcome.slot.id, "key": outcome.slot.key.digest}
            self.event_log.append(f"trial_{outcome.state}", cell=outcome.slot.cell.id, **event)

    def run(self, sweep: SweepSpec) -> int:
        """Run a sweep to its end and count its trials."""
        scheduler = self.scheduler(sweep)
        handed: set[str] = set()
        while (job := scheduler.next()) is not None:
            handed |= set(job.keys)
            self.finish(job.trials)
            scheduler.complete(job.number, {})
        assert scheduler.is_complete
        return len(handed)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """120 ready images per class, of one pixel."""
    folder, pixel = tmp_path_factory.mktemp("pictures"), pixel_png()
    for name in get_dataset("digits").classnames:
        (folder / name).mkdir()
        for index in range(120):
            (folder / name / f"{index}.png").write_bytes(pixel)
    return folder


@pytest.fixture
def world(tmp_path, pictures) -> World:
    return World(tmp_path, pictures)


def counts(plan: Plan) -> tuple[int, ...]:
    """All trials; those that are done, reused, shared and recovered; those to run."""
    assert plan.total == sum(plan.results.values()) + plan.to_run
    return plan.total, *plan.results.values(), plan.to_run


# ---------------------------------------------------------------- trials


def test_trials_of_this_sweep_are_done_and_trials_of_others_are_reused(world):
    sweep = world.sweep("fpl", seeds=seeds(1, 2, 3))
    first, second, _ = world.plan(sweep).slots
    world.finish([first.spec, second.spec])
    assert counts(world.plan(sweep)) == (3, 0, 2, 0, 0, 1)
    world.event_log.append("trial_done", slot=first.id, key=first.key.digest)
    assert counts(world.plan(sweep)) == (3, 1, 1, 0, 0, 1)
    assert world.plan(sweep).ended == 1
    world.event_log.append("trial_reused", slot=second.id, key=second.key.digest)
    assert counts(world.plan(sweep)) == (3, 1, 1, 0, 0, 1)
    assert world.plan(sweep).ended == 2


def test_results_of_a_killed_run_are_recovered_before_and_after_the_next_run(world):
    sweep = world.sweep("fpl", seeds=seeds(1, 2))
    job = world.scheduler(sweep).next()
    world.finish(job.trials)  # the driver is killed before it logs them
    assert counts(world.plan(sweep)) == (2, 0, 0, 0, 2, 0)
    assert world.run(sweep) == 0
    assert counts(world.plan(sweep)) == (2, 0, 0, 0, 2, 0)


def test_a_slot_whose_key_changed_is_to_run(world):
    sweep = world.sweep("fpl", seeds=seeds(1))
    world.run(sweep)
    assert counts(world.plan(sweep)) == (1, 1, 0, 0, 0, 0)
    changed = world.sweep("fpl", seeds=seeds(1), fixed={"prompt.length": 4})
    assert world.plan(changed).slots[0].id == world.plan(sweep).slots[0].id
    assert counts(world.plan(changed)) == (1, 0, 0, 0, 0, 1)


def test_results_that_an_edit_moves_to_other_slots_are_done(world):
    world.run(world.sweep("zero_shot", "fpl", seeds=seeds(1, 2)))
    edited = world.sweep("zero_shot", "fpl", seeds=seeds(2, 3), grid={"prompt.length": (16,)})
    assert counts(world.plan(edited)) == (4, 2, 0, 1, 0, 1)


def test_a_plan_without_work_needs_no_machine(world):
    sweep = world.sweep("fpl", seeds=seeds(1))
    assert unschedulable_reason(world.plan(sweep), world.store, [])
    world.run(sweep)
    finished = replace(world.plan(sweep), requirements=())
    assert unschedulable_reason(finished, world.store, []) is None


def test_trials_of_a_large_pool_reserve_memory_unless_the_file_sets_it(
    world, tmp_path, monkeypatch
):
    for name in ("cat", "dog"):
        for number in range(10):
            draw_picture(tmp_path / "pets" / "train" / name / f"{number}.png")
        draw_picture(tmp_path / "pets" / "test" / name / "0.png")
    dataset = {"dataset": f"folder:{tmp_path / 'pets'}"}
    sweep = world.sweep("fpl", seeds=seeds(1, 2), fixed=dataset)
    assert world.plan(sweep).sweep.resources == Resources()
    monkeypatch.setattr("orchestrator.planning.resources.LARGE", 1)
    arrays = 4 * 4 * 18 * 2 * 2  # 18 images, two classes, two seeds; 2 are for validation
    assert world.plan(sweep).sweep.resources.trial.memory == arrays + 2**30
    given = replace(sweep, resources=Resources(trial=TrialResources(memory=0)))
    assert world.plan(given).sweep.resources == given.resources


def test_the_states_are_those_of_the_trials_of_the_edited_file(world):
    world.run(world.sweep("zero_shot", "fpl", seeds=seeds(1, 2)))
    edited = world.sweep("fpl", seeds=seeds(1, 2, 3), fixed={"prompt.length": 4})
    first, second, third = world.plan(edited).slots
    world.finish([first.spec])
    failed = {"slot": second.id, "key": second.key.digest}
    world.event_log.append("trial_failed", failure_class="nan", message="no", **failed)
    world.event_log.append("trials_started", slots=[third.id])
    for alive, state in ((True, "running"), (False, "waiting")):
        plan = replace(world.plan(edited), alive=alive)
        assert [*plan.states.values()] == ["reused", "failed", state]
        assert plan.failures[second.id]["message"] == "no"


def test_a_failure_after_success_is_to_run_again_once_its_record_is_gone(world):
    sweep = world.sweep("fpl", seeds=seeds(1))
    world.run(sweep)
    (slot,) = world.plan(sweep).slots
    world.event_log.append("trial_failed", slot=slot.id, key=slot.key.digest)
    assert counts(world.plan(sweep)) == (1, 1, 0, 0, 0, 0)
    assert world.plan(sweep).ended == 0
    (world.store.get(slot.spec).path / "record.json").unlink()
    assert counts(world.plan(sweep)) == (1, 0, 0, 0, 0, 1)


# ---------------------------------------------------------------- artifacts


def stages(requirements: Iterable[Requirement]) -> list[str]:
    return [requirement.stage for requirement in requirements]


def test_a_trial_with_images_needs_their_inputs_in_build_order():
    requirements = requirements_of([trial()])
    assert stages(requirements) == ["features", "labels", "lora", "images", "images"]
    assert [requirement.images for requirement in requirements[-2:]] == [120, BASE_PER_CLASS]
    assert requirements[-1].spec.images.lora is None  # to measure what LoRA changes


def test_seeds_methods_and_fusion_weights_share_one_row():
    trials = [
        trial(method, seed=seed, fusion_weight=weight)
        for method in ("air", "air_grip", "air_fpl")
        for seed in (1, 2, 3)
        for weight in (0.2, 0.8)
    ]
    assert requirements_of(trials) == requirements_of(trials[:1])


def test_a_sweep_of_counts_needs_only_the_largest():
    trials = [trial(images_per_class=count, lora=None) for count in (25, 120, 50)]
    *_, row = requirements_of(trials)
    assert stages(requirements_of(trials)).count("images") == 1
    assert row.images == 120
    assert len(row.shards()) == 8 * len(CLASSES)  # ceil(120 / 16) blocks a class


@pytest.mark.parametrize(
    ("dimension", "images"),
    [
        (Dimension(key="images_per_class", min=0, max=11), [11]),
        (Dimension(key="fusion_weight", values=(0.0, 0.5)), [16]),
        (Dimension(key="auxiliary.source", values=("real", "synthetic")), [16]),
        (Dimension(key="auxiliary.source", values=("real",)), []),
        (Dimension(key="prompt.length", min=4, max=16), [16]),
    ],
)
def test_a_search_needs_the_images_that_any_of_its_points_may_read(world, dimension, images):
    search = Search(points=3, space=(dimension,))
    fixed = {"images_per_class": 16, "synthetic_weight": 0.0}
    fixed.pop(dimension.key, None)
    plan = world.plan(world.sweep("air", search=search, fixed=fixed))
    assert [
        requirement.images for requirement in plan.requirements if requirement.stage == "images"
    ] == images


def test_an_artifact_is_missing_partial_or_present(world):
    sweep = world.sweep("air", fixed={"images_per_class": 16})
    plan = world.plan(sweep)
    row = plan.requirements[-1]

    def states() -> list[tuple[str, str, int, int]]:
        found = world.plan(sweep).json(world.store)["artifacts"]
        return [(a["stage"], a["state"], a["have"], a["need"]) for a in found]

    assert states() == [("features", "missing", 0, 1), ("images", "missing", 0, 20)]
    world.store.get_or_build(plan.requirements[0].spec, lambda folder: {})
    images, features = world.store.open_row(row.spec.images), world.store.open_row(row.spec)
    images.shard(0, 0).touch()
    assert states()[1][1:3] == ("missing", 0)  # a block needs images and features
    features.shard(0, 0).touch()
    assert states() == [("features", "present", 1, 1), ("images", "partial", 1, 20)]
    assert (0, 0) not in row.missing(world.store)
    for c, block in row.missing(world.store):
        images.shard(c, block).touch()
        features.shard(c, block).touch()
    assert states()[1] == ("images", "present", 20, 20)
    assert row.missing(world.store) == []


# ---------------------------------------------------------------- time


def test_an_estimate_is_a_guess_until_the_store_has_measurements_of_its_kind(world):
    gpus = Resources(trial=TrialResources(gpu=0.5), generator=GeneratorResources(gpu=1))
    fixed = {"images_per_class": 16, "iterations": 3, "train.steps": 100}
    sweep = world.sweep("air", "fpl", fixed=fixed, seeds=seeds(1, 2), resources=gpus)
    guess = world.plan(sweep)
    assert guess.estimate.seconds > 0
    assert "no measurements yet" in guess.estimate.reason
    world.store.root.mkdir()
    paces = {
        "features": Measured(50.0, 5.0),
        "images": Measured(2.5, 5.0),
        "trials": Measured(0.1, 10.0, startup=15.0, starts=5.0),
    }
    *works, last = guess.work
    assert (len(works), len({work.name for work in guess.work})) == (3, 4)  # two kinds of trials
    record_measurements(world.store, {work.name: paces[work.stage] for work in works})
    assert "top_k" in world.plan(sweep).estimate.reason  # the other kind of trial
    seven = Measured(0.0, 5.0, startup=14.0, starts=2.0)
    record_measurements(world.store, {last.name: seven, START.name: Measured(9.0, 1.0)})
    found = world.plan(sweep).estimate
    assert found.reason == ""
    drawn = 0.5 * 20 * 8  # blocks of eight
    trials = 2 * (3 + 300 * 0.01) + 2 * 7
    assert found.seconds == pytest.approx(9 + 10 + drawn + trials)
    assert found.gpu_hours == pytest.approx((drawn + 0.5 * (10 + trials)) / 3600)
    smoke = ArtifactStore(Path(f"{world.store.root}-smoke"))
    smoke.root.mkdir()
    images = next(work for work in guess.work if work.stage == "images")
    for pace, fastest in ((1.0, 0.5), (0.1, 0.1), (0.3, 0.1)):  # the fastest measurement counts
        record_measurements(smoke, {images.name: Measured(8 * pace, 8)})
        assert world.plan(sweep).estimate.stages["images"] == pytest.approx(fastest * 160)
    world.run(sweep)
    assert world.plan(sweep).estimate.seconds == 0


def arbitrary(spec: TrialSpec) -> dict[str, float]:
    """Objectives that differ between trials."""
    return dict.fromkeys(OBJECTIVES, random.Random(artifact_key(spec).digest).random())


def test_a_study_has_the_points_of_one_cell_with_values_and_states(world):
    space = (Dimension(key="fusion_weight", values=(0.2, 0.4, 0.8)),)
    search = Search(sampler="grid", points=3, width=1, space=space)
    sweep = world.sweep("air", "air_grip", search=search, seeds=seeds(1, 2))
    scheduler = world.scheduler(sweep)
    world.measured = arbitrary
    with pytest.raises(ValueError, match="x has 2 searched cells; give `cell`; allowed: digits-"):
        study_of(world.plan(sweep), world.store, None)
    values: dict[str, list[float]] = {}
    while (job := scheduler.next()) is not None and job.point < 2:
        if failures := {key: Failure("data", "") for key in job.keys if job.point == 1}:
            scheduler.complete(job.number, failures)
            continue
        world.finish(job.trials)
        values[job.cell] = [world.measured(spec)[search.objective] for spec in job.trials]
        scheduler.complete(job.number, {})
    for name, of_cell in values.items():
        study = study_of(world.plan(sweep), world.store, name)
        assert study.direction.name == "MAXIMIZE"
        assert [(t.params["fusion_weight"], t.value) for t in study.trials] == [
            (0.8, fmean(of_cell)),  # the default
            (0.2, None),
            (0.4, None),
        ]
        states = [trial.state.name for trial in study.trials]
        assert states == ["COMPLETE", "FAIL", "RUNNING" if name == job.cell else "WAITING"]
        assert study.trials[2].distributions == study.best_trial.distributions
    assert len(values) == 2
    with pytest.raises(ValueError, match="x has no searched cell 'b'; give `cell`; allowed: digi"):
        study_of(world.plan(sweep), world.store, "b")
    with pytest.raises(ValueError, match="x has no search"):
        study_of(world.plan(world.sweep("air")), world.store, None)


def test_the_work_of_gpus_and_large_models_has_no_seconds_before_it_is_measured(world):
    def seconds(gpu: float = 0.0, kind: str = "tiny 32px") -> float:
        resources = Resources(generator=GeneratorResources(gpu=gpu))
        return estimate([Work("images", kind, 300)], world.store, resources).work_seconds

    assert seconds() == seconds(kind="") == pytest.approx(300 * 0.03)
    assert seconds(gpu=1.0) == seconds(kind="sd 512px") == math.inf
    world.store.root.mkdir(exist_ok=True)
    record_measurements(world.store, {"images: tiny 32px": Measured(100.0, 100.0)})
    assert seconds() == seconds(gpu=1.0) == 300


EPOCHS = {"iterations": 2, "train.steps": None, "train.epochs": 5, "train.batch": 20}
SELECTED = {**EPOCHS, "pseudo_labels.kind": "top_k", "pseudo_labels.growth": "fixed"}
LORA = {"generator": "tiny", "lora.batch": 8, "lora.passes": 3, "initial_labels.k": 6}
EVIDENCE = {"generator": "tiny", "evidence.draws": 4, "evidence.block": 8}


@pytest.mark.parametrize(
    ("method", "fixed", "stage", "units", "smoke_units"),
    [
        ("air", LORA, "lora", math.ceil(3 * 6 * 10 / 8), 2),  # passes over 6 images of ten classes
        ("air", LORA, "images", 128 * 10, 16 * 10),  # blocks of 16
        ("cpl", EPOCHS, "trials", 5 * (1077 / 2 + 1077) / 20, 10),  # half of the pool, then all
        ("pseudo", SELECTED, "trials", 2 * 5 * 16 * 10 / 20, 10),  # 16 images of ten classes
        ("cpl_real_evidence", EVIDENCE, "evidence", 4 * 1080, 4 * 32),  # draws x blocks of eight
    ],
)
def test_the_work_of_a_smoke_run_is_of_the_same_kind_and_small(
    world, method, fixed, stage, units, smoke_units
):
    sweep = world.sweep(method, fixed=fixed, seeds=seeds(1))
    whole, smoke = (
        next(work for work in world.plan(some).work if work.stage == stage)
        for some in (sweep, smoke_variant(sweep))
    )
    assert (whole.units, smoke.units) == (pytest.approx(units), smoke_units)
    assert whole.kind == smoke.kind


def test_pruned_evidence_is_work_of_another_kind(world):
    def kind(**settings: Any) -> str:
        plan = world.plan(world.sweep("cpl_real_evidence", fixed={**EVIDENCE, **settings}))
        return next(work.kind for work in plan.work if work.stage == "evidence")

    assert kind() != kind(**{"evidence.prune_after": 1})


def test_the_estimate_includes_trials_of_a_search_that_has_not_started(world):
    search = Search(points=5, space=(Dimension(key="fusion_weight", min=0.0, max=1.0),))
    sweep = world.sweep("air", search=search, seeds=seeds(1, 2), fixed={"images_per_class": 16})
    plan = world.plan(sweep)
    assert not plan.slots
    [trials] = [work for work in plan.work if work.stage == "trials"]
    assert (trials.starts, trials.jobs) == (10, 5)
    assert plan.estimate.stages["trials"] > 0


def test_the_json_of_a_plan_has_counts_artifacts_and_estimate(world):
    found = world.plan(world.sweep("zero_shot", seeds=seeds(1, 2))).json(world.store)
    assert (found["cells"], found["points"]) == (1, 1)
    results = {"done": 0, "reused": 0, "shared": 1, "recovered": 0}
    assert found["trials"] == {"total": 2, **results, "to_run": 1}
    (features,) = found["artifacts"]
    assert features["stage"] == "features"
    assert features["key"].startswith("features/v1/digits-tiny-")
    assert found["estimate"].keys() >= {"seconds", "calibrated", "reason", "gpu_hours"}
    assert json.loads(json.dumps(found)) == found


# ---------------------------------------------------------------- a run executes its plan

METHODS = ["zero_shot", "zero_shot_aux", "fpl", "cpl", "air", "cpl_real"]
AXES = {
    "images_per_class": (0, 8, 16),
    "fusion_weight": (0.0, 0.5),
    "iterations": (0, 1, 2),
    "auxiliary.source": ("real", "synthetic"),
}


@st.composite
def sweeps(draw: Any, pictures: str) -> SweepSpec:
    """Small sweeps over keys that often make two cells, points or seeds the same computation."""
    methods = tuple(draw(st.lists(st.sampled_from(METHODS), min_size=2, max_size=3, unique=True)))
    axes = draw(st.permutations(sorted(AXES)))
    gridded, searched_ = axes[: draw(st.integers(0, 1))], axes[1 : 1 + draw(st.integers(0, 2))]
    search = None
    if searched_:
        space = tuple(Dimension(key=key, values=AXES[key]) for key in searched_)
        points, width = draw(st.integers(1, 6)), draw(st.integers(1, 3))
        search = Search(sampler="grid", points=points, width=width, space=space)
    return SweepSpec(
        name="x",
        grid={"method": methods, **{key: AXES[key] for key in gridded}},
        fixed={"generator": pictures},
        search=search,
        seeds=seeds(*range(draw(st.integers(1, 3)))),
    )


@settings(max_examples=100)
@given(st.data())
def test_a_run_executes_the_planned_number_of_trials(pictures, resolver, data):
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder), pictures, resolver)  # digests are computed once
        sweep = data.draw(sweeps(world.pictures))
        for slot in world.plan(sweep).slots:  # another sweep ran some of them
            if data.draw(st.integers(0, 4)) == 0:
                world.finish([slot.spec])
        plan = world.plan(sweep)
        assert plan.total == sum(plan.results.values()) + plan.to_run
        assert world.run(sweep) == plan.to_run
        after = world.plan(sweep)
        assert (after.total, after.to_run) == (plan.total, 0)
        assert after.ended == plan.total
        assert world.run(sweep) == 0

"""Image blocks on Ray Data, with real small images from a folder instead of a model."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch

from orchestrator.cluster.session import machines, waits_for_resources
from orchestrator.errors import MissingArtifact
from orchestrator.execution._allocation import Allocation
from orchestrator.execution._generation import GeneratorActor, _Generation, draw
from orchestrator.execution._prepare import prepare
from orchestrator.execution._progress import ProgressMonitor, ProgressReporter, report_working
from orchestrator.execution._state import PreparationContext
from orchestrator.keys import artifact_key
from orchestrator.planning import Requirement, requirements_of
from orchestrator.spec import Resources
from orchestrator.spec.resources import GeneratorResources
from orchestrator.stages import SyntheticFeaturesSpec
from orchestrator.stages.context import WorkerContext
from orchestrator.stages.images import FolderImages
from orchestrator.stages.synthetic import read_synthetic
from orchestrator.store import ArtifactStore
from tests.helpers.sweeps import wait_until

pytestmark = pytest.mark.ray


@pytest.fixture(autouse=True)
def pools_of_two(monkeypatch):
    """A second actor starts although it takes longer than the images."""
    monkeypatch.setattr("orchestrator.planning.estimate.PROCESS_START", 1e-3)


def row_requirement(resolver, folder, count: int) -> Requirement:
    flat = {"generator": f"folder:{folder}", "generation.size": 32, "images_per_class": count}
    trial = resolver.trial(flat)
    row = trial.synthetic_features
    assert isinstance(row, SyntheticFeaturesSpec)
    return Requirement(row, count, tuple(range(len(row.images.classnames))))


T = TypeVar("T")
NO_PROGRESS = SimpleNamespace(write=SimpleNamespace(remote=lambda *report: None))


def result_of(coroutine: Generator[None, None, T]) -> T:
    while True:
        try:
            next(coroutine)
        except StopIteration as end:
            return end.value
        time.sleep(0.01)


def context_of(
    store: ArtifactStore,
    listener: Any,
    resources: Resources | None = None,
    allocation: Allocation | None = None,
) -> PreparationContext:
    resources, progress = resources or Resources(), ProgressMonitor()
    allocation = allocation or Allocation(resources, machines)
    return PreparationContext(WorkerContext(store), resources, listener, allocation, progress.actor)


def run(requirement: Requirement, store: ArtifactStore, actors: int = 1) -> list[dict]:
    listener = Listener()
    resources = Resources(generator=GeneratorResources(actors=actors))
    result_of(draw([requirement], context_of(store, listener, resources)))
    return [facts for _, _, facts in listener.events.get("on_prepared", [])]


@pytest.fixture(scope="module")
def eight(ray_session, resolver, drawn_digits, tmp_path_factory) -> tuple[ArtifactStore, list]:
    """A store with the first eight images of each class, and the facts of its blocks."""
    store = ArtifactStore(tmp_path_factory.mktemp("eight"))
    return store, run(row_requirement(resolver, drawn_digits, 8), store, actors=2)


@pytest.fixture
def copied(eight, tmp_path) -> ArtifactStore:
    """A copy of the store that a test may change."""
    shutil.copytree(eight[0].root, tmp_path / "copied")
    return ArtifactStore(tmp_path / "copied")


def test_only_missing_blocks_are_drawn(eight, copied, resolver, drawn_digits):
    assert len(eight[1]) == 10
    few, many = (
        row_requirement(resolver, drawn_digits, 8),
        row_requirement(resolver, drawn_digits, 16),
    )
    first = read_synthetic(few.spec, 8, copied)
    blocks = run(many, copied)
    assert sorted((b["class"], b["block"]) for b in blocks) == [(c, 1) for c in range(10)]
    assert sum(b["drawn"] for b in blocks) == 80
    assert run(many, copied) == []
    again = read_synthetic(many.spec, 8, copied)
    assert (again.batch.features == first.batch.features).all()
    assert read_synthetic(many.spec, 16, copied).labels.bincount().tolist() == [16] * 10


@pytest.mark.parametrize(("max_wait", "sizes"), [(0.0, [2, 1]), (1e6, [2])])
def test_a_pool_with_much_left_shrinks_when_trials_start_and_no_block_counts_as_killed(
    ray_session, resolver, drawn_digits, tmp_path, monkeypatch, max_wait, sizes
):
    monkeypatch.setattr("orchestrator.execution._generation.MAX_POOL_WAIT", max_wait)
    requirement, store = row_requirement(resolver, drawn_digits, 16), ArtifactStore(tmp_path)
    resources = Resources(generator=GeneratorResources(actors=2, reserve=1))
    allocation = Allocation(resources, machines)

    class TrialStarter(Listener):
        def on_prepared(self, *arguments):
            super().__getattr__("on_prepared")(*arguments)
            allocation.trials_running = True

    listener = TrialStarter()
    context = context_of(store, listener, resources, allocation)
    assert result_of(draw([requirement], context)) == []
    pools = [pool for (pool,) in listener.events["on_pool_closed"]]
    assert [pool.actors for pool in pools] == sizes  # the second has the reserve
    # Also blocks whose results were lost with the first pool are counted, once.
    facts = [facts for _, _, facts in listener.events["on_prepared"]]
    assert sum(f["drawn"] for f in facts) == 160 == len(requirement.classes) * 16
    assert len(facts) == requirement.total()
    assert requirement.missing(store) == []
    assert list(tmp_path.rglob("*.tries")) == []


def test_a_pool_grows_when_trials_end_and_each_block_counts_once(
    ray_session, resolver, drawn_digits, tmp_path, monkeypatch
):
    monkeypatch.setattr("orchestrator.execution._generation.MIN_STARTS", 0.0)
    requirement, store = row_requirement(resolver, drawn_digits, 16), ArtifactStore(tmp_path)
    resources = Resources(generator=GeneratorResources(actors=2, reserve=1))
    allocation = Allocation(resources, machines)
    allocation.trials_running = True

    class TrialEnder(Listener):
        def on_prepared(self, *arguments):
            super().__getattr__("on_prepared")(*arguments)
            allocation.trials_running = False

    listener = TrialEnder()
    assert result_of(draw([requirement], context_of(store, listener, resources, allocation))) == []
    ((pool,),) = listener.events["on_pool_closed"]
    assert (pool.actors, pool.images) == (2, 160)
    facts = [facts for _, _, facts in listener.events["on_prepared"]]
    assert sum(f["drawn"] for f in facts) == 160
    assert len(facts) == requirement.total()
    assert requirement.missing(store) == []


def test_a_block_that_cannot_be_drawn_is_named_and_the_others_are_drawn(
    copied, resolver, drawn_digits
):
    requirement = row_requirement(resolver, drawn_digits, 8)
    for c in (3, 4):
        copied.row(requirement.spec).shard(c, 0).unlink()
    row = copied.open_row(requirement.spec.images)
    killed = [row.count_crashes(3, 0) for _ in range(2)]
    for process in killed:
        process.__enter__()  # and never exits
    ((failed, failure),) = result_of(draw([requirement], context_of(copied, Listener())))
    assert (failed, failure.failure_class) == (requirement, "infra")
    assert "1 block is missing; digit three, block 0: " in failure.message
    assert requirement.missing(copied) == [(3, 0)]
    assert len(run(requirement, copied)) == 1  # the next start tries it again


def test_a_block_that_was_drawn_when_two_runs_were_killed_is_drawn_by_the_next_run(
    copied, resolver, drawn_digits
):
    requirement = row_requirement(resolver, drawn_digits, 8)
    copied.row(requirement.spec).shard(3, 0).unlink()
    row = copied.open_row(requirement.spec.images)
    killed = [row.count_crashes(3, 0) for _ in range(2)]
    for process in killed:
        process.__enter__()  # and never exits
    listener = Listener()
    result_of(prepare([requirement], context_of(copied, listener)))
    assert "on_failed" not in listener.events
    assert requirement.missing(copied) == []


def test_a_generator_short_of_memory_saves_memory_and_keeps_its_block_size(
    resolver, drawn_digits, tmp_path, monkeypatch
):
    requirement, store, tried = (
        row_requirement(resolver, drawn_digits, 8),
        ArtifactStore(tmp_path),
        [],
    )

    opened = FolderImages.open

    def short(images, worker):
        tried.append(worker.thrift)
        if worker.thrift == 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return opened(images, worker)

    monkeypatch.setattr(FolderImages, "open", short)
    actor = GeneratorActor([requirement], WorkerContext(store), NO_PROGRESS)
    for c in (0, 1):
        result = actor(batch_of((0, c, 0)))
        assert (result["error"], result["drawn"]) == ([""], [8])
    assert tried == [0, 1]  # the second block starts with the level that the first one needed


def test_waiting_for_a_block_of_another_process_reports_that_process(
    ray_session, resolver, drawn_digits, tmp_path
):
    requirement = row_requirement(resolver, drawn_digits, 8)
    worker = WorkerContext(ArtifactStore(tmp_path))
    key = artifact_key(requirement.spec.images)
    wait = (f"image blocks {key.slug}", "waiting")
    progress, reports = ProgressMonitor(), {}
    with ThreadPoolExecutor() as pool:
        with ArtifactStore(tmp_path).locks.exclusive(f"{key.digest}-3-0"):
            waiting = pool.submit(
                GeneratorActor([requirement], worker, progress.actor), batch_of((0, 3, 0))
            )
            wait_until(lambda: reports.update(progress.read()) or wait in reports)
        assert waiting.result()["drawn"] == [8]
    holder, seconds = reports[wait]
    assert str(os.getpid()) in holder
    assert seconds > 0


def test_an_artifact_that_cannot_be_made_is_reported_and_the_others_are_made(
    ray_session, resolver, drawn_digits, tmp_path
):
    broken = tmp_path / "broken"
    shutil.copytree(drawn_digits, broken)
    for file in broken.rglob("*.png"):  # the plan would refuse images without an end
        data = file.read_bytes()
        file.write_bytes(data[:45] + bytes(len(data) - 65) + data[-20:])
    whole = resolver.trial({"dataset": f"folder:{drawn_digits}", "images_per_class": 0})
    unreadable = resolver.trial({"dataset": f"folder:{broken}"})
    requirements = requirements_of([unreadable, whole])
    # LoRA and images depend on the features of the broken dataset.
    assert len({requirement.stage for requirement in requirements}) == 4
    listener = Listener()
    result_of(prepare(requirements, context_of(ArtifactStore(tmp_path / "s"), listener)))
    ((failed, failure),) = listener.events["on_failed"]
    assert failed.spec == unreadable.features
    assert (failure.failure_class, failure.message[:10]) == ("user", "ValueError")
    assert "images cannot be read" in failure.message
    assert [requirement.spec for requirement, *_ in listener.events["on_prepared"]] == [
        whole.features
    ]
    assert "on_retried" not in listener.events


def test_draws_of_a_block_that_need_each_other_are_made_by_one_actor(trial, tmp_path):
    settings = {"evidence__draws": 3, "evidence__block": 300}
    for pruned, sizes in ((1, [3, 3, 3, 3]), (None, [1] * 12)):
        spec = trial("cpl_evidence", evidence__prune_after=pruned, **settings)
        (errors,) = (r for r in requirements_of([spec]) if r.stage == "evidence")
        generation = _Generation([errors], context_of(ArtifactStore(tmp_path), Listener()))
        groups = list(generation._together(generation.untried_shards()))
        assert [len(group) for group in groups] == sizes
        assert all(len({block for _, _, block in group}) == 1 for group in groups)


def batch_of(*shards: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """The input of an actor for shards, each a row, class and block."""
    return {"shards": np.array([json.dumps(shards)])}


class Listener:
    """Records the arguments of each call by the name of the method."""

    def __init__(self) -> None:
        self.events: dict[str, list] = {}

    def __getattr__(self, name: str):
        return lambda *arguments: self.events.setdefault(name, []).append(arguments)


def test_a_blank_image_is_a_recorded_hole(resolver, drawn_digits, tmp_path):
    from PIL import Image

    folder = tmp_path / "blank"
    shutil.copytree(drawn_digits, folder)
    Image.new("RGB", (32, 32)).save(folder / "digit two" / "03.png")
    store = ArtifactStore(tmp_path / "store")
    requirement = row_requirement(resolver, folder, 8)
    actor = GeneratorActor([requirement], WorkerContext(store), NO_PROGRESS)
    made = actor(batch_of(*((0, c, 0) for c in range(10))))
    assert sum(made["holes"]) == 1
    assert read_synthetic(requirement.spec, 8, store).labels.bincount().tolist() == [
        8,
        8,
        7,
        *[8] * 7,
    ]
    table = pq.read_table(store.row(requirement.spec.images).shard(2, 0)).to_pydict()
    assert table["ok"] == [True, True, True, False, True, True, True, True]
    assert table["attempt"][3] == 2


def test_reading_missing_images_names_the_command_to_run(resolver, drawn_digits, tmp_path):
    requirement = row_requirement(resolver, drawn_digits, 8)
    with pytest.raises(MissingArtifact, match="airsweep run SPEC --prepare"):
        read_synthetic(requirement.spec, 8, ArtifactStore(tmp_path))


def test_progress_reports_of_a_worker_reach_the_driver(ray_session):
    def work(actor):
        reporter = ProgressReporter(actor, "LoRA a", "steps")
        reporter.last = time.monotonic() - 10  # long enough ago
        reporter(3, 10)
        reporter.last_curves, reporter.started = reporter.last - 10, 7.0
        reporter.report_curves({"train/loss": [0.5]})  # replaces no other report
        ProgressReporter(actor, "LoRA b").report_wait("its lock", "team/other", 60.0)
        with report_working(actor):
            time.sleep(0.5)

    progress, reports = ProgressMonitor(), {}
    ray.get(ray.remote(work).options(num_cpus=0).remote(progress.actor))
    wait_until(lambda: reports.update(progress.read()) or len(reports) == 4)  # does not block
    assert reports == {
        ("LoRA a", "progress"): (3, 10, "steps"),
        ("LoRA a", "curves"): ({"train/loss": [0.5]}, 7.0),
        ("LoRA b", "waiting"): ("team/other", 60.0),
        ("", "working"): (),
    }


def test_a_process_waits_for_resources_while_others_hold_them_all(ray_session):
    def hold(seconds):
        time.sleep(seconds)

    cores = int(ray.cluster_resources()["CPU"])
    task = ray.remote(hold).options(num_cpus=1)
    running = [task.remote(600) for _ in range(cores)]
    wait_until(lambda: ray.available_resources().get("CPU", 0) < 1)
    wait_until(lambda: not waits_for_resources())
    running.append(task.remote(600))
    wait_until(waits_for_resources)
    for future in running:
        ray.cancel(future, force=True)

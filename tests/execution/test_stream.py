"""Artifacts and shards on Ray, with real small images from a folder instead of a model."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from PIL import Image

from orchestrator.cluster.session import waits_for_resources
from orchestrator.execution._allocation import Allocation
from orchestrator.execution._progress import (
    ProgressActor,
    ProgressMonitor,
    ProgressReporter,
    report_working,
)
from orchestrator.execution._queue import Made, Row, Shard, WorkQueue
from orchestrator.execution._stream import ArtifactMaker, Stream, Workers
from orchestrator.failures import Failure
from orchestrator.keys import StageSpec, artifact_key
from orchestrator.planning import Requirement, requirements_of
from orchestrator.spec import Resources
from orchestrator.spec.resources import ENCODER_BATCH
from orchestrator.stages import SyntheticFeaturesSpec
from orchestrator.stages.context import WorkerContext
from orchestrator.stages.images import FolderImages
from orchestrator.stages.synthetic import read_synthetic
from orchestrator.store import ArtifactStore
from tests.execution.test_queue import Listener
from tests.helpers.sweeps import wait_until

pytestmark = pytest.mark.ray


UNREAD = SimpleNamespace(write=SimpleNamespace(remote=lambda *report: None))


def make(
    store: ArtifactStore, spec: StageSpec, shards: Sequence[Shard], batch: int = ENCODER_BATCH
) -> list[Made]:
    """Make shards in this process; nobody reads their progress."""
    maker = ArtifactMaker({}, WorkerContext(store, batch=batch), 0.0, UNREAD)
    return [maker.make(spec, *shard) for shard in shards]


def row_requirement(resolver, folder, count: int = 8) -> Requirement:
    flat = {"generator": f"folder:{folder}", "generation.size": 32, "images_per_class": count}
    trial = resolver.trial(flat)
    row = trial.synthetic_features
    assert isinstance(row, SyntheticFeaturesSpec)
    return Requirement(row, count, tuple(range(len(row.images.classnames))))


def test_a_larger_row_draws_its_missing_blocks_and_a_blank_image_is_a_recorded_hole(
    resolver, drawn_digits, tmp_path
):
    folder = shutil.copytree(drawn_digits, tmp_path / "blank")
    Image.new("RGB", (32, 32)).save(folder / "digit two" / "03.png")
    few, many = (row_requirement(resolver, folder, count) for count in (8, 16))
    store = ArtifactStore(tmp_path / "store")
    made = make(store, few.spec, few.missing(store))
    assert [each.facts["holes"] for each in made] == [0, 0, 1, *[0] * 7]
    first = read_synthetic(few.spec, 8, store)
    assert first.labels.bincount().tolist() == [8, 8, 7, *[8] * 7]
    table = pq.read_table(store.row(few.spec.images).shard(2, 0)).to_pydict()
    assert table["ok"] == [True, True, True, False, True, True, True, True]
    assert table["attempt"][3] == 2
    assert many.missing(store) == [(c, 1) for c in range(10)]
    made = make(store, many.spec, many.missing(store))
    assert ([each.facts["drawn"] for each in made], many.missing(store)) == ([8] * 10, [])
    again = read_synthetic(many.spec, 8, store)
    assert (again.images.features == first.images.features).all()
    assert len(read_synthetic(many.spec, 16, store).labels) == 159


def test_a_worker_uses_memory_again_that_it_has_freed(tmp_path):
    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        arrays = [np.ones(2**17) for _ in range(40)]  # 40 MiB, which are 10,240 pages
        del arrays
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    make(ArtifactStore(tmp_path), None, [])
    faults()
    assert faults() < 1024


def test_a_stream_gives_the_same_rows_again_until_it_ends():
    async def check() -> None:
        actor = ProgressActor()
        early = asyncio.create_task(actor.row("stream", 1))
        await actor.release("stream", {"block": 0})
        assert [await actor.row("stream", 0) for _ in range(2)] == [{"block": 0}] * 2
        assert not early.done()
        await actor.end("stream")
        assert await early is None
        assert [actor.begin("LoRA"), actor.begin("LoRA")] == [False, True]
        actor.finish("LoRA")
        assert not actor.begin("LoRA")

    asyncio.run(check())


def test_each_shard_is_a_row_and_an_actor_that_is_killed_makes_its_shard_again(
    ray_session, resolver, drawn_digits, tmp_path, monkeypatch
):
    requirement, store = row_requirement(resolver, drawn_digits), ArtifactStore(tmp_path)
    key = artifact_key(requirement.spec).digest
    names, passed = [], []
    read = Stream._read

    def recorded(stream: Stream, made: Any) -> None:
        names.append(made.name)

        def look(rows: pa.Table) -> pa.Table:
            passed.extend(rows.to_pylist())
            return rows

        batches = made.iter_batches
        made.iter_batches = lambda **how: map(look, batches(**how))
        read(stream, made)

    monkeypatch.setattr(Stream, "_read", recorded)
    progress = ProgressMonitor()
    stream = Workers(WorkerContext(store), Resources(), progress.actor).stream(
        "generator", 2, {key: requirement.spec}
    )
    reports: dict[Any, Any] = {}
    images = artifact_key(requirement.spec.images)
    wait, returned = (f"image blocks {images.slug}", "waiting"), []

    def is_reported() -> bool:
        reports.update(progress.read())
        return wait in reports

    def have_returned(count: int) -> bool:
        returned.extend(stream.returned())
        assert stream.problem is None
        return len(returned) == count

    with store.locks.exclusive(f"{images.digest}-0-0"):
        stream.release(Row(key, (0,), 0), 0)
        wait_until(is_reported)
        holder, seconds = reports[wait]
        assert str(os.getpid()) in holder
        assert seconds > 0
        for index in range(1, 10):  # the other actor makes these
            stream.release(Row(key, (index,), 0), 0)
            wait_until(lambda index=index: have_returned(index))
        processes = psutil.Process().children(recursive=True)
        actors = [each for each in processes if "ArtifactMaker" in " ".join(each.cmdline())]
        assert len(actors) == 2
        for process in actors:
            process.kill()
    wait_until(lambda: have_returned(10))
    stream.end()
    wait_until(lambda: not stream.is_alive())
    assert names == ["image_blocks"]
    assert [row["artifact"] for row in passed] == [f"image blocks {images.slug}"] * 10
    shards = {(row["of"], *row["indices"], row["block"]) for row in passed}
    assert shards == {(requirement.spec.name_of(index), index, 0) for index in range(10)}
    assert [made.facts["drawn"] for _, [made] in returned] == [8] * 10
    assert not requirement.missing(store)


def test_what_kills_its_processes_is_a_failure_until_the_next_run(resolver, drawn_digits, tmp_path):
    requirement, store = row_requirement(resolver, drawn_digits), ArtifactStore(tmp_path)
    killed = [store.open_row(requirement.spec.images).count_crashes(3, 0) for _ in range(2)]
    for process in killed:
        process.__enter__()  # and never exits
    failed, made = make(store, requirement.spec, [(3, 0), (4, 0)])
    assert failed.failure == Failure("infra", "RuntimeError: killed its process 2 times")
    assert (made.failure, made.facts["drawn"]) == (None, 8)
    workers = SimpleNamespace(worker=WorkerContext(store))
    WorkQueue([requirement], workers, Allocation(Resources(), lambda: []), Listener())
    assert make(store, requirement.spec, [(3, 0)])[0].facts["drawn"] == 8
    # The queue counts those of an artifact without shards.
    requirements = requirements_of([resolver.trial({"images_per_class": 8})])
    lora = next(each.spec for each in requirements if each.stage == "lora")
    (made,) = make(store, lora, [(0, 0, 0, True)])
    assert made.failure == Failure("infra", "RuntimeError: it killed its process")


def test_a_generator_short_of_memory_saves_memory_and_keeps_its_block_size(
    resolver, drawn_digits, tmp_path, monkeypatch
):
    requirement, store = row_requirement(resolver, drawn_digits), ArtifactStore(tmp_path)
    tried: list[int] = []

    opened = FolderImages.open

    def short(images, worker):
        tried.append(worker.thrift)
        if worker.thrift == 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return opened(images, worker)

    monkeypatch.setattr(FolderImages, "open", short)
    made = make(store, requirement.spec, [(0, 0), (1, 0)])
    assert [each.facts["drawn"] for each in made] == [8, 8]
    assert tried == [0, 1]  # the second block starts with the level that the first one needed


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


def test_of_the_messages_of_ray_only_losses_are_printed(ray_session, capsys):
    """Ray was imported before the session, as by a program that uses it itself."""
    for line in ("MapWorker.submit failed", "The node has been marked dead"):
        report = {"lines": [line], "pid": "raylet", "is_err": False}
        ray._private.worker.print_to_stdstream(report, ignore_prefix=False)
    assert capsys.readouterr() == ("(raylet) The node has been marked dead\n", "")


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

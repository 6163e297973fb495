"""Image blocks on Ray Data, with images from a folder: small, real, and no model to wait for."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch
from safetensors.numpy import load_file

from air_core.specs import SyntheticFeaturesSpec
from orchestrator.cluster.session import machines
from orchestrator.errors import MissingArtifact
from orchestrator.execution._allocation import Allocation, Context
from orchestrator.execution._generation import Generate, draw
from orchestrator.execution._prepare import prepare
from orchestrator.execution._progress import Note, Progress
from orchestrator.keys import artifact_key
from orchestrator.planning import Requirement, requirements_of
from orchestrator.spec import Resources
from orchestrator.spec.sweep import GeneratorResources
from orchestrator.stages.context import WorkerContext
from orchestrator.stages.image_rows import build_image_block, open_generator, read_synthetic
from orchestrator.store import ArtifactStore
from tests.helpers.sweeps import wait_until

pytestmark = pytest.mark.ray


def need_of(resolver, folder, count: int) -> Requirement:
    flat = {"generator": f"folder:{folder}", "generation.size": 32, "images_per_class": count}
    trial = resolver.trial(flat)
    row = trial.synthetic_features
    assert isinstance(row, SyntheticFeaturesSpec)
    return Requirement(row, count, tuple(range(len(row.images.classnames))))


T = TypeVar("T")


def result_of(coroutine: Generator[None, None, T]) -> T:
    while True:
        try:
            next(coroutine)
        except StopIteration as end:
            return end.value
        time.sleep(0.01)


def drawn(
    requirement: Requirement,
    store: ArtifactStore,
    watcher: Any,
    resources: Resources | None = None,
    allocation: Allocation | None = None,
) -> Any:
    """What `draw` gives for one row."""
    asked, progress = resources or Resources(), Progress(watcher)
    free = allocation or Allocation(asked, machines)
    context = Context(WorkerContext(store), asked, watcher, free, progress.board)
    return result_of(draw([requirement], context))


def run(requirement: Requirement, store: ArtifactStore, actors: int = 1) -> list[dict]:
    watcher = Watcher()
    resources = Resources(generator=GeneratorResources(actors=actors))
    drawn(requirement, store, watcher, resources)
    return [facts for _, _, facts in watcher.told.get("prepared", [])]


@pytest.fixture(scope="module")
def eight(ray_session, resolver, drawn_digits, tmp_path_factory) -> tuple[ArtifactStore, list]:
    """A store with the first eight images of each class, and what was told while they came."""
    store = ArtifactStore(tmp_path_factory.mktemp("eight"))
    return store, run(need_of(resolver, drawn_digits, 8), store, actors=2)


@pytest.fixture
def copied(eight, tmp_path) -> ArtifactStore:
    """One that a test may change."""
    shutil.copytree(eight[0].root, tmp_path / "copied")
    return ArtifactStore(tmp_path / "copied")


def test_only_missing_blocks_are_drawn(eight, copied, resolver, drawn_digits):
    assert len(eight[1]) == 10
    few, many = need_of(resolver, drawn_digits, 8), need_of(resolver, drawn_digits, 16)
    first = read_synthetic(few.spec, 8, copied)
    told = run(many, copied)
    assert sorted((t["class"], t["block"]) for t in told) == [(c, 1) for c in range(10)]
    assert sum(t["drawn"] for t in told) == 80
    assert run(many, copied) == []
    again = read_synthetic(many.spec, 8, copied)
    assert (again.batch.features == first.batch.features).all()
    assert read_synthetic(many.spec, 16, copied).labels.bincount().tolist() == [16] * 10


def test_a_block_is_the_same_from_actors_and_in_process(eight, resolver, drawn_digits, tmp_path):
    requirement = need_of(resolver, drawn_digits, 8)
    spread, alone = eight[0], ArtifactStore(tmp_path)
    worker = WorkerContext(alone)
    build_image_block(
        requirement.spec, 3, 0, worker, lambda: open_generator(requirement.spec.images, worker)
    )
    names = [
        store.row(requirement.spec.images).shard(3, 0, ".parquet") for store in (spread, alone)
    ]
    tables = [pq.read_table(name).to_pydict() for name in names]
    assert tables[0] == tables[1]
    features = [
        load_file(store.row(requirement.spec).shard(3, 0, ".safetensors"))
        for store in (spread, alone)
    ]
    assert abs(features[0]["features"] - features[1]["features"]).max() < 1e-5


def test_a_pool_gives_room_to_trials_and_no_block_pays_for_it(
    ray_session, resolver, drawn_digits, tmp_path
):
    requirement, store = need_of(resolver, drawn_digits, 16), ArtifactStore(tmp_path)
    resources = Resources(generator=GeneratorResources(actors=2, reserve=1))
    allocation = Allocation(resources, machines)

    class Begins(Watcher):
        def prepared(self, *what):
            super().__getattr__("prepared")(*what)
            allocation.tuning = True

    watcher = Begins()
    assert drawn(requirement, store, watcher, resources, allocation) == []
    pools = [pool for (pool,) in watcher.told["drew"]]
    assert [pool.actors for pool in pools] == [2, 1]  # the second in its reserve
    assert sum(pool.images for pool in pools) <= 160 == len(requirement.classes) * 16
    assert requirement.missing(store) == []
    assert list(tmp_path.rglob("*.tries")) == []


def test_a_block_that_cannot_be_drawn_is_named_and_the_others_are_kept(
    copied, resolver, drawn_digits
):
    requirement = need_of(resolver, drawn_digits, 8)
    for c in (3, 4):
        copied.row(requirement.spec).shard(c, 0, ".safetensors").unlink()
    row = copied.open_row(requirement.spec.images)
    killed = [row.count_crashes(3, 0, 2) for _ in range(2)]
    for process in killed:
        process.__enter__()  # and never comes back
    ((failed, failure),) = drawn(requirement, copied, Watcher())
    assert (failed, failure.failure_class) == (requirement, "infra")
    assert "1 block is missing; digit three, block 0: " in failure.message
    assert requirement.missing(copied) == [(3, 0)]
    assert len(run(requirement, copied)) == 1  # the next start tries it again


def test_a_generator_short_of_memory_saves_some_and_keeps_the_size_of_its_blocks(
    resolver, drawn_digits, tmp_path, monkeypatch
):
    requirement, store, tried = need_of(resolver, drawn_digits, 8), ArtifactStore(tmp_path), []

    def short(images, worker, thrift):
        tried.append(thrift)
        if thrift == 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return open_generator(images, worker)

    monkeypatch.setattr("orchestrator.execution._generation.open_generator", short)
    actor = Generate([requirement.spec], WorkerContext(store), board=None)
    for c in (0, 1):
        batch = {name: np.array([value]) for name, value in (("row", 0), ("class", c))}
        told = actor({**batch, "block": np.array([0])})
        assert (told["error"], told["drawn"]) == ([""], [8])
    assert tried == [0, 1]  # the second block starts where the first one ended


def test_who_waits_for_a_block_that_another_draws_says_for_whom(
    ray_session, resolver, drawn_digits, tmp_path, monkeypatch
):
    monkeypatch.setattr("orchestrator.execution._progress.WAITS_FOR", 0.1)
    requirement, watcher = need_of(resolver, drawn_digits, 8), Watcher()
    worker = WorkerContext(ArtifactStore(tmp_path))
    block = {"row": np.array([0]), "class": np.array([3]), "block": np.array([0])}
    key = artifact_key(requirement.spec.images)
    progress = Progress(watcher)
    with ThreadPoolExecutor() as pool:
        with ArtifactStore(tmp_path).locks.exclusive(f"{key.digest}-3-0"):
            waits = pool.submit(Generate([requirement.spec], worker, progress.board), block)
            wait_until(lambda: progress.read() or "waiting" in watcher.told)
        assert waits.result()["drawn"] == [8]
    name, holder, seconds = watcher.told["waiting"][0]
    assert name == f"image blocks {key.slug}"
    assert str(os.getpid()) in holder
    assert seconds > 0.1


def test_what_cannot_be_made_is_told_and_the_rest_goes_on(
    ray_session, resolver, drawn_digits, tmp_path
):
    broken = tmp_path / "broken"
    shutil.copytree(drawn_digits, broken)
    for file in broken.rglob("*.png"):
        file.write_bytes(file.read_bytes()[:40])
    whole = resolver.trial({"dataset": f"folder:{drawn_digits}", "images_per_class": 0})
    failed_requirements = resolver.trial({"dataset": f"folder:{broken}"})
    requirements = requirements_of([failed_requirements, whole])
    assert (
        len({requirement.stage for requirement in requirements}) == 4
    )  # LoRA and images hang on broken features
    watcher = Watcher()
    worker, resources, progress = (
        WorkerContext(ArtifactStore(tmp_path / "s")),
        Resources(),
        Progress(watcher),
    )
    free = Allocation(resources, machines)
    result_of(prepare(requirements, Context(worker, resources, watcher, free, progress.board)))
    ((failed, failure),) = watcher.told["failed"]
    assert failed.spec == failed_requirements.features
    assert (failure.failure_class, failure.message[:10]) == ("user", "ValueError")
    assert "images cannot be read" in failure.message
    assert [requirement.spec for requirement, *_ in watcher.told["prepared"]] == [whole.features]
    assert "retried" not in watcher.told


class Watcher:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.told: dict[str, list] = {}

    def __getattr__(self, name: str):
        return lambda *what: self.told.setdefault(name, []).append(what)


def test_a_blank_image_is_a_recorded_hole(resolver, drawn_digits, tmp_path):
    from PIL import Image

    folder = tmp_path / "blank"
    shutil.copytree(drawn_digits, folder)
    Image.new("RGB", (32, 32)).save(folder / "digit two" / "03.png")
    store = ArtifactStore(tmp_path / "store")
    requirement = need_of(resolver, folder, 8)
    actor = Generate([requirement.spec], WorkerContext(store), board=None)
    told = [
        actor({"row": np.array([0]), "class": np.array([c]), "block": np.array([0])})
        for c in range(10)
    ]
    assert sum(t["holes"][0] for t in told) == 1
    assert read_synthetic(requirement.spec, 8, store).labels.bincount().tolist() == [
        8,
        8,
        7,
        *[8] * 7,
    ]
    table = pq.read_table(store.row(requirement.spec.images).shard(2, 0, ".parquet")).to_pydict()
    assert table["ok"] == [True, True, True, False, True, True, True, True]
    assert table["attempt"][3] == 2


def test_reading_images_that_were_not_drawn_says_what_to_run(resolver, drawn_digits, tmp_path):
    requirement = need_of(resolver, drawn_digits, 8)
    with pytest.raises(MissingArtifact, match="airsweep prepare"):
        read_synthetic(requirement.spec, 8, ArtifactStore(tmp_path))


def test_notes_of_a_process_reach_the_driver(ray_session):
    def work(board):
        note = Note(board, "LoRA a")
        note.last = time.monotonic() - 10  # long enough ago
        note(3, 10)
        Note(board, "LoRA b").waits("its lock", "team/other", 60.0)
        Note(board, "LoRA c").waits("its lock", "team/other", 1.0)  # not worth a word

    watcher = Watcher()
    progress = Progress(watcher)
    ray.get(ray.remote(work).options(num_cpus=0).remote(progress.board))
    wait_until(lambda: progress.read() or len(watcher.told) == 2)  # notes are not waited for
    assert watcher.told == {
        "progressed": [("LoRA a", 3, 10)],
        "waiting": [("LoRA b", "team/other", 60.0)],
    }

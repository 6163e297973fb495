"""CLIP features of a dataset in blocks: by encoders side by side, by one, and in one task."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from orchestrator.cluster.session import machines
from orchestrator.execution._allocation import Allocation
from orchestrator.execution._progress import ProgressMonitor
from orchestrator.execution._queue import WorkQueue
from orchestrator.execution._workers import Workers
from orchestrator.planning import Requirement, requirements_of
from orchestrator.plugins import read_plugin
from orchestrator.spec import Resources
from orchestrator.stages import EncodedSpec, FeaturesSpec
from orchestrator.stages.context import WorkerContext
from orchestrator.stages.encoded import build as build_block
from orchestrator.stages.encoded import open_model
from orchestrator.stages.features import build as build_features
from orchestrator.store import ArtifactStore
from tests.execution.test_queue import Listener

pytestmark = pytest.mark.ray

BLOCK, BLOCKS = 16, 10
BATCH = 8
SMALL_BLOCKS = f"""
from air_core.settings.components import LOSSES
from orchestrator.spec import Resources
from orchestrator.stages import EncodedSpec

EncodedSpec.size, EncodedSpec.few = {BLOCK}, 1


@LOSSES.add("none", summary="so that the file adds a component")
def none(logits, targets):
    return logits.sum() * 0
"""


@pytest.fixture
def small_blocks(tmp_path, monkeypatch) -> Path:
    """A plugin that makes blocks of features small in other processes, as they are in this one."""
    file = tmp_path / "small_blocks.py"
    file.write_text(SMALL_BLOCKS)
    monkeypatch.setattr(EncodedSpec, "size", BLOCK)
    monkeypatch.setattr(EncodedSpec, "few", 1)
    return file


@pytest.fixture
def folder(drawn_digits, tmp_path) -> Path:
    """160 images, of which one has no readable middle."""
    copied = Path(shutil.copytree(drawn_digits, tmp_path / "digits"))
    file = copied / "digit five" / "03.png"
    data = file.read_bytes()
    file.write_bytes(data[:45] + bytes(len(data) - 65) + data[-20:])
    return copied


def needed(resolver: Any, folder: Path) -> list[Requirement]:
    """The features and the image tokens of a folder, with their blocks."""
    flat = {"dataset": f"folder:{folder}", "modality": "visual"}
    trial = resolver.trial({**flat, "images_per_class": 0, "synthetic_weight": 0.0})
    found = requirements_of([trial])
    return [each for each in found if each.stage in ("encoded", "features")]


def context(store: ArtifactStore, plugin: Path) -> WorkerContext:
    return WorkerContext(store, batch=BATCH, plugins=(read_plugin(str(plugin), Path()),))


def prepare(requirements: Sequence[Requirement], worker: WorkerContext) -> Listener:
    """Make requirements on Ray."""
    listener, allocation = Listener(), Allocation(Resources(), machines)
    workers = Workers(worker, allocation.resources, ProgressMonitor().actor)
    queue = WorkQueue(requirements, workers, allocation, listener)
    while not queue.is_over:
        queue.take()
        queue.begin()
        time.sleep(0.01)
    return listener


def content(store: ArtifactStore, spec: FeaturesSpec) -> dict[str, Any]:
    artifact = store.get(spec)
    arrays = load_file(artifact.path / "features.safetensors")
    bits = {name: (array.dtype, array.shape, array.tobytes()) for name, array in arrays.items()}
    return {**bits, "info": artifact.record["info"]}


def test_two_encoders_one_process_and_one_stream_of_images_give_the_same_bits(
    ray_session, resolver, folder, tmp_path, small_blocks, monkeypatch
):
    # A second encoder starts although it takes longer than the images.
    monkeypatch.setattr("orchestrator.execution._queue.PROCESS_START", 0.0)
    requirements = needed(resolver, folder)
    assert [(each.stage, each.total()) for each in requirements] == [
        ("encoded", BLOCKS),
        ("features", 1),
    ] * 2
    specs = [each.spec for each in requirements if isinstance(each.spec, FeaturesSpec)]
    store = ArtifactStore(tmp_path / "two")
    listener = prepare(requirements, context(store, small_blocks))
    assert "on_failed" not in listener.events
    assert all(each.is_complete(store) for each in requirements)
    [(pool,)] = listener.events["on_pool_closed"]
    assert (pool.actors, pool.images) == (2, 2 * 160)
    assert "2 encoders busy" in str(pool)
    assert not [*store.root.glob("artifacts/encoded/*/*")]
    found = [[content(store, spec) for spec in specs]]
    for few in (1, BLOCKS):
        monkeypatch.setattr(EncodedSpec, "few", few)
        assert [spec.encoded is None for spec in specs] == [few == BLOCKS] * 2
        store = ArtifactStore(tmp_path / f"{few}")
        for spec in specs:
            build_features(spec, WorkerContext(store, batch=BATCH))
        found.append([content(store, spec) for spec in specs])
    assert found[0] == found[1] == found[2]
    info = found[0][0]["info"]
    assert (info["images"], [*info["unreadable_files"]]) == (159, ["digit five/03.png"])


def test_features_are_put_together_from_the_blocks_of_the_store(
    resolver, folder, tmp_path, small_blocks
):
    encoded, features, *_ = needed(resolver, folder)
    store = ArtifactStore(tmp_path / "store")
    worker = WorkerContext(store)
    assert isinstance(encoded.spec, EncodedSpec)
    assert isinstance(features.spec, FeaturesSpec)
    for block, images in ((2, BLOCK), (0, BLOCK), (0, 0)):
        made = build_block(encoded.spec, 0, block, worker, lambda: open_model(encoded.spec, worker))
        assert made["encoded"] == images
    assert encoded.missing(store) == [(0, 1), *((0, block) for block in range(3, BLOCKS))]
    before = {file.name: file.stat().st_mtime_ns for file in store.root.rglob("0000-*")}
    seen: dict[str, int] = {}

    def report(done: int, total: int) -> None:
        files = store.root.rglob("0000-*")
        seen.update({file.name: file.stat().st_mtime_ns for file in files})

    build_features(features.spec, worker, report)
    assert {name: seen[name] for name in before} == before
    assert len(seen) == BLOCKS
    assert encoded.is_complete(store)
    assert encoded.is_replaced(store)
    assert not [*store.root.glob("artifacts/encoded/*/*")]
    # Another process that still has the block to make finds the features.
    assert build_block(encoded.spec, 0, 1, worker, lambda: None)["encoded"] == 0

"""CLIP features of a dataset in blocks: by several encoders, by one, and in one task."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from orchestrator.planning import Requirement, requirements_of
from orchestrator.stages import EncodedSpec, FeaturesSpec
from orchestrator.stages.context import WorkerContext
from orchestrator.stages.features import build
from orchestrator.store import ArtifactStore
from tests.execution.test_stream import make

BLOCK, BLOCKS = 16, 10
BATCH = 8


@pytest.fixture
def needed(drawn_digits, resolver, tmp_path, monkeypatch) -> list[Requirement]:
    """Features and image tokens of 160 images, of which one has no readable middle, with their
    small blocks."""
    monkeypatch.setattr(EncodedSpec, "size", BLOCK)
    monkeypatch.setattr(EncodedSpec, "few", 1)
    folder = Path(shutil.copytree(drawn_digits, tmp_path / "digits"))
    file = folder / "digit five" / "03.png"
    data = file.read_bytes()
    file.write_bytes(data[:45] + bytes(len(data) - 65) + data[-20:])
    flat = {"dataset": f"folder:{folder}", "modality": "visual"}
    trial = resolver.trial({**flat, "images_per_class": 0, "synthetic_weight": 0.0})
    found = requirements_of([trial])
    return [each for each in found if each.stage in ("encoded", "features")]


def features_in(requirements: list[Requirement]) -> list[FeaturesSpec]:
    return [each.spec for each in requirements if isinstance(each.spec, FeaturesSpec)]


def content(store: ArtifactStore, spec: FeaturesSpec) -> dict[str, Any]:
    artifact = store.get(spec)
    arrays = load_file(artifact.path / "features.safetensors")
    bits = {name: (array.dtype, array.shape, array.tobytes()) for name, array in arrays.items()}
    return {**bits, "info": artifact.record["info"]}


def test_encoders_one_process_and_one_stream_of_images_give_the_same_bits(
    needed, tmp_path, monkeypatch
):
    assert [(each.stage, each.total()) for each in needed] == [
        ("encoded", BLOCKS),
        ("features", 1),
    ] * 2
    specs, found = features_in(needed), []
    for few, encoders in ((1, 2), (1, 0), (BLOCKS, 0)):
        monkeypatch.setattr(EncodedSpec, "few", few)
        assert [spec.encoded is None for spec in specs] == [few == BLOCKS] * 2
        store = ArtifactStore(tmp_path / f"{few}-{encoders}")
        for number in range(encoders):  # each takes every second block
            for row in needed[::2]:
                made = make(store, row.spec, row.missing(store)[:: encoders - number], BATCH)
                assert [each.facts["encoded"] for each in made] == [BLOCK] * (BLOCKS // 2)
        for spec in specs:
            build(spec, WorkerContext(store, batch=BATCH))
        found.append([content(store, spec) for spec in specs])
    assert found[0] == found[1] == found[2]
    info = found[0][0]["info"]
    assert (info["images"], [*info["unreadable_files"]]) == (159, ["digit five/03.png"])


def test_features_are_put_together_from_the_blocks_of_the_store_which_then_leave(needed, tmp_path):
    encoded, features, *_ = needed
    store = ArtifactStore(tmp_path / "store")
    made = make(store, encoded.spec, [(0, 2), (0, 0), (0, 0)])
    assert [each.facts["encoded"] for each in made] == [BLOCK, BLOCK, 0]
    assert encoded.missing(store) == [(0, 1), *((0, block) for block in range(3, BLOCKS))]
    before = {file.name: file.stat().st_mtime_ns for file in store.root.rglob("0000-*")}
    seen: dict[str, int] = {}

    def report(done: int, total: int) -> None:
        files = store.root.rglob("0000-*")
        seen.update({file.name: file.stat().st_mtime_ns for file in files})

    build(features.spec, WorkerContext(store), report)
    assert {name: seen[name] for name in before} == before
    assert len(seen) == BLOCKS
    assert encoded.is_complete(store)
    assert encoded.is_replaced(store)
    assert not [*store.root.glob("artifacts/encoded/*/*")]
    # Another process that still has the block to make finds the features.
    assert make(store, encoded.spec, [(0, 1)])[0].facts["encoded"] == 0

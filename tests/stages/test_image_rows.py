"""Image blocks without a cluster: drawn once, with checksums and with deaths counted on disk."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Semaphore

import numpy as np
import pytest
import torch
from PIL import Image

from air_core.classifiers import text_classifier
from air_core.datasets import get_dataset
from air_core.diffusion.folder import FolderGenerator
from air_core.settings import Ref
from air_core.types import Encoded
from orchestrator.planning import Resolver
from orchestrator.stages import FolderImages, SyntheticFeaturesSpec
from orchestrator.stages.context import WorkerContext
from orchestrator.stages.dataset_text import UnusedImages, unused_images
from orchestrator.stages.features import build as build_features
from orchestrator.stages.inputs import images_folder
from orchestrator.stages.pictures import (
    GAP_PX,
    LABEL_PX,
    LINE_PX,
    PER_GROUP,
    TILE_PX,
    contact_sheet,
)
from orchestrator.stages.synthetic import build as build_image_block
from orchestrator.store import ArtifactStore
from tests.helpers.dataset_trees import draw


def row_of(folder: str) -> SyntheticFeaturesSpec:
    names = tuple(sorted(path.name for path in Path(folder).iterdir()))
    model = Ref(name=f"folder:{folder}", digest="f")
    images = FolderImages(model=model, classnames=names, size=32, block=2)
    return SyntheticFeaturesSpec(images=images, backbone=Ref(name="tiny", digest="b"))


def generator_of(spec: SyntheticFeaturesSpec):
    return FolderGenerator(images_folder(spec.images.model.name), spec.images.classnames, 32)


@pytest.fixture
def store(tmp_path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "runs")


def test_a_block_that_two_processes_need_at_once_is_drawn_once(store, drawn_digits):
    """Threads act as processes, since locks belong to open files."""
    spec = row_of(str(drawn_digits))
    draws = Semaphore(0)
    proceed = Event()

    def generator():
        draws.release()
        assert proceed.wait(600)
        return generator_of(spec)

    with ThreadPoolExecutor(2) as pool:
        block = (spec, 3, 0, WorkerContext(store), generator)
        both = [pool.submit(build_image_block, *block) for _ in range(2)]
        assert draws.acquire(timeout=600)
        # The second one waits, otherwise it would have begun by now.
        assert not draws.acquire(timeout=0.3)
        proceed.set()
        assert sorted(future.result(600)["drawn"] for future in both) == [0, 2]
    row = store.row(spec.images)
    assert sorted(p.name for p in row.path.iterdir()) == ["0003-00000.parquet", "row.json"]
    assert list((store.root / "locks").iterdir()) == []


def test_a_contact_sheet_shows_the_images_that_exist_and_counts_all_that_clip_recognises(
    store, drawn_digits, trial, tiny_clip
):
    spec, worker = row_of(str(drawn_digits)), WorkerContext(store)
    for shard in ((0, 0), (1, 0), (1, 1)):
        build_image_block(spec, *shard, worker, lambda: generator_of(spec))
    png, shares = contact_sheet(spec, None, trial("fpl").features, worker)
    sheet = Image.open(io.BytesIO(png)).convert("L")
    drawn = LABEL_PX + PER_GROUP * (TILE_PX + GAP_PX) + 10  # right of the real images
    for line in range(2):
        top = 8 + LINE_PX + line * (TILE_PX + GAP_PX)
        tiles = [
            np.asarray(sheet.crop((left, top, left + TILE_PX, top + TILE_PX))).min()
            for left in range(drawn, drawn + 3 * (TILE_PX + GAP_PX), TILE_PX + GAP_PX)
        ]
        assert [bool(darkest < 128) for darkest in tiles] == [True, True, False]
    names = spec.images.classnames
    files = [*sorted((drawn_digits / names[0]).iterdir())[:2]]
    files += sorted((drawn_digits / names[1]).iterdir())[:4]
    logits = text_classifier(tiny_clip, names, get_dataset("digits").template).logits(
        Encoded(tiny_clip.encode_images([Image.open(file).convert("RGB") for file in files]))
    )
    right = (logits.argmax(dim=-1) == torch.tensor([0, 0, 1, 1, 1, 1])).double().mean()
    assert shares == {"synthetic": pytest.approx(float(right))}


def test_features_record_the_files_that_no_trial_reads(store, tmp_path):
    home = tmp_path / "pets"
    for name in ("cat", "dog"):
        for i in range(60):
            draw(home / name / f"{i:02}.png")

    def unused() -> UnusedImages:
        resolver = Resolver(tmp_path / "digests.json", None)
        trial = resolver.trial({"dataset": f"folder:{home}", "iterations": 0})
        build_features(trial.features, WorkerContext(store))
        return unused_images(trial.features, store)

    assert not unused()
    (home / "dog" / "07.png").write_bytes(b"")
    draw(home / "cat" / "more" / "1.png")
    draw(home / "above.png")
    for name in ("a.mov", "b.MOV", "Thumbs.db", ".hidden.mov"):
        (home / "dog" / name).write_bytes(b"")
    found = unused()
    assert found.files == {"dog/07.png": "it is empty"}
    assert found.skipped == {".mov": 2, "beside class folders": 1, "in subfolders": 1}
    assert str(found) == (
        "1 unreadable (dog/07.png); skipped: 2 .mov, 1 beside class folders, 1 in subfolders"
    )

"""A row of images: each block is drawn once, and a contact sheet shows it."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Semaphore

import numpy as np
import pytest
import torch
from PIL import Image

from air_core.classifiers import text_classifier
from air_core.datasets import get_dataset
from air_core.types import Encoded
from orchestrator.stages import SyntheticFeaturesSpec
from orchestrator.stages.context import WorkerContext
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


@pytest.fixture
def row(drawn_digits, trial, tmp_path) -> tuple[SyntheticFeaturesSpec, WorkerContext]:
    settings = {"images_per_class": 16, "generation.block": 2, "generation.size": 32}
    spec = trial("air", generator=f"folder:{drawn_digits}", **settings).synthetic_features
    return spec, WorkerContext(ArtifactStore(tmp_path / "runs"))


def test_a_block_that_two_processes_need_at_once_is_drawn_once(row):
    """Threads act as processes, since locks belong to open files."""
    spec, worker = row
    draws, proceed = Semaphore(0), Event()

    def generator():
        draws.release()
        assert proceed.wait(600)
        return spec.images.open(worker)

    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(build_image_block, spec, 3, 0, worker, generator) for _ in range(2)]
        assert draws.acquire(timeout=600)
        # The second one waits, otherwise it would have begun by now.
        assert not draws.acquire(timeout=0.3)
        proceed.set()
        assert sorted(future.result(600)["drawn"] for future in both) == [0, 2]


def test_a_contact_sheet_shows_the_images_that_exist_and_counts_all_that_clip_recognises(
    row, drawn_digits, trial, tiny_clip
):
    spec, worker = row
    generator = spec.images.open(worker)
    for shard in ((0, 0), (1, 0), (1, 1)):
        build_image_block(spec, *shard, worker, lambda: generator)
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

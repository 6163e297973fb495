"""Ready images that copy test images of the digits."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from air_core.datasets import get_dataset
from orchestrator.stages.context import WorkerContext
from orchestrator.stages.copies import copies_of_test_images
from orchestrator.stages.features import read_target
from orchestrator.stages.synthetic import build
from orchestrator.store import ArtifactStore
from tests.helpers.features import encode

DIGITS = get_dataset("digits")


def saved_again(picture: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return Image.open(buffer).convert("RGB")


def test_copies_of_test_images_are_found_and_no_other_image(drawn_digits, tmp_path, trial):
    images = Path(shutil.copytree(drawn_digits, tmp_path / "images"))
    features = trial("fpl").features
    worker = WorkerContext(ArtifactStore(tmp_path / "runs"))
    encode(features, worker.store)
    splits = [trial("fpl", split_seed=seed).split for seed in (0, 1)]
    split = read_target(features, splits[0], worker.store).split
    pictures = DIGITS.load(None).images
    test, other, pool = (int(i) for i in (*split.test[[3, 7]], split.pool[5]))
    zero, four = (images / DIGITS.classnames[c] for c in (0, 4))
    pictures[test].save(zero / "003.png")
    saved_again(pictures[other]).save(four / "014.png")
    pictures[pool].save(four / "002.png")  # of the pool, so it leaks nothing
    moved = np.roll(np.asarray(pictures[test]), 3, axis=1)
    Image.fromarray(moved).save(zero / "005.png")

    settings = {"generator": f"folder:{images}", "images_per_class": 16, "generation.block": 8}
    spec = trial("air", **settings).synthetic_features
    generator = spec.images.open(worker)
    for shard in ((0, 0), (4, 0), (4, 1), (7, 0)):
        build(spec, *shard, worker, lambda: generator)
    found = copies_of_test_images(spec, features, splits, worker)
    assert found == [(f"{zero.name}/003.png", test), (f"{four.name}/014.png", other)]

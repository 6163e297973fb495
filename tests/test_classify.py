"""Many images: `classify` from paths and memory, to files, and over Ray Data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from air_core.bundle import load_bundle
from air_core.bundle.manifest import write_bundle
from air_core.datasets.images import ImageFiles, Unreadable
from benchmarks.classify import zero_shot


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A bundle: the zero-shot classifier of the tiny CLIP on the digits."""
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    write_bundle(folder, *zero_shot(), replace=False)
    return folder


@pytest.fixture(scope="module")
def bundle(folder):
    return load_bundle(folder)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[Path]:
    """150 JPEGs of noise and colour of several sizes, in two folders that are named like classes.

    150 are three batches, the last of which is not full.
    """
    home = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    files = []
    for number in range(150):
        folder = home / ("digit_one" if number < 75 else "digit_two")
        folder.mkdir(exist_ok=True)
        height, width = (int(side) for side in rng.integers(20, 120, size=2))
        noise = rng.integers(0, 256, size=(height, width, 3))
        pixels = 0.3 * noise + 0.7 * rng.integers(0, 256, size=3)
        files.append(folder / f"{number:03}.jpg")
        Image.fromarray(pixels.astype(np.uint8)).save(files[-1])
    return files


# ---------------------------------------------------------------- images in Python


def test_threads_change_neither_results_nor_order(bundle, photos):
    step = 64
    batches = [ImageFiles(tuple(photos[i : i + step])) for i in range(0, len(photos), step)]
    shares = torch.cat([bundle.logits(batch).softmax(dim=-1) for batch in batches])  # no threads
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    results = list(bundle.stream(photos, topk=10))
    torch.set_num_threads(before)
    assert [one.image for one in results] == [str(file) for file in photos]
    for result, row in zip(results, shares, strict=True):
        found = [dict(result.top)[name] for name in bundle.classnames]
        assert found == pytest.approx(row.tolist(), abs=1e-6)


def test_paths_pil_images_and_arrays_give_the_same_result_in_one_call(bundle, photos):
    with Image.open(photos[1]) as lazy:
        array = np.asarray(Image.open(photos[2]))
        grey = array[:, :, 0]
        images = [str(photos[0]), lazy, array, grey, lazy, photos[3].parent, photos[0]]
        results = bundle.classify(images, topk=10)
    in_folder = [str(file) for file in photos[:75]]
    assert [one.image for one in results] == [in_folder[0], "#1", "#2", "#3", "#4", *in_folder[1:]]
    by_path = bundle.classify(photos[:3], topk=10)
    for at, expected in ((0, by_path[0]), (1, by_path[1]), (2, by_path[2]), (4, by_path[1])):
        assert dict(results[at].top) == pytest.approx(dict(expected.top), abs=1e-6)
    (from_grey,) = bundle.classify([Image.fromarray(grey)], topk=10)
    assert dict(results[3].top) == pytest.approx(dict(from_grey.top), abs=1e-6)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((8, 8, 3)), r"image #0 is an array \(8, 8, 3\) of float64; allowed"),
        (np.zeros((3, 8, 8), np.uint8), r"\(3, 8, 8\) of uint8; allowed: \(H, W, 3\)"),
        (np.zeros((0, 8), np.uint8), r"\(0, 8\)"),
        (b"bytes", "image #0 is a bytes; allowed: paths, PIL images and numpy arrays"),
    ],
)
def test_other_arrays_and_types_are_refused(bundle, image, message):
    with pytest.raises(ValueError, match=message):
        bundle.classify([image])


def test_a_damaged_image_in_memory_is_unreadable(bundle, photos, tmp_path):
    (tmp_path / "cut.jpg").write_bytes(photos[0].read_bytes()[:-500])
    with (
        Image.open(tmp_path / "cut.jpg") as image,
        pytest.raises(Unreadable, match="image #0 cannot be read"),
    ):
        bundle.classify([image])

"""1,797 real handwritten digits, part of scikit-learn. This dataset needs no download.

The 8x8 grey values 0..16 are enlarged to 32x32. A tenth, the same for every split, is for
validation.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from air_core.datasets.dataset import Counts, Dataset, Examples
from air_core.settings.components import DATASETS

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

CLASSNAMES = tuple(
    f"digit {word}"
    for word in ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
)
SIZE_PX = 32
VALIDATION = 180


def files(root: Path | None) -> list[Path]:
    """scikit-learn's data file, located without importing scikit-learn."""
    spec = find_spec("sklearn")
    assert spec is not None
    assert spec.origin is not None
    return [Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"]


def load() -> tuple[list[Image], np.ndarray, np.ndarray]:
    """Images (32x32 RGB), labels (N,) and parts (N,): val or free."""
    import numpy as np
    from PIL import Image

    from air_core.datasets.stratified import stratified

    [file] = files(None)
    data = np.loadtxt(file, delimiter=",")  # (N, 65): an image of 8x8, and its label
    grey = (data[:, :-1].reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    images = [
        Image.fromarray(one).resize((SIZE_PX, SIZE_PX), Image.Resampling.BICUBIC).convert("RGB")
        for one in grey
    ]
    labels = data[:, -1].astype(np.int64)
    parts = np.full(len(labels), "free")
    parts[stratified(labels, VALIDATION, seed=0)] = "val"
    return images, labels, parts


@DATASETS.add("digits", summary="1,797 real digits", facts=["validation"])
def digits() -> Dataset:
    return Dataset(
        classnames=CLASSNAMES,
        source="scikit-learn's load_digits: UCI optical recognition of handwritten digits",
        licence="CC BY 4.0",
        files=files,
        load=lambda root: Examples(*load()),
        published=Counts({"free": 1617, "val": 180}, source="scikit-learn"),
    )

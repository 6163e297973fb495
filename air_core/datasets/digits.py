"""1,797 real handwritten digits, part of scikit-learn. This dataset needs no download.

The 8x8 grey values 0..16 are enlarged to 32x32. A tenth, the same for every split, is for
validation.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from air_core.datasets.dataset import TEMPLATE, Dataset, Examples

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
    if spec is None or spec.origin is None:
        raise ValueError("the digits come with scikit-learn, which is not installed")
    return [Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"]


def load() -> tuple[list[Image], np.ndarray, np.ndarray]:
    """Images (32x32 RGB), labels (N,) and parts (N,): val or free."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    grey = (data.images * (255 / 16)).round().astype(np.uint8)  # (N, 8, 8)
    images = [
        Image.fromarray(one).resize((SIZE_PX, SIZE_PX), Image.Resampling.BICUBIC).convert("RGB")
        for one in grey
    ]
    labels = data.target.astype(np.int64)
    _, validation = train_test_split(
        np.arange(len(labels)), test_size=VALIDATION, stratify=labels, random_state=0
    )
    parts = np.full(len(labels), "free")
    parts[validation] = "val"
    return images, labels, parts


DATASET = Dataset(
    name="digits",
    about="1,797 real digits",
    classnames=CLASSNAMES,
    template=TEMPLATE,
    recipe=1,
    source="scikit-learn's load_digits: UCI optical recognition of handwritten digits",
    licence="CC BY 4.0",
    files=files,
    load=lambda root: Examples(*load()),
    split="180 val, the same always; split_seed parts the rest",
    get="pip install scikit-learn",
)

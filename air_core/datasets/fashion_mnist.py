"""Fashion-MNIST, 70,000 grey pictures of clothes, 28x28 pixels.

Four files in MNIST's format, with or without gzip. Debian's package of them needs no data root. The
source defines train and test; a fixed rule takes a tenth of the training part for validation.
"T-shirt/top" is named "t-shirt or top", since class names are also folder names.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from air_core.datasets.dataset import Counts, Dataset, Examples, Row
from air_core.datasets.places import classnames_of
from air_core.datasets.split_files import with_validation
from air_core.settings.components import DATASETS

if TYPE_CHECKING:
    import numpy as np

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
GET = (
    "apt-get install dataset-fashion-mnist, or get the four files of "
    "https://github.com/zalandoresearch/fashion-mnist into fashion_mnist/"
)
TORCHVISION = "FashionMNIST/raw"
NAMES = tuple(  # sorted, those of the test part first
    f"{part}-{kind}-ubyte" for part in ("t10k", "train") for kind in ("images-idx3", "labels-idx1")
)


def files(root: Path | None) -> list[Path]:
    """The four files.

    Raises:
        ValueError: they are missing.
    """
    places = [DEBIAN]
    if root is not None:
        # Not the root itself: MNIST has files of the same names.
        named = root / "fashion_mnist"
        places = [named / TORCHVISION, root / TORCHVISION, named, DEBIAN]
    for place in places:
        found = [_packed_or_not(place, name) for name in NAMES]
        if all(file.is_file() for file in found):
            return found
    raise ValueError(
        f"fashion_mnist: none of {', '.join(map(str, places))} has all of {', '.join(NAMES)}; {GET}"
    )


def load(root: Path | None) -> Examples:
    """Grey images as 28x28 RGB in the order of the files, train before test.

    Raises:
        ValueError: a file is damaged.
    """
    import numpy as np

    from air_core.datasets.images import GreyImages

    found = files(root)
    of_test, of_train = found[:2], found[2:]
    pixels, labels, rows = [], [], []
    for part, (images, classes) in (("train", of_train), ("test", of_test)):
        pixels.append(_array(images, dimensions=3))
        labels.append(_array(classes, dimensions=1))
        rows += [Row(f"{part}/{i:05}", int(c), part) for i, c in enumerate(labels[-1])]
    return Examples(
        GreyImages(np.concatenate(pixels)),
        np.concatenate(labels).astype(np.int64),
        np.array([row.part for row in with_validation(rows)]),
    )


def _packed_or_not(folder: Path, name: str) -> Path:
    return folder / name if (folder / name).is_file() else folder / f"{name}.gz"


def _array(file: Path, dimensions: int) -> np.ndarray:
    # The format: two zero bytes, 8 for unsigned bytes, number of dimensions, their sizes, values.
    import numpy as np

    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        shape = struct.unpack_from(f">4x{dimensions}I", content)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (EOFError, gzip.BadGzipFile, zlib.error, struct.error, ValueError) as problem:
        raise ValueError(f"fashion_mnist: {file} is damaged: {problem}; get it again") from problem


@DATASETS.add("fashion_mnist", summary="70,000 pictures of 10 kinds of clothes")
def fashion_mnist() -> Dataset:
    return Dataset(
        classnames=classnames_of("fashion_mnist"),
        source="https://github.com/zalandoresearch/fashion-mnist",
        licence="MIT",
        files=files,
        load=load,
        published=Counts({"train+val": 60000, "test": 10000}, 7000, "Xiao et al. 2017"),
    )

"""Small trees of images in the layout of each dataset."""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from air_core.datasets import DATASETS, Examples

Classes = Iterable[tuple[Path, str]]  # image files, with their class names
EACH = 10  # images of a class; fewer where the source's own lists part them
_FOLDERS: list[TemporaryDirectory[str]] = []  # they go when the tests end


@cache
def small_root(name: str) -> Path | None:
    """A data root with a small copy of the dataset; None if the dataset needs no root."""
    if MAKERS[name] is None:
        return None
    _FOLDERS.append(TemporaryDirectory(prefix=f"{name}-"))
    root = Path(_FOLDERS[-1].name)
    make_tree(name, root)
    return root


@cache
def small(name: str) -> Examples:
    return DATASETS[name].load(small_root(name))


def make_tree(name: str, root: Path) -> dict[Path, str]:
    """Makes a small copy of a dataset below `<root>/<name>`, as its archives unpack there.

    Returns:
        The class name of each image file.
    """
    (root / name).mkdir(parents=True, exist_ok=True)
    classes = dict(MAKERS[name](root / name, DATASETS[name].classnames))
    for file in classes:
        draw(file)
    return classes


def draw(file: Path, size: int = 12) -> None:
    """Write a picture that depends on the file name only, so that all pictures differ."""
    rng = np.random.default_rng(zlib.crc32(str(file).encode()))
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(file)


def _write(file: Path, lines: Iterable[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in lines))


def _flowers102(folder: Path, names: tuple[str, ...]) -> Classes:
    from scipy.io import savemat

    home = folder / "flowers-102"
    home.mkdir(exist_ok=True)
    labels = np.tile(np.arange(1, len(names) + 1), 4)  # 1 train, 1 val, 2 test of each class
    numbers = np.random.default_rng(0).permutation(len(labels)) + 1
    of_class = {c: [n for n in numbers if labels[n - 1] == c] for c in range(1, len(names) + 1)}
    for number in numbers:
        yield home / f"jpg/image_{number:05}.jpg", names[labels[number - 1] - 1]
    savemat(home / "imagelabels.mat", {"labels": labels[None]})
    parts = {"trnid": slice(0, 1), "valid": slice(1, 2), "tstid": slice(2, 4)}
    savemat(
        home / "setid.mat",
        {
            key: np.array([[n for of in of_class.values() for n in of[s]]])
            for key, s in parts.items()
        },
    )


def _dtd(folder: Path, names: tuple[str, ...]) -> Classes:
    home = folder / "dtd"
    for i, part in enumerate(("train", "val", "test")):
        lines = {f"{name}/{name}_{4 * i + j:04}.jpg": name for name in names for j in range(2)}
        yield from ((home / "images" / line, name) for line, name in lines.items())
        _write(home / "labels" / f"{part}1.txt", lines)


def _fgvc_aircraft(folder: Path, names: tuple[str, ...]) -> Classes:
    home = folder / "fgvc-aircraft-2013b/data"
    # The archive spells two variants with a slash.
    slashes = {"F-16A-B": "F-16A/B", "F-A-18": "F/A-18"}
    numbers = iter(range(34956, 99999, 7))
    for part in ("train", "val", "test"):
        lines = []
        for name in names:
            number = f"{next(numbers):07}"
            lines.append(f"{number} {slashes.get(name, name)}")
            yield home / "images" / f"{number}.jpg", name
        _write(home / f"images_variant_{part}.txt", lines)


def _eurosat(folder: Path, names: tuple[str, ...]) -> Classes:
    from air_core.datasets.eurosat import FOLDERS

    for place, name in zip(FOLDERS, names, strict=True):
        for i in range(1, EACH + 1):
            yield folder / "2750" / place / f"{place}_{i}.jpg", name


def _resisc45(folder: Path, names: tuple[str, ...]) -> Classes:
    for name in names:
        place = name.replace(" ", "_")
        for i in range(1, EACH + 1):
            yield folder / "NWPU-RESISC45" / place / f"{place}_{i:03}.jpg", name


def _cub(folder: Path, names: tuple[str, ...]) -> Classes:
    home = folder / "CUB_200_2011"
    folders = [f"{c:03}.{name.title().replace(' ', '_')}" for c, name in enumerate(names, 1)]
    images = [(c, f"{of}/bird_{i:04}.jpg") for c, of in enumerate(folders, 1) for i in range(4)]
    yield from ((home / "images" / path, names[c - 1]) for c, path in images)
    _write(home / "classes.txt", (f"{c} {of}" for c, of in enumerate(folders, 1)))
    _write(home / "images.txt", (f"{n} {path}" for n, (_, path) in enumerate(images, 1)))
    _write(home / "image_class_labels.txt", (f"{n} {c}" for n, (c, _) in enumerate(images, 1)))
    _write(
        home / "train_test_split.txt", (f"{n} {int(n % 4 != 0)}" for n in range(1, len(images) + 1))
    )


def _fashion_mnist(folder: Path, names: tuple[str, ...]) -> Classes:
    raw = folder / "FashionMNIST/raw"
    raw.mkdir(parents=True)
    for stem, each in (("train", 20), ("t10k", 4)):
        labels = np.tile(np.arange(len(names), dtype=np.uint8), each)
        pixels = np.random.default_rng(each).integers(0, 256, (len(labels), 28, 28), dtype=np.uint8)
        for kind, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            head = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            content = gzip.compress(head + array.tobytes(), mtime=0)
            (raw / f"{stem}-{kind}-ubyte.gz").write_bytes(content)
    return ()


MAKERS: dict[str, Callable[[Path, tuple[str, ...]], Classes] | None] = {
    "digits": None,
    "flowers102": _flowers102,
    "dtd": _dtd,
    "fgvc_aircraft": _fgvc_aircraft,
    "eurosat": _eurosat,
    "resisc45": _resisc45,
    "cub": _cub,
    "fashion_mnist": _fashion_mnist,
}

"""Parts of a dataset whose archive defines none: from split files, or by a fixed rule.

The rule uses no random numbers: it sorts the images of a class by a hash of their paths and holds
out the first ones. Parts therefore depend on file names only, not on the version of a library.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from hashlib import blake2b
from pathlib import Path

from air_core.datasets.class_folders import class_files
from air_core.datasets.dataset import Listing, Row, listing
from air_core.datasets.places import read_lines
from air_core.models.configs import json_object

PARTS = ("train", "val", "test")
VAL_SHARE = Fraction(1, 10)  # of the training part, if the source defines no validation part
SEED = "airsweep"  # another seed gives another split


def lists_listing(
    home: Path,
    lists: Mapping[str, Path],
    classnames: Sequence[str],
    read: Callable[[str], tuple[str, str]],
) -> Listing:
    """All images of a dataset that has a list of images for each part.

    Args:
        lists: by part; opens no other file.
        read: path and class name of the image in a line.

    Raises:
        ValueError: a list is missing.
        KeyError: a list names an unknown class.
    """
    label = {classname: i for i, classname in enumerate(classnames)}
    rows = []
    for part, file in lists.items():
        for line in read_lines(file):
            path, classname = read(line)
            rows.append(Row(path, label[classname], part))
    return listing(home, rows, classnames, beside=lists.values())


def split_listing(
    home: Path,
    folders: Sequence[str],
    classnames: Sequence[str],
    archives: Sequence[str],
    test_share: Fraction,
) -> Listing:
    """All images of a dataset of class folders. A test image is never in another part.

    Split files are `test.txt` or `test.json` (ELEVATER, in COCO's format), and for the other parts
    likewise. Without one for train, all images that no file names are for training.

    Args:
        folders: class folders in the order of labels.
        archives: names of the archive's folder. If `home` has one of them and no split files, those
            of its parent are read.
        test_share: of each class, without split files.

    Raises:
        ValueError: class folders are missing, or an image has two parts.
        KeyError: a split file names a folder that is not a class.
    """
    label = {folder: i for i, folder in enumerate(folders)}
    found = class_files(home, folders)
    on_disk = [f"{folder}/{file.name}" for folder, of in found.items() for file in of]
    beside = [home, home.parent] if home.name in archives else [home]
    files = next(filter(None, (_split_files(folder) for folder in beside)), {})
    split = {part: _paths(file, part) for part, file in files.items()}
    if not split:
        split["test"] = [*held_out(on_disk, [label[_folder(path)] for path in on_disk], test_share)]
    if "train" not in split:
        named = {path for paths in split.values() for path in paths}
        split["train"] = [path for path in on_disk if path not in named]
    rows = [
        Row(path, label[_folder(path)], part) for part, paths in split.items() for path in paths
    ]
    return listing(home, with_validation(rows), classnames, beside={*files.values()})


def with_validation(rows: Iterable[Row], part: str = "train") -> list[Row]:
    """Turn a tenth of each class's images of a part into val, unless the dataset has a val part."""
    rows = list(rows)
    if any(row.part == "val" for row in rows):
        return rows
    others = [row for row in rows if row.part == part]
    chosen = held_out([row.path for row in others], [row.label for row in others], VAL_SHARE)
    return [row._replace(part="val") if row.path in chosen else row for row in rows]


def held_out(paths: Sequence[str], labels: Sequence[int], share: Fraction) -> set[str]:
    """Select a share of the paths, the same share of every class. The selection is deterministic.

    The total is the rounded share, and largest remainders distribute it over the classes. A class
    of two or more paths contributes at least one; no class contributes all its paths.
    """
    classes: dict[int, list[str]] = {}
    for path, label in zip(paths, labels, strict=True):
        classes.setdefault(label, []).append(path)
    exact = {label: len(of) * share for label, of in sorted(classes.items())}
    counts = {label: int(wanted) for label, wanted in exact.items()}
    left = round(len(paths) * share) - sum(counts.values())
    for label in sorted(exact, key=lambda c: (counts[c] - exact[c], c))[:left]:
        counts[label] += 1
    return {
        path
        for label, of in classes.items()
        for path in sorted(of, key=_place)[: min(max(counts[label], 1), len(of) - 1)]
    }


def _place(path: str) -> tuple[bytes, str]:
    name = f"{SEED}/{path}".encode(errors="surrogateescape")
    return blake2b(name, digest_size=8).digest(), path


def _folder(path: str) -> str:
    return path.split("/")[0]


def _split_files(folder: Path) -> dict[str, Path]:
    """The split file of each part; empty if the folder has none."""
    every = ((part, folder / f"{part}{kind}") for kind in (".json", ".txt") for part in PARTS)
    files = {part: file for part, file in every if file.is_file()}
    if "test" in files:
        return files
    coop = next(folder.glob("split_zhou_*.json"), None)  # all parts
    return dict.fromkeys(PARTS, coop) if coop else {}


def _paths(file: Path, part: str) -> list[str]:
    """Paths of the images of a part in its split file.

    A line of a text file is `[archive.zip@][<class>/]<class>_<number>.jpg [label]`.
    """
    if file.suffix == ".txt":
        names = [line.split()[0] for line in read_lines(file)]
    else:
        content = json_object(file)
        if part in content:
            names = [row[0] for row in content[part]]
        else:
            names = [image["file_name"] for image in content["images"]]
    bare = [name.rpartition("@")[2] for name in names]
    return [name if "/" in name else f"{name.rpartition('_')[0]}/{name}" for name in bare]

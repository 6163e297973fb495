"""Parts of a dataset whose archive defines none: from split files, or by a fixed rule.

The rule uses no random numbers: it sorts the images of a class by a hash of their paths and holds
out the first ones. Parts therefore depend on file names only, not on the version of a library.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

from air_core.datasets.class_folders import class_files
from air_core.datasets.dataset import Listing, Row, listing
from air_core.datasets.places import read_lines, read_text

T = TypeVar("T")

PARTS = ("train", "val", "test")
VAL_SHARE = Fraction(1, 10)  # of the training part, if the source defines no validation part
SEED = "airsweep"  # another seed gives another split


def lists_listing(
    name: str,
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
        ValueError: a list names an unknown class, or files are missing.
    """
    label = {classname: i for i, classname in enumerate(classnames)}
    rows = []
    for part, file in lists.items():
        for line in read_lines(name, file):
            path, classname = read(line)
            if classname not in label:
                raise ValueError(
                    f"{name}: {file} names {line!r}, but {classname!r} is none of "
                    f"{len(label)} classes"
                )
            rows.append(Row(path, label[classname], part))
    return listing(name, home, rows, classnames, beside=lists.values())


def split_listing(
    name: str,
    home: Path,
    folders: Sequence[str],
    classnames: Sequence[str],
    beside: Sequence[Path],
    test_share: Fraction,
    coop: str | None = None,
) -> Listing:
    """All images of a dataset of class folders. A test image is never in another part.

    Split files are searched in `beside`; the first folder that contains any is used. `test.txt` is
    required. Without `train.txt` all images that no file names are for training. The names
    `<dataset>-test.txt` (TorchGeo) and `test.json` (ELEVATER, in COCO's format) work as well.

    Args:
        folders: class folders in the order of labels.
        test_share: of each class, without split files.
        coop: name of CoOp's single file for all parts.

    Raises:
        ValueError: class folders or listed files are missing, a split file names a folder that is
            not a class, or an image has two parts.
    """
    label = {folder: i for i, folder in enumerate(folders)}
    found = class_files(home, folders)
    on_disk = sorted(f"{folder}/{file.name}" for folder, of in found.items() for file in of)
    split = next(filter(None, (_split_files(name, folder, coop) for folder in beside)), None)
    if split is None:
        test = held_out(on_disk, [label[_folder(path)] for path in on_disk], test_share)
        parts = [(path, "test" if path in test else "train") for path in on_disk]
    else:
        parts = [(path, part) for part, paths in split[0].items() for path in paths]
        if "train" not in split[0]:
            named = dict(parts)
            parts += [(path, "train") for path in on_disk if path not in named]
        for path, part in parts:
            if _folder(path) not in label:
                raise ValueError(
                    f"{name}: the {part} list names {path}, but {_folder(path)!r} is not a "
                    f"class folder; expected <class>/<file> with a class of {', '.join(folders)}"
                )
    rows = with_validation(Row(path, label[_folder(path)], part) for path, part in parts)
    return listing(name, home, rows, classnames, beside=split[1] if split else ())


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
    return blake2b(f"{SEED}/{path}".encode(), digest_size=8).digest(), path


def _folder(path: str) -> str:
    return path.split("/")[0]


def _split_files(
    name: str, folder: Path, coop: str | None
) -> tuple[dict[str, list[str]], list[Path]] | None:
    """Paths by part, and the split files; None: the folder has none."""
    every = {part: _split_file(name, folder, part) for part in PARTS}
    files = {part: file for part, file in every.items() if file is not None}
    if "test" in files:
        return {part: _paths(name, file) for part, file in files.items()}, [*files.values()]
    if coop is None or not (folder / coop).is_file():
        return None
    expected = '{"train": [[PATH, ...]], ...}'
    return _from_json(name, folder / coop, _coop_paths, expected), [folder / coop]


def _split_file(name: str, folder: Path, part: str) -> Path | None:
    names = (f"{part}.txt", f"{name}-{part}.txt", f"{part}.json")
    return next((folder / n for n in names if (folder / n).is_file()), None)


def _coop_paths(content: Any) -> dict[str, list[str]]:
    return {part: [str(row[0]) for row in content[part]] for part in PARTS}


def _coco_names(content: Any) -> list[str]:
    return [str(image["file_name"]) for image in content["images"]]


def _from_json(name: str, file: Path, read: Callable[[Any], T], expected: str) -> T:
    try:
        return read(json.loads(read_text(file)))
    except (json.JSONDecodeError, LookupError, TypeError, RecursionError) as problem:
        raise ValueError(
            f"{name}: {file} is no split file; expected JSON such as {expected}; get it again"
        ) from problem


def _paths(name: str, file: Path) -> list[str]:
    # A line is `[archive.zip@][<class>/]<class>_<number>.jpg [label]`.
    if file.suffix == ".json":
        names = _from_json(name, file, _coco_names, '{"images": [{"file_name": PATH}, ...]}')
    else:
        names = [line.split()[0] for line in read_text(file).splitlines() if line.strip()]
    bare = [name.rpartition("@")[2] for name in names]
    return [name if "/" in name else f"{name.rpartition('_')[0]}/{name}" for name in bare]

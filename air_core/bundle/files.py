"""Lists the image files of paths, folders and patterns. Opens no file."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from air_core.datasets.class_folders import READ_TEXT, SUFFIXES, skipped_clause, walk

UNSURE = "unsure"  # in the place of a class whose probability is too small


def image_files(places: Iterable[str | Path]) -> list[Path]:
    """List image files in the order of the arguments, each once.

    Args:
        places: files; folders, for all images in them, recursively and sorted by name; or glob
            patterns such as `new/**/*.png`.

    Raises:
        ValueError: a path does not exist, or contains no image.
    """
    found: dict[Path, None] = {}
    for place in places:
        found |= dict.fromkeys(_files_of(place))
    if not found:
        raise ValueError("no images given; give files, folders or patterns")
    return list(found)


def true_classes(files: Sequence[Path], classnames: Sequence[str]) -> dict[Path, str]:
    """Classes of images in class folders; empty unless there are two classes or more.

    The name of a folder is that of its class; underscores can replace spaces, the case is free.
    """
    of_folder = {folder: _class_of(folder, classnames) for folder in {f.parent for f in files}}
    found = {file: name for file in files if (name := of_folder[file.parent]) is not None}
    return found if len(set(found.values())) > 1 else {}


def _class_of(folder: Path, classnames: Sequence[str]) -> str | None:
    name = folder.absolute().name.lower()
    known = {name.lower(): name for name in classnames}
    return known.get(name) or known.get(name.replace("_", " "))


def _files_of(place: str | Path) -> Iterator[Path]:
    path = Path(os.path.expanduser(place))
    if path.is_dir():
        images = list(_images_below(path))
        if not images:
            raise ValueError(
                f"{path} and its subfolders contain no image; images end in "
                f"{READ_TEXT}{skipped_clause(path)}"
            )
        yield from images
    elif path.exists():
        yield path
    elif glob.has_magic(str(path)):
        matches = sorted(glob.glob(str(path), recursive=True))
        if not matches:
            raise ValueError(f"no file matches {str(place)!r}")
        for match in map(Path, matches):
            yield from _images_below(match) if match.is_dir() else (match,)
    else:
        raise ValueError(f"{path} does not exist")


def _images_below(folder: Path) -> Iterator[Path]:
    """The images of a folder, then of its subfolders, sorted by name, without hidden files."""
    for at, files in walk(folder):
        for name in files:
            if Path(name).suffix.lower() in SUFFIXES and not name.startswith("."):
                yield at / name

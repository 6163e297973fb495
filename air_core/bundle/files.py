"""Lists the image files of paths, folders and patterns. Opens no file."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from air_core.datasets.class_folders import SUFFIXES


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


def _files_of(place: str | Path) -> Iterator[Path]:
    path = Path(place).expanduser()
    if path.is_dir():
        images = list(_images_below(path))
        if not images:
            raise ValueError(
                f"{path} and its subfolders contain no image; images end in "
                f"{', '.join(sorted(SUFFIXES))}"
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
    for at, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if Path(name).suffix.lower() in SUFFIXES and not name.startswith("."):
                yield Path(at, name)

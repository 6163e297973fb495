"""Which image files are meant by files, folders and patterns. Opens none of them."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from air_core.datasets.class_folders import SUFFIXES


def image_files(places: Iterable[str | Path]) -> list[Path]:
    """Image files in the order that is asked for, each once.

    Args:
        places: files, as they are; folders, all images below them by name; patterns such as
            `new/**/*.png`, which the shell has not spread.

    Raises:
        ValueError: one of them is not there, or holds no image.
    """
    found: dict[Path, None] = {}
    for place in places:
        found |= dict.fromkeys(_of(place))
    if not found:
        raise ValueError("no image was named; give files, folders or patterns")
    return list(found)


def _of(place: str | Path) -> Iterator[Path]:
    path = Path(place).expanduser()
    if path.is_dir():
        images = list(_below(path))
        if not images:
            raise ValueError(
                f"{path} holds no image, nor do the folders in it; images end in "
                f"{', '.join(sorted(SUFFIXES))}"
            )
        yield from images
    elif path.exists():
        yield path
    elif glob.has_magic(str(path)):
        matches = sorted(glob.glob(str(path), recursive=True))
        if not matches:
            raise ValueError(f"no file fits {str(place)!r}")
        for match in map(Path, matches):
            yield from _below(match) if match.is_dir() else (match,)
    else:
        raise ValueError(f"{path} is not there")


def _below(folder: Path) -> Iterator[Path]:
    """Images of a folder, then those of its folders, by name; hidden ones are passed over."""
    for at, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if Path(name).suffix.lower() in SUFFIXES and not name.startswith("."):
                yield Path(at, name)

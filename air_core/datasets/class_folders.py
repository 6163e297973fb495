"""Images in class folders: `<folder>/<classname>/*.png`, in the order of their names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def class_files(folder: Path, classnames: Sequence[str]) -> dict[str, list[Path]]:
    """Image files of each class, sorted by name.

    Args:
        folder: holds one folder for each class, named like it; underscores may stand for spaces.

    Raises:
        ValueError: class folders are missing, or something in them is no file; see `images_in`.
    """
    found = {name: _files(folder, name) for name in classnames}
    missing = [name for name, files in found.items() if files is None]
    if missing:
        raise ValueError(
            f"{folder} has no folder for {', '.join(map(repr, missing))}; "
            "one folder a class, spaces may be underscores"
        )
    return {name: files for name, files in found.items() if files is not None}


def _files(folder: Path, classname: str) -> list[Path] | None:
    for name in (classname, classname.replace(" ", "_")):
        if (folder / name).is_dir():
            return images_in(folder / name)
    return None


def images_in(folder: Path) -> list[Path]:
    """Image files of a folder, sorted by name.

    Raises:
        ValueError: something is named like an image file and is none, such as a folder.
    """
    # Archives made on macOS hold a hidden ._x.jpg for x.jpg, which is no image.
    with os.scandir(folder) as inside:
        entries = [entry for entry in inside if not entry.name.startswith(".")]
    named = [entry for entry in entries if Path(entry.name).suffix.lower() in SUFFIXES]
    for entry in named:
        # The folder's own listing says it, without a look at each file on a network disk.
        if not entry.is_file(follow_symlinks=False) and not Path(entry.path).is_file():
            raise ValueError(
                f"{entry.path} is named like an image, but it is no file: a folder, a link to "
                "nothing, or a device; remove or rename it"
            )
    return sorted(folder / entry.name for entry in named)

"""Images in class folders: `<folder>/<classname>/*.png`, in the order of their names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def class_files(folder: Path, classnames: Sequence[str]) -> dict[str, list[Path]]:
    """Image files of each class, sorted by name.

    Args:
        folder: holds one folder for each class, named like it; underscores may stand for spaces.

    Raises:
        ValueError: class folders are missing.
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
    """Image files of a folder, sorted by name."""
    # Archives made on macOS hold a hidden ._x.jpg for x.jpg, which is no image.
    files = (file for file in folder.iterdir() if not file.name.startswith("."))
    return sorted(file for file in files if file.suffix.lower() in SUFFIXES)

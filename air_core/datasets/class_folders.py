"""Lists images in class folders, `<folder>/<classname>/*.png`, by name; counts other files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from air_core.datasets.images import READS_HEIC
from air_core.tools.printable import printable

READ = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
READ_TEXT = ", ".join(READ)
HEIC = (".heic", ".heif")
SUFFIXES = {*READ, *(HEIC if READS_HEIC else ())}
FEWEST = 4  # images of a class without labels
# Files of operating systems, and text files of a dataset.
IGNORED = {
    *("thumbs.db", "desktop.ini"),
    *("classnames.txt", "template.txt", "classes.txt", "labels.csv", "allow_duplicates"),
}


def class_files(folder: Path, classnames: Sequence[str]) -> dict[str, list[Path]]:
    """Image files of each class, sorted by name.

    Args:
        folder: contains one folder per class, named after the class; underscores can replace
            spaces.

    Raises:
        ValueError: class folders are missing.
    """
    found = {name: _files(folder, name) for name in classnames}
    missing = [name for name, files in found.items() if files is None]
    if missing:
        raise ValueError(
            f"{folder} has no folder for {', '.join(map(repr, missing))}; "
            "each class needs a folder, and underscores can replace spaces"
        )
    return {name: files for name, files in found.items() if files is not None}


def _files(folder: Path, classname: str) -> list[Path] | None:
    for name in (classname, classname.replace(" ", "_")):
        if (folder / name).is_dir():
            return images_in(folder / name)
    return None


def images_in(folder: Path) -> list[Path]:
    """Entries of a folder that are named like images, sorted by name. Whether they are files is
    checked when they are read."""
    # Archives made on macOS contain a hidden file ._x.jpg for x.jpg, which is not an image.
    names = [name for name in os.listdir(folder) if not name.startswith(".")]
    return sorted(folder / name for name in names if Path(name).suffix.lower() in SUFFIXES)


def is_system_folder(name: str) -> bool:
    """Whether a folder is hidden, or is one that archives made on macOS contain."""
    return name.startswith(".") or name == "__MACOSX"


def walk(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """A folder and the folders below it, with the names of their files, sorted; without hidden
    folders and links to folders.

    Raises:
        OSError: a folder cannot be read.
    """

    def fail(problem: OSError) -> None:
        raise problem

    for at, folders, files in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not is_system_folder(name))
        yield Path(at), sorted(files)


def other_files(folder: Path, read: Collection[Path] | None = None) -> dict[str, int]:
    """Number of files below a folder that are not read, by kind: images in wrong places, other
    files by their suffix, without hidden ones and IGNORED.

    Args:
        read: the class folders whose images are read; None: all images are.
    """
    found: Counter[str] = Counter()
    for home, files in walk(folder):
        place = "in subfolders" if {*home.parents} & {*(read or ())} else "beside class folders"
        for name in files:
            suffix = Path(name).suffix.lower()
            if name.startswith(".") or name.lower() in IGNORED:
                continue
            if suffix not in SUFFIXES:
                found[suffix or "without suffix"] += 1
            elif read is not None and home not in read:
                found[place] += 1
    return dict(sorted(found.items()))


def skipped_text(skipped: Mapping[str, int]) -> str:
    """Number of files that are not read, by kind.

    >>> skipped_text({".heic": 3, "in subfolders": 1})
    '3 .heic (pip install pillow-heif), 1 in subfolders'
    """
    hints = dict.fromkeys(HEIC, " (pip install pillow-heif)")
    return ", ".join(f"{n:,} {printable(kind)}{hints.get(kind, '')}" for kind, n in skipped.items())


def skipped_clause(folder: Path) -> str:
    """The files below a folder that are not read, for an error; empty: no file is skipped."""
    skipped = skipped_text(other_files(folder))
    return f"; skipped: {skipped}" if skipped else ""

"""Lists images in class folders, `<folder>/<classname>/*.png`, by name; counts other files."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from air_core.datasets.images import READS_HEIC
from air_core.tools.printable import printable

READ = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
READ_TEXT = ", ".join(READ)
HEIC = (".heic", ".heif")
SUFFIXES = {*READ, *(HEIC if READS_HEIC else ())}
FEWEST = 4  # images of a class without labels
# Commands after which files of other kinds can be read, by suffix.
RAW = (".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2")
COMMANDS = {
    **dict.fromkeys(HEIC, "pip install pillow-heif"),
    **{raw: f"find FOLDER -iname '*{raw}' -exec dcraw_emu -w {{}} +" for raw in RAW},
    ".zip": "find FOLDER -iname '*.zip' -execdir unzip -n {} \\;",
}
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
        ValueError: class folders are missing, or contain invalid entries (see `images_in`).
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
    """Image files of a folder, sorted by name.

    Raises:
        ValueError: an entry has the suffix of an image but is not a file, such as a folder, or
            its name is not UTF-8.
    """
    # Archives made on macOS contain a hidden file ._x.jpg for x.jpg, which is not an image.
    with os.scandir(folder) as inside:
        entries = [entry for entry in inside if not entry.name.startswith(".")]
    named = [entry for entry in entries if Path(entry.name).suffix.lower() in SUFFIXES]
    for entry in named:
        check_utf8(Path(entry.path))
        # The folder's listing has the type of each entry, so a network disk needs no stat per file.
        if not entry.is_file(follow_symlinks=False) and not Path(entry.path).is_file():
            raise ValueError(
                f"{entry.path} has the name of an image but is not a file: it is a folder, a "
                "broken link or a device; remove or rename it"
            )
    return sorted(folder / entry.name for entry in named)


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


def suffixes(names: Iterable[str]) -> Iterator[str]:
    """Lower-case suffixes of file names, without those in IGNORED and hidden ones.

    >>> list(suffixes(["a.PNG", ".DS_Store", "Thumbs.db", "IMG_0001"]))
    ['.png', '']
    """
    return (
        Path(name).suffix.lower()
        for name in names
        if not name.startswith(".") and name.lower() not in IGNORED
    )


def other_files(folder: Path, read: Collection[Path] | None = None) -> dict[str, int]:
    """Number of files below a folder that are not read, by kind: images in wrong places, other
    files by their suffix.

    Args:
        read: the class folders whose images are read; None: all images are.
    """
    found: Counter[str] = Counter()
    for home, files in walk(folder):
        place = "in subfolders" if {*home.parents} & {*(read or ())} else "beside class folders"
        for suffix in suffixes(files):
            if suffix not in SUFFIXES:
                found[suffix or "without suffix"] += 1
            elif read is not None and home not in read:
                found[place] += 1
    return dict(sorted(found.items()))


def skipped_text(skipped: Mapping[str, int]) -> str:
    """Such as `3 .heic, 1 in subfolders`."""
    return ", ".join(f"{count:,} {printable(kind)}" for kind, count in skipped.items())


def skipped_lines(skipped: Mapping[str, int], folder: str | Path) -> list[str]:
    r"""Number of files that are not read, by kind, and the commands after which they can be read.

    >>> print(*skipped_lines({".nef": 3, ".txt": 1}, "my photos"), sep="\n")
    3 .nef, 1 .txt
    .nef: find 'my photos' -iname '*.nef' -exec dcraw_emu -w {} +
    """
    place = shlex.quote(printable(str(folder)))
    commands = {kind: COMMANDS[kind] for kind in skipped if kind in COMMANDS}
    lines = [f"{kind}: {command.replace('FOLDER', place)}" for kind, command in commands.items()]
    return [skipped_text(skipped), *lines] if skipped else []


def skipped_clause(folder: Path) -> str:
    """`skipped_lines` of a folder and those below it, for an error; empty: no file is skipped."""
    lines = skipped_lines(other_files(folder), folder)
    return f"; skipped: {'; '.join(lines)}" if lines else ""


def check_utf8(path: Path) -> None:
    """Check that a path is UTF-8, as digests and reports need.

    Raises:
        ValueError: it is not.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        shown = os.fsencode(path).decode(errors="backslashreplace")
        raise ValueError(
            f"{shown}: this name is not UTF-8; rename it, for example with "
            "`convmv -r -f latin1 -t utf8 --notest FOLDER`"
        ) from None

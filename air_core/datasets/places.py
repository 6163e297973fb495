"""Finds datasets below the data root, and reads their lists and class names."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from air_core.datasets.dataset import Dataset, Listing, listed
from air_core.models.tokens import as_read
from air_core.tools.printable import UNPRINTABLE


def archive(
    name: str,
    rows: Callable[[Path, tuple[str, ...]], Listing],
    homes: Sequence[str],
    marks: Sequence[str],
    get: str,
    **facts: Any,
) -> Dataset:
    """A dataset whose class names are in this package, and whose images are below the data root.

    Its folder is in `<root>/<name>`, otherwise in `<root>`.

    Args:
        rows: lists the images in the dataset's folder, given its class names.
        homes: paths that may be between these two and the dataset's folder, such as the folder in
            the archive.
        marks: files or folders that identify the dataset's folder.
        get: instructions for getting the dataset, for the message.
        facts: the other fields of `Dataset`.
    """
    classnames = classnames_of(name)

    def found(root: Path | None) -> Listing:
        home = _home(name, root, homes, marks, get)
        try:
            return rows(home, classnames)
        except OSError:
            raise
        except Exception as problem:  # about damaged lists, scipy raises any exception
            kind = "" if isinstance(problem, ValueError) else f"{type(problem).__name__} "
            raise ValueError(f"{name} in {home}: {kind}{problem}") from problem

    return listed(found, classnames=classnames, **facts)


def classnames_of(name: str) -> tuple[str, ...]:
    """Class names for text prompts, in label order, from the lines of `classnames/<name>.txt`.

    The order is part of the published protocol: it determines which classes are seen for a seed.
    """
    file = Path(__file__).with_name("classnames") / f"{name}.txt"
    return tuple(file.read_text(encoding="utf-8").splitlines())


def _home(
    name: str, root: Path | None, homes: Sequence[str], marks: Sequence[str], get: str
) -> Path:
    if root is None:
        raise ValueError(
            f"{name} needs a data root: --data-root DIR or AIRSWEEP_DATA, the folder that contains "
            f"{name}/; {get}"
        )
    places = [base / home for base in (root / name, root) for home in (*homes, ".")]
    for place in places:
        if all((place / mark).exists() for mark in marks):
            return place
    raise ValueError(
        f"{name} is not in {root}: looked for {' and '.join(marks)} in "
        f"{', '.join(dict.fromkeys(map(str, places)))}; {get}"
    )


def read_text(file: Path) -> str:
    """A text file. Editors on Windows write a byte order mark, which is removed.

    Raises:
        ValueError: it cannot be read, or is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as problem:
        raise ValueError(f"{file} cannot be read: {problem.strerror}") from problem
    except UnicodeDecodeError as problem:
        raise ValueError(f"{file} is not UTF-8 text; save it as UTF-8") from problem


def read_lines(file: Path) -> list[str]:
    """The lines of a text file, without empty lines; see `read_text`."""
    return [line.strip() for line in read_text(file).splitlines() if line.strip()]


def text_lines(file: Path) -> list[tuple[str, str]]:
    """Place and text of each line that is not empty, without spaces around it; of a missing file
    none.

    Raises:
        ValueError: it cannot be read, or is not UTF-8.
    """
    text = read_text(file) if os.path.lexists(file) else ""
    lines = enumerate(text.splitlines(), start=1)
    return [(f"{file}:{number}", line.strip()) for number, line in lines if line.strip()]


class Said(NamedTuple):
    """The class name that CLIP reads, and where it is defined."""

    classname: str
    place: str


def said(name: str) -> str:
    """The class name for the name of a folder or class."""
    return name.replace("_", " ")


def class_entries(entries: Iterable[tuple[str, str]]) -> dict[str, Said]:
    """Class names in `name` or `name = how to say it`, by name.

    Args:
        entries: each with its place for messages. Those that begin with # are comments.

    Raises:
        ValueError: an entry is invalid or listed twice, or CLIP reads two names alike.
    """
    found: dict[str, Said] = {}
    for place, entry in entries:
        if entry.startswith("#"):
            continue
        name, equals, text = (part.strip() for part in entry.partition("="))
        if not name or "/" in entry or (equals and not text):
            raise ValueError(
                f"{place}: {entry!r} is not allowed; expected `name` or `name = how to say it`, "
                "without /"
            )
        if name in found:
            raise ValueError(
                f"{place}: the class {name!r} is listed twice, first in {found[name].place}; "
                "remove one of them"
            )
        found[name] = Said(text or said(name), place)
    check_classnames(found.values())
    return found


def check_classnames(names: Iterable[Said]) -> None:
    """Check that CLIP can read class names and distinguish them.

    Raises:
        ValueError: a name has an invisible character, or CLIP reads it like another.
    """
    known: dict[str, str] = {}
    for name, place in names:
        read = as_read(name)
        if hidden := UNPRINTABLE.search(name):
            why = f"the class name {name!r} has an invisible character, {hidden[0]!r}"
        elif read in known:
            both = "" if known[read] == name else f" and {known[read]!r}, which CLIP reads alike"
            why = f"two classes are named {name!r}{both}"
        else:
            known[read] = name
            continue
        raise ValueError(f"{place}: {why}; write another name")

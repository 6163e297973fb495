"""Finds datasets below the data root, and reads their lists and class names."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from air_core.datasets.dataset import first_hidden
from air_core.models.tokens import as_read


def classnames_of(name: str) -> tuple[str, ...]:
    """Class names for text prompts, in label order, from the lines of `classnames/<name>.txt`.

    The order is part of the published protocol: it determines which classes are seen for a seed.
    """
    file = Path(__file__).with_name("classnames") / f"{name}.txt"
    return tuple(file.read_text(encoding="utf-8").splitlines())


def find_home(
    name: str, root: Path | None, homes: Sequence[str], marks: Sequence[str], get: str
) -> Path:
    """The folder that contains a dataset: in `<root>/<name>`, otherwise in `<root>`.

    Args:
        homes: relative paths to search, such as the folder in the archive, or ".".
        marks: files or folders that identify the dataset.
        get: instructions for getting the dataset, for the message.

    Raises:
        ValueError: no folder or several folders match.
    """
    if root is None:
        raise ValueError(
            f"{name} needs a data root: --data-root DIR or AIRSWEEP_DATA, the folder that contains "
            f"{name}/; {get}"
        )
    if not root.is_dir():
        raise ValueError(
            f"the data root {root} does not exist or is not a folder; for {name}: {get}"
        )
    looked = []
    for base in (root / name, root):
        places = [base / home for home in homes]
        found = [place for place in places if all((place / mark).exists() for mark in marks)]
        if len(found) > 1:
            raise ValueError(
                f"{name} exists twice, in {found[0]} and {found[1]}; "
                f"keep one, or move it to {root / name}"
            )
        if found:
            return found[0]
        looked += [str(place) for place in places]
    raise ValueError(
        f"{name} is not in {root}: looked for {' and '.join(marks)} in {', '.join(looked)}; {get}"
    )


def read_text(file: Path) -> str:
    """A text file. Editors on Windows write a byte order mark, which is removed.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as problem:
        raise ValueError(f"{file} is not UTF-8 text; save it as UTF-8") from problem


def optional_text(file: Path) -> str | None:
    """A text file that may be missing: None.

    Raises:
        ValueError: it is not a file, or not UTF-8.
    """
    if not os.path.lexists(file):
        return None
    if not file.is_file():
        raise ValueError(
            f"{file} is a folder, a broken link or a device; allowed is a text file; remove or "
            "replace it"
        )
    return read_text(file)


class NameProblem(NamedTuple):
    """Why CLIP cannot read a class name, by its position."""

    position: int
    text: str


def name_problem(names: Sequence[str]) -> NameProblem | None:
    """The first class name that is invisible or empty to CLIP, or that CLIP reads like another.

    >>> name_problem(["cat", "Cat"])
    NameProblem(position=1, text="two classes are named 'Cat' and 'cat', which CLIP reads alike")
    """
    known: dict[str, str] = {}
    for i, name in enumerate(names):
        hidden, read = first_hidden(name), as_read(name)
        if hidden is not None:
            return NameProblem(i, f"the class name {name!r} has an invisible character, {hidden!r}")
        if not read:
            return NameProblem(i, f"the class name {name!r} is empty to CLIP")
        if read in known:
            both = "" if known[read] == name else f" and {known[read]!r}, which CLIP reads alike"
            return NameProblem(i, f"two classes are named {name!r}{both}")
        known[read] = name
    return None


def text_lines(file: Path) -> list[tuple[str, str]]:
    """Place and text of each line that is not empty, without spaces around it; of a missing file
    none.

    Raises:
        ValueError: see `optional_text`.
    """
    lines = enumerate((optional_text(file) or "").splitlines(), start=1)
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
    every = [*found.values()]
    if problem := name_problem([each.classname for each in every]):
        raise ValueError(f"{every[problem.position].place}: {problem.text}; write another name")
    return found


def read_lines(name: str, file: Path) -> list[str]:
    """The lines of a dataset's text file, without empty lines.

    Raises:
        ValueError: the file is missing or not UTF-8.
    """
    if not file.is_file():
        raise ValueError(f"{name}: {file.name} is not in {file.parent}; unpack the archive again")
    return [line for _, line in text_lines(file)]

"""Where a dataset lies below the data root, and the small text files it comes with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def classnames_of(name: str) -> tuple[str, ...]:
    """Class names for the text prompts, one a line in `classnames/<name>.txt`, in label order.

    Their order is part of the published protocol: it decides which classes a seed makes seen.
    """
    file = Path(__file__).with_name("classnames") / f"{name}.txt"
    return tuple(file.read_text(encoding="utf-8").splitlines())


def find_home(
    name: str, root: Path | None, homes: Sequence[str], marks: Sequence[str], get: str
) -> Path:
    """The folder that holds a dataset: below `<root>/<name>`, else below `<root>` itself.

    Args:
        homes: where the folder may lie, such as the one that the archive unpacks to, or ".".
        marks: what it must hold, enough to tell it from another dataset.
        get: where the data come from, for the message.

    Raises:
        ValueError: it is nowhere, or in two places.
    """
    if root is None:
        raise ValueError(
            f"{name} needs a data root: --data-root DIR or AIRSWEEP_DATA, the folder that holds "
            f"{name}/; {get}"
        )
    if not root.is_dir():
        raise ValueError(f"the data root {root} is not there, or no folder; for {name}: {get}")
    looked = []
    for base in (root / name, root):
        places = [base / home for home in homes]
        found = [place for place in places if all((place / mark).exists() for mark in marks)]
        if len(found) > 1:
            raise ValueError(
                f"{name} is in two places, {found[0]} and {found[1]}; "
                f"keep one, or move it to {root / name}"
            )
        if found:
            return found[0]
        looked += [str(place) for place in places]
    raise ValueError(
        f"{name} is not in {root}: looked for {' and '.join(marks)} in {', '.join(looked)}; {get}"
    )


def read_lines(name: str, file: Path) -> list[str]:
    """Lines of a list that a dataset comes with, without empty ones.

    Raises:
        ValueError: the list is not there.
    """
    if not file.is_file():
        raise ValueError(
            f"{name}: {file.name} is not in {file.parent}; was the archive unpacked to its end?"
        )
    return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]

"""Is a dataset on this machine the published one, and can every image be opened?

Compares classes, parts and images per class with `air_core.datasets.published`. A folder of one's
own is compared with nothing; it is counted, and its images are opened all the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from air_core.datasets import Dataset, Examples, get_dataset
from air_core.datasets.images import BAD_SHARE, Unreadable
from air_core.datasets.published import PUBLISHED, Counts
from air_core.printable import printable

SHOWN = 3  # unreadable files that are named
Watch = Callable[[Iterable[str | None], int], Iterable[str | None]]


@dataclass(frozen=True)
class Report:
    """What was found. `difference` is the first one, None where all fits."""

    name: str
    classnames: tuple[str, ...] = ()
    parts: dict[str, int] = field(default_factory=dict)
    unreadable: tuple[str, ...] = ()  # why, with the file
    difference: str | None = None

    @property
    def images(self) -> int:
        return sum(self.parts.values())

    def json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "classnames": list(self.classnames),
            "images": self.images,
            "parts": self.parts,
            "unreadable": {"count": len(self.unreadable), "first": list(self.unreadable[:SHOWN])},
            "difference": self.difference,
        }

    def lines(self) -> list[str]:
        """For people; nothing where nothing could be read."""
        if not self.parts:
            return []
        parts = "   ".join(f"{part} {count:,}" for part, count in self.parts.items())
        return [
            f"{self.name}: {self.images:,} images of {len(self.classnames)} classes",
            f"parts       {parts}",
            f"unreadable  {len(self.unreadable):,}",
            *(f"            {printable(why)}" for why in self.unreadable[:SHOWN]),
        ]


def check(name: str, root: Path | None, watch: Watch = lambda each, total: each) -> Report:
    """Count, compare, and open every image.

    Args:
        name: a dataset, or folder:<path>.
        watch: passes on what is opened, one by one, and may show how far it is.
    """
    try:
        dataset = get_dataset(name)
        examples = dataset.load(root)
    except ValueError as problem:
        return Report(name, difference=str(problem))
    found, counts = np.unique(examples.parts, return_counts=True)
    parts = dict(zip(found.tolist(), counts.tolist(), strict=True))
    order = [part for part in ("train", "val", "test", "free") if part in parts]
    unreadable = tuple(why for why in watch(_opened(examples), len(examples.images)) if why)
    return Report(
        dataset.name,
        dataset.classnames,
        {part: parts[part] for part in order},
        unreadable,
        _difference(dataset, examples, parts)
        or _too_many(dataset, unreadable, len(examples.parts)),
    )


def _difference(dataset: Dataset, examples: Examples, parts: dict[str, int]) -> str | None:
    published = PUBLISHED.get(dataset.name)
    if published is None:
        return None
    if len(dataset.classnames) != published.classes:
        return (
            f"{dataset.name} has {len(dataset.classnames)} classes, published {published.classes}"
        )
    return _each(dataset, examples, published) or _parts(dataset.name, parts, published)


def _each(dataset: Dataset, examples: Examples, published: Counts) -> str | None:
    # Before the parts, since it says where images are missing.
    counts = np.bincount(examples.labels, minlength=len(dataset.classnames))
    for classname, count in zip(dataset.classnames, counts, strict=True):
        if published.each is not None and count != published.each:
            return (
                f"{dataset.name}: class {classname!r} has {count:,} images, published "
                f"{published.each:,}"
            )
    return None


def _parts(name: str, parts: dict[str, int], published: Counts) -> str | None:
    for part, wanted in published.parts.items():
        count = sum(parts.get(one, 0) for one in part.split("+"))
        if count != wanted:
            return f"{name}: {part} has {count:,} images, published {wanted:,} ({published.source})"
    return None


def _too_many(dataset: Dataset, unreadable: tuple[str, ...], images: int) -> str | None:
    # One image less is another dataset than the published one; of one's own a few may be bad.
    allowed = 0 if dataset.name in PUBLISHED else int(BAD_SHARE * images)
    if len(unreadable) > allowed:
        return (
            f"{dataset.name}: {len(unreadable):,} of {images:,} images cannot be read, "
            f"{allowed:,} may; the first: {printable(unreadable[0])}"
        )
    return None


def _opened(examples: Examples) -> Iterable[str | None]:
    """Why an image cannot be read, or None, one by one in order; decoding runs in threads."""

    def problem(index: int) -> str | None:
        try:
            examples.images[index]
        except Unreadable as unreadable:
            return str(unreadable)
        return None

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        yield from threads.map(problem, range(len(examples.images)))

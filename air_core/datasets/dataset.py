"""Defines datasets and the listing of their files.

A dataset of image files is first listed as rows (path, label, part), so digests and checks can list
and count the files without opening an image. Datasets do not depend on paradigms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from air_core.datasets.images import ImageFiles
from air_core.tools.printable import UNPRINTABLE

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

TEMPLATE = "a photo of a {}"  # of GRIP and CPL for all datasets


@dataclass(frozen=True)
class Examples:
    """A dataset's images in its fixed order.

    `images` can open each file on access (`images.ImageFiles`), in several threads at a time.
    `parts` contains train, val or test for each image, or free if `split_seed` decides between
    train and test.
    """

    images: Sequence[Image]
    labels: np.ndarray  # (N,) int64; UNKNOWN where no label is known
    parts: np.ndarray  # (N,) str


@dataclass(frozen=True)
class Counts:
    """A published size. A key of `parts` is one part, or several that are counted together.

    Sizes of training pools follow GRIP and CPL, which use train and val together.
    """

    parts: dict[str, int]
    each: int | None = None  # images per class, if the same for all classes
    source: str = ""


@dataclass(frozen=True)
class Dataset:
    """A dataset: class names and template, how to find and read its files."""

    classnames: tuple[str, ...]
    source: str
    licence: str
    files: Callable[[Path | None], list[Path]]  # sorted; all files that `load` reads
    load: Callable[[Path | None], Examples]
    name: str = ""  # by default that under which it is added
    about: str = ""  # a few words, for the header of a table; by default its summary
    template: str = TEMPLATE  # {} is the class name
    recipe: int = 1  # increase it when the same files give other pixels or parts
    skipped: Callable[[], dict[str, int]] = dict  # number of files that are not read, by kind
    pool_labels: Literal["known", "unknown"] = "known"  # unknown: nothing can be measured on it
    published: Counts | None = None  # `airsweep check` compares the files with it


class Row(NamedTuple):
    """One image: its path relative to the dataset's home, with forward slashes; class and part."""

    path: str
    label: int
    part: str


@dataclass(frozen=True)
class Listing:
    """A dataset's rows in its fixed order, and the files that define them."""

    home: Path
    rows: tuple[Row, ...]
    beside: tuple[Path, ...]  # lists, labels, split files

    @property
    def files(self) -> list[Path]:
        """Every file that loading reads, sorted."""
        return sorted([*(self.home / row.path for row in self.rows), *self.beside])

    def examples(self) -> Examples:
        """The images with labels and parts. Images are opened on access."""
        import numpy as np

        return Examples(
            ImageFiles(tuple(self.home / row.path for row in self.rows)),
            np.array([row.label for row in self.rows], dtype=np.int64),
            np.array([row.part for row in self.rows]),
        )


def listed(rows: Callable[[Path | None], Listing], **facts: Any) -> Dataset:
    """A dataset of image files, which `rows` lists below a data root.

    Args:
        facts: the other fields of `Dataset`.
    """
    return Dataset(
        files=lambda root: rows(root).files, load=lambda root: rows(root).examples(), **facts
    )


def listing(
    home: Path, rows: Iterable[Row], classnames: Sequence[str], beside: Iterable[Path] = ()
) -> Listing:
    """Sort the rows by path, whatever the order of the file system, and check them. Whether the
    files exist is checked when they are read.

    Raises:
        ValueError: a file is listed twice, or a class has no image.
    """
    ordered = sorted(rows, key=lambda row: PurePosixPath(row.path).parts)
    for one, other in pairwise(ordered):
        if one.path == other.path:
            raise ValueError(
                f"{one.path} is listed twice, as {one.part} and as {other.part}; each image must "
                "have one part, correct the split files"
            )
    labels = {row.label for row in ordered}
    if empty := [name for c, name in enumerate(classnames) if c not in labels]:
        raise ValueError(f"{home} has no image of {some(empty)}; each class needs at least one")
    return Listing(home, tuple(ordered), tuple(beside))


def is_template(text: str) -> bool:
    """Whether a text has exactly one `{}`, for a class name, no other brace, and no invisible
    character.

    >>> [is_template(text) for text in ("a photo of a {}", "a photo", "{} {}", "{0.__class__}")]
    [True, False, False, False]
    """
    return [text.count(c) for c in ("{}", "{", "}")] == [1, 1, 1] and not UNPRINTABLE.search(text)


def some(names: Sequence[str], shown: int = 3) -> str:
    """The first few of many names.

    >>> some(["a", "b", "c", "d", "e"])
    "'a', 'b', 'c' and 2 more"
    """
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(map(repr, names[:shown])) + more

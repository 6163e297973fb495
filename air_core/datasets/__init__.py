"""Target images by name. Importing this is cheap: images are opened by `Dataset.load` only.

A dataset does not know of paradigms or splits beyond the parts that its source defines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from air_core.datasets import digits

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image


@dataclass(frozen=True)
class Examples:
    """A dataset's images in its fixed order.

    `parts` holds train, val or test for each image; free where `split_seed` decides between
    train and test.
    """

    images: Sequence[Image]
    labels: np.ndarray  # (N,) int64
    parts: np.ndarray  # (N,) str


@dataclass(frozen=True)
class Dataset:
    """What a dataset is: how to find, read and name it."""

    name: str
    about: str  # a few words, for the head of a table
    classnames: tuple[str, ...]
    template: str  # {} is the class name
    recipe: int  # raise it when the same files give other pixels or parts
    source: str
    licence: str
    files: Callable[[Path | None], list[Path]]  # sorted; all that `load` reads
    load: Callable[[Path | None], Examples]


DATASETS: dict[str, Dataset] = {
    "digits": Dataset(
        name="digits",
        about="1,797 real digits",
        classnames=digits.CLASSNAMES,
        template="a photo of a {}",
        recipe=1,
        source="scikit-learn's load_digits: UCI optical recognition of handwritten digits",
        licence="CC BY 4.0",
        files=digits.files,
        load=lambda root: Examples(*digits.load()),
    ),
}


def get_dataset(name: str) -> Dataset:
    """A dataset by name.

    Raises:
        ValueError: nobody knows it.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown dataset {name!r}; known: {', '.join(sorted(DATASETS))}")
    return DATASETS[name]

"""Target datasets by name. Importing this package is cheap: only `Dataset.load` opens images.

Datasets define the parts of their source. They do not depend on paradigms or splits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

from air_core.datasets.dataset import Dataset, Examples
from air_core.datasets.image_folder import PREFIX, folder_dataset
from air_core.settings import components


@cache
def _made(function: Callable[[], Dataset], name: str, about: str) -> Dataset:
    return replace(function(), name=name, about=about)


# Those of this package.
DATASETS: dict[str, Dataset] = {
    name: _made(components.DATASETS.load(name), name, component.summary)
    for name, component in components.DATASETS.items()
    if not component.source
}


def get_dataset(name: str) -> Dataset:
    """The dataset of this name; `folder:<path>` is a folder with your images (see `image_folder`).

    Raises:
        ValueError: the name is unknown, or the folder is not an image folder.
    """
    if name.startswith(PREFIX):
        return folder_dataset(name)
    component = components.DATASETS.get(name)
    if component is None:
        known = ", ".join(sorted(components.DATASETS))
        raise ValueError(f"unknown dataset {name!r}; known: {known}, or folder:<path>")
    return DATASETS.get(name) or _made(components.DATASETS.load(name), name, component.summary)


def keeps_validation(name: str) -> bool:
    """Whether the validation images of a dataset are for choosing a classifier, so that by default
    no pool has them. Folders of images do; others say it where they are added."""
    known = components.DATASETS.get(name)
    return name.startswith(PREFIX) or (known is not None and "validation" in known.facts)

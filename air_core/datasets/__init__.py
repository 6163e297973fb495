"""Target datasets by name. Importing this package is cheap: only `Dataset.load` opens images.

Datasets define the parts of their source. They do not depend on paradigms or splits.
"""

from __future__ import annotations

from air_core.datasets import (
    cub,
    digits,
    dtd,
    eurosat,
    fashion_mnist,
    fgvc_aircraft,
    flowers102,
    resisc45,
)
from air_core.datasets.dataset import Dataset, Examples
from air_core.datasets.image_folder import PREFIX, folder_dataset

__all__ = ["DATASETS", "Dataset", "Examples", "get_dataset"]

DATASETS: dict[str, Dataset] = {
    "digits": digits.DATASET,
    "flowers102": flowers102.DATASET,
    "resisc45": resisc45.DATASET,
    "dtd": dtd.DATASET,
    "cub": cub.DATASET,
    "eurosat": eurosat.DATASET,
    "fgvc_aircraft": fgvc_aircraft.DATASET,
    "fashion_mnist": fashion_mnist.DATASET,
}


def get_dataset(name: str) -> Dataset:
    """The dataset of this name; `folder:<path>` is a folder with your images (see `image_folder`).

    Raises:
        ValueError: the name is unknown, or the folder is not an image folder.
    """
    if name.startswith(PREFIX):
        return folder_dataset(name)
    if name not in DATASETS:
        known = ", ".join(sorted(DATASETS))
        raise ValueError(f"unknown dataset {name!r}; known: {known}, or folder:<path>")
    return DATASETS[name]

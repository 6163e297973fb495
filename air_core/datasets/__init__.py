"""Target images by name. Importing this is cheap: images are opened by `Dataset.load` only.

A dataset does not know of paradigms or splits beyond the parts that its source defines.
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
    """A dataset by name; `folder:<path>` is a folder of one's own images (see `image_folder`).

    Raises:
        ValueError: nobody knows it, or the folder is no image folder.
    """
    if name.startswith(PREFIX):
        return folder_dataset(name)
    if name not in DATASETS:
        known = ", ".join(sorted(DATASETS))
        raise ValueError(f"unknown dataset {name!r}; known: {known}, or folder:<path>")
    return DATASETS[name]

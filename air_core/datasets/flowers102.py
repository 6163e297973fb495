"""Oxford 102 Flowers, 8,189 photographs.

The source defines the parts. `setid.mat` lists 1,020 images for train, 1,020 for valid and 6,149
for test, numbered from 1. `imagelabels.mat` has the class of each image, numbered from 1 in the
order of the class names.
"""

from __future__ import annotations

from pathlib import Path

from air_core.datasets.dataset import Counts, Dataset, Listing, Row, listing
from air_core.datasets.places import archive
from air_core.settings.components import DATASETS

LISTS = ("setid.mat", "imagelabels.mat")
PARTS = {"trnid": "train", "valid": "val", "tstid": "test"}


def rows(home: Path, classnames: tuple[str, ...]) -> Listing:
    """All images with label and part; reads only the two .mat files."""
    from scipy.io import loadmat

    lists = [home / name for name in LISTS]
    parts, classes = (loadmat(file, squeeze_me=True) for file in lists)
    labels = dict(enumerate(classes["labels"].tolist(), start=1))
    found = [
        Row(f"jpg/image_{number:05}.jpg", labels[number] - 1, part)
        for key, part in PARTS.items()
        for number in parts[key].tolist()
    ]
    return listing(home, found, classnames, beside=lists)


@DATASETS.add("flowers102", summary="8,189 flowers of 102 kinds")
def flowers102() -> Dataset:
    return archive(
        "flowers102",
        rows,
        homes=("flowers-102",),
        marks=LISTS,
        get="get 102flowers.tgz, imagelabels.mat and setid.mat from "
        "https://www.robots.ox.ac.uk/~vgg/data/flowers/102 into flowers102/flowers-102 and unpack",
        source="https://www.robots.ox.ac.uk/~vgg/data/flowers/102",
        licence="none stated; photographs from the web, for research",
        published=Counts(
            {"train": 1020, "val": 1020, "test": 6149}, source="Nilsback, Zisserman 2008"
        ),
    )

"""Caltech-UCSD Birds-200-2011, 11,788 photographs of 200 kinds.

The source defines train and test: its lists `images.txt`, `image_class_labels.txt` and
`train_test_split.txt` are joined by the number at the start of each line. A fixed rule takes a
tenth of the training part for validation. Class names are those of `classes.txt` in lower case,
without numbers and underscores but with their misspellings, as in the published experiments.
"""

from __future__ import annotations

from pathlib import Path

from air_core.datasets.dataset import Counts, Dataset, Listing, Row, listing
from air_core.datasets.places import archive, read_lines
from air_core.datasets.split_files import with_validation
from air_core.settings.components import DATASETS

LISTS = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")
PARTS = {"1": "train", "0": "test"}


def rows(home: Path, classnames: tuple[str, ...]) -> Listing:
    """All images with label and part; reads only the four lists."""
    lists = [home / name for name in LISTS]
    files, labels, split, classes = map(_numbered, lists)
    label = {number: i for i, number in enumerate(classes)}
    found = [
        Row(f"images/{files[number]}", label[labels[number]], PARTS[split[number]])
        for number in sorted({*files, *labels, *split})
    ]
    return listing(home, with_validation(found), classnames, beside=lists)


def _numbered(file: Path) -> dict[str, str]:  # lines `<number> <text>`
    pairs = (line.partition(" ") for line in read_lines(file))
    return {number: text for number, _, text in pairs}


@DATASETS.add("cub", summary="11,788 birds of 200 kinds")
def cub() -> Dataset:
    return archive(
        "cub",
        rows,
        homes=("CUB_200_2011",),
        marks=("images", "images.txt"),
        get="unpack CUB_200_2011.tgz from https://data.caltech.edu/records/65de6-vp158 in cub/",
        source="https://www.vision.caltech.edu/datasets/cub_200_2011",
        licence="images for non-commercial research and education only",
        published=Counts({"train+val": 5994, "test": 5794}, source="Wah et al. 2011"),
    )

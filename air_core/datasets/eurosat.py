"""EuroSAT (RGB), 27,000 satellite images of 64x64 pixels in ten class folders.

The archive defines no parts. Split files are read from the folder of the class folders or, if that
is the archive's folder, from its parent: `test.txt`, optionally with `train.txt` and `val.txt`, or
CoOp's `split_zhou_EuroSAT.json`. Without split files a fixed, stratified rule takes 5,000 images
for test and 22,000 for training. Published code uses every file of a class folder for training,
test images included; here a test image is never in another part.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

from air_core.datasets.dataset import Counts, Dataset, Listing, listed
from air_core.datasets.places import classnames_of, find_home
from air_core.datasets.split_files import split_listing
from air_core.settings.components import DATASETS

CLASSNAMES = classnames_of("eurosat")
FOLDERS = (  # in the order of the class names
    "AnnualCrop",
    "Forest",
    "HerbaceousVegetation",
    "Highway",
    "Industrial",
    "Pasture",
    "PermanentCrop",
    "Residential",
    "River",
    "SeaLake",
)
GET = "unpack EuroSAT_RGB.zip from https://zenodo.org/records/7711810 in eurosat/"
ARCHIVE = ("2750", "EuroSAT_RGB")  # folder in the archive, old and new
TEST_SHARE = Fraction(5, 27)


def rows(root: Path | None) -> Listing:
    """All images with label and part.

    Raises:
        ValueError: class folders or listed files are missing, or an image has two parts.
    """
    marks = ("AnnualCrop", "SeaLake")
    home = find_home("eurosat", root, (*ARCHIVE, "."), marks, GET)
    beside = [home, home.parent] if home.name in ARCHIVE else [home]
    coop = "split_zhou_EuroSAT.json"
    return split_listing("eurosat", home, FOLDERS, CLASSNAMES, beside, TEST_SHARE, coop)


@DATASETS.add("eurosat", summary="27,000 satellite images of 10 land uses")
def eurosat() -> Dataset:
    return listed(
        rows,
        classnames=CLASSNAMES,
        source="https://github.com/phelber/EuroSAT",
        licence="MIT",
        published=Counts({"train+val": 22000, "test": 5000}, source="ELEVATER's split"),
    )

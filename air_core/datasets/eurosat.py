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

from air_core.datasets.dataset import Counts, Dataset, Listing
from air_core.datasets.places import archive
from air_core.datasets.split_files import split_listing
from air_core.settings.components import DATASETS

FOLDERS = (  # in the order of the class names
    *("AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial"),
    *("Pasture", "PermanentCrop", "Residential", "River", "SeaLake"),
)
ARCHIVE = ("2750", "EuroSAT_RGB")  # folder in the archive, old and new
TEST_SHARE = Fraction(5, 27)


def rows(home: Path, classnames: tuple[str, ...]) -> Listing:
    """All images with label and part."""
    return split_listing(home, FOLDERS, classnames, ARCHIVE, TEST_SHARE)


@DATASETS.add("eurosat", summary="27,000 satellite images of 10 land uses")
def eurosat() -> Dataset:
    return archive(
        "eurosat",
        rows,
        homes=ARCHIVE,
        marks=("AnnualCrop", "SeaLake"),
        get="unpack EuroSAT_RGB.zip from https://zenodo.org/records/7711810 in eurosat/",
        source="https://github.com/phelber/EuroSAT",
        licence="MIT",
        published=Counts({"train+val": 22000, "test": 5000}, source="ELEVATER's split"),
    )

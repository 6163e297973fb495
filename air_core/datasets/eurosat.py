"""EuroSAT (RGB), 27,000 satellite images of 64x64 pixels in ten class folders.

The archive defines no parts. Split files are read where they lie beside the class folders or, if
those are in the archive's own folder, beside that: `test.txt`, with `train.txt` and `val.txt` or
without, or CoOp's `split_zhou_EuroSAT.json`. Else 5,000 images are for test and 22,000 for
training, by a fixed rule and stratified. Published code lists every file of a class folder for
training, test images included; here a test image is in no other part, whatever the files say.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

from air_core.datasets.dataset import TEMPLATE, Dataset, Listing
from air_core.datasets.places import classnames_of, find_home
from air_core.datasets.split_files import find_split, split_listing

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
ARCHIVE = ("2750", "EuroSAT_RGB")  # what the archive unpacks to, by its age
TEST_SHARE = Fraction(5, 27)


def rows(root: Path | None) -> Listing:
    """All images with label and part.

    Raises:
        ValueError: class folders or listed files are missing, or an image has two parts.
    """
    marks = ("AnnualCrop", "SeaLake")
    home = find_home("eurosat", root, (*ARCHIVE, "."), marks, GET)
    beside = [home, home.parent] if home.name in ARCHIVE else [home]
    split = find_split("eurosat", beside, coop="split_zhou_EuroSAT.json")
    return split_listing("eurosat", home, FOLDERS, CLASSNAMES, split, TEST_SHARE)


DATASET = Dataset(
    name="eurosat",
    about="27,000 satellite images of 10 land uses",
    classnames=CLASSNAMES,
    template=TEMPLATE,
    recipe=1,
    source="https://github.com/phelber/EuroSAT",
    licence="MIT",
    files=lambda root: rows(root).files,
    load=lambda root: rows(root).examples(),
    split="split files if there; else fixed: 22,000 train, of which a tenth val, and 5,000 test",
    get=GET,
)

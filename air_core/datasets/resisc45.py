"""NWPU-RESISC45, 31,500 aerial images, 700 of each class, in 45 class folders.

The archive defines no parts. Split files are read from the folder of the class folders or from the
parent of NWPU-RESISC45: `train.txt`, `val.txt` and `test.txt` with lines like `airplane_001.jpg`,
or ELEVATER's `train.json` and `test.json`. Without split files a fixed, stratified rule takes 6,300
images for training and 25,200 for test. TorchGeo's files `resisc45-train.txt` and so on are not
read, since their split of 18,900, 6,300 and 6,300 images is not the published protocol.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

from air_core.datasets.dataset import Counts, Dataset, Listing
from air_core.datasets.places import archive
from air_core.datasets.split_files import split_listing
from air_core.settings.components import DATASETS

ARCHIVE = "NWPU-RESISC45"
TEST_SHARE = Fraction(4, 5)


def rows(home: Path, classnames: tuple[str, ...]) -> Listing:
    """All images with label and part."""
    folders = [name.replace(" ", "_") for name in classnames]
    return split_listing(home, folders, classnames, (ARCHIVE,), TEST_SHARE)


@DATASETS.add("resisc45", summary="31,500 aerial images of 45 scenes")
def resisc45() -> Dataset:
    return archive(
        "resisc45",
        rows,
        homes=(ARCHIVE,),
        marks=("airplane", "wetland"),
        get="unpack NWPU-RESISC45 from https://huggingface.co/datasets/torchgeo/resisc45 in "
        "resisc45/",
        source="https://gcheng-nwpu.github.io/#Datasets (Cheng, Han and Lu 2017)",
        licence="for research; TorchGeo's copy states CC BY-NC 4.0",
        published=Counts({"train+val": 6300, "test": 25200}, 700, "ELEVATER's split"),
    )

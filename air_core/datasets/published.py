"""Published sizes of the datasets by part, which `airsweep check` compares with the files.

Sizes of training pools follow GRIP and CPL, which use train and val together.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Counts:
    """A dataset's size. A key of `parts` is one part, or several that are counted together."""

    classes: int
    parts: dict[str, int]
    each: int | None = None  # images per class, if the same for all classes
    source: str = ""


PUBLISHED = {
    "digits": Counts(10, {"free": 1617, "val": 180}, source="scikit-learn"),
    "flowers102": Counts(
        102, {"train": 1020, "val": 1020, "test": 6149}, source="Nilsback and Zisserman 2008"
    ),
    "dtd": Counts(
        47, {"train": 1880, "val": 1880, "test": 1880}, each=120, source="Cimpoi et al. 2014"
    ),
    "eurosat": Counts(
        10, {"train+val": 22000, "test": 5000}, source="ELEVATER's split, without test images"
    ),
    "fgvc_aircraft": Counts(
        100, {"train": 3334, "val": 3333, "test": 3333}, each=100, source="Maji et al. 2013"
    ),
    "resisc45": Counts(45, {"train+val": 6300, "test": 25200}, each=700, source="ELEVATER's split"),
    "cub": Counts(200, {"train+val": 5994, "test": 5794}, source="Wah et al. 2011"),
    "fashion_mnist": Counts(
        10, {"train+val": 60000, "test": 10000}, each=7000, source="Xiao et al. 2017"
    ),
}

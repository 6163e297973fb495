"""Oxford 102 Flowers, 8,189 photographs.

The source defines the parts. `setid.mat` lists 1,020 images for train, 1,020 for valid and 6,149
for test, numbered from 1. `imagelabels.mat` has the class of each image, numbered from 1 in the
order of the class names.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from air_core.datasets.dataset import Counts, Dataset, Listing, Row, listed, listing
from air_core.datasets.places import classnames_of, find_home
from air_core.settings.components import DATASETS

CLASSNAMES = classnames_of("flowers102")
GET = (
    "get 102flowers.tgz, imagelabels.mat and setid.mat from "
    "https://www.robots.ox.ac.uk/~vgg/data/flowers/102 into flowers102/flowers-102 and unpack"
)
PARTS = {"trnid": "train", "valid": "val", "tstid": "test"}


def rows(root: Path | None) -> Listing:
    """All images with label and part; reads only the two .mat files.

    Raises:
        ValueError: they are damaged, or files are missing.
    """
    marks = ("setid.mat", "imagelabels.mat")
    home = find_home("flowers102", root, ("flowers-102", "."), marks, GET)
    numbers = _arrays(home / "setid.mat", PARTS)
    (labels,) = _arrays(home / "imagelabels.mat", ("labels",)).values()
    if last := [n for of in numbers.values() for n in of if not 0 < n <= len(labels)]:
        raise ValueError(
            f"flowers102: {home / 'setid.mat'} lists image {last[0]}, but imagelabels.mat has "
            f"{len(labels):,} labels; get both files again"
        )
    return listing(
        "flowers102",
        home,
        [
            Row(f"jpg/image_{number:05}.jpg", labels[number - 1] - 1, part)
            for key, part in PARTS.items()
            for number in numbers[key]
        ],
        CLASSNAMES,
        beside=[home / mark for mark in marks],
    )


def _arrays(file: Path, names: Iterable[str]) -> dict[str, list[int]]:
    from scipy.io import loadmat

    try:
        content = loadmat(file, squeeze_me=True)
        return {name: [int(value) for value in content[name]] for name in names}
    except Exception as problem:  # scipy raises any exception on damaged bytes
        raise ValueError(
            f"flowers102: {file} cannot be read ({type(problem).__name__}: {problem}); get it again"
        ) from problem


@DATASETS.add("flowers102", summary="8,189 flowers of 102 kinds")
def flowers102() -> Dataset:
    return listed(
        rows,
        classnames=CLASSNAMES,
        source="https://www.robots.ox.ac.uk/~vgg/data/flowers/102",
        licence="none stated; photographs from the web, for research",
        published=Counts(
            {"train": 1020, "val": 1020, "test": 6149}, source="Nilsback, Zisserman 2008"
        ),
    )

"""Describable Textures, 5,640 images.

Parts are the first of the source's ten partitions, which published results use: `train1.txt`,
`val1.txt` and `test1.txt` with 40 images per class each and lines `<class>/<file>`.
"""

from __future__ import annotations

from pathlib import Path

from air_core.datasets.dataset import Counts, Dataset, Listing
from air_core.datasets.places import archive
from air_core.datasets.split_files import PARTS, lists_listing
from air_core.settings.components import DATASETS


def rows(home: Path, classnames: tuple[str, ...]) -> Listing:
    """All images with label and part; reads only the three lists."""
    lists = {part: home / "labels" / f"{part}1.txt" for part in PARTS}
    return lists_listing(
        home, lists, classnames, lambda line: (f"images/{line}", line.partition("/")[0])
    )


@DATASETS.add("dtd", summary="5,640 textures of 47 kinds")
def dtd() -> Dataset:
    return archive(
        "dtd",
        rows,
        homes=("dtd",),
        marks=("labels",),
        get="unpack https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz in dtd/",
        source="https://www.robots.ox.ac.uk/~vgg/data/dtd",
        licence="for research purposes",
        published=Counts({"train": 1880, "val": 1880, "test": 1880}, 120, "Cimpoi et al. 2014"),
    )

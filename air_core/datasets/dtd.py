"""Describable Textures, 5,640 images.

Parts are the first of the source's ten partitions, which published results use: `train1.txt`,
`val1.txt` and `test1.txt` with 40 images per class each and lines `<class>/<file>`.
"""

from __future__ import annotations

from pathlib import Path

from air_core.datasets.dataset import TEMPLATE, Dataset, Listing, Row, listing
from air_core.datasets.places import classnames_of, find_home, read_lines

CLASSNAMES = classnames_of("dtd")
GET = "unpack https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz in dtd/"


def rows(root: Path | None) -> Listing:
    """All images with label and part; reads only the three lists.

    Raises:
        ValueError: a list names an unknown class, or files are missing.
    """
    home = find_home("dtd", root, ("dtd", "."), ("labels",), GET)
    lists = {part: home / "labels" / f"{part}1.txt" for part in ("train", "val", "test")}
    label = {name: i for i, name in enumerate(CLASSNAMES)}
    found = []
    for part, file in lists.items():
        for line in read_lines("dtd", file):
            folder = line.partition("/")[0]
            if folder not in label:
                raise ValueError(f"dtd: {file} names {line}, but {folder!r} is none of 47 textures")
            found.append(Row(f"images/{line}", label[folder], part))
    return listing("dtd", home, found, CLASSNAMES, beside=lists.values())


DATASET = Dataset(
    name="dtd",
    about="5,640 textures of 47 kinds",
    classnames=CLASSNAMES,
    template=TEMPLATE,
    recipe=1,
    source="https://www.robots.ox.ac.uk/~vgg/data/dtd",
    licence="for research purposes",
    files=lambda root: rows(root).files,
    load=lambda root: rows(root).examples(),
    split="the source's first partition: 1,880 train, 1,880 val, 1,880 test",
    get=GET,
)

"""Caltech-UCSD Birds-200-2011, 11,788 photographs of 200 kinds.

The source defines train and test: its lists `images.txt`, `image_class_labels.txt` and
`train_test_split.txt` are joined by the number at the start of each line. A fixed rule takes a
tenth of the training part for validation. Class names are those of `classes.txt` in lower case,
without numbers and underscores but with their misspellings, as in the published experiments.
"""

from __future__ import annotations

from pathlib import Path

from air_core.datasets.dataset import Counts, Dataset, Listing, Row, listed, listing, some
from air_core.datasets.places import classnames_of, find_home, read_lines
from air_core.datasets.split_files import with_validation
from air_core.settings.components import DATASETS

CLASSNAMES = classnames_of("cub")
GET = "unpack CUB_200_2011.tgz from https://data.caltech.edu/records/65de6-vp158 in cub/"
LISTS = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")
PARTS = {"1": "train", "0": "test"}


def rows(root: Path | None) -> Listing:
    """All images with label and part; reads only the four lists.

    Raises:
        ValueError: the lists do not match each other, or files are missing.
    """
    home = find_home("cub", root, ("CUB_200_2011", "."), ("images", "images.txt"), GET)
    files, labels, split, classes = (_numbered(home / name) for name in LISTS)
    names = tuple(_classname(text) for text in classes.values())
    if names != CLASSNAMES:
        other = next((n for n in names if n not in CLASSNAMES), "another number or order of them")
        raise ValueError(f"cub: {home / 'classes.txt'} has other classes: {other}")
    if not files.keys() == labels.keys() == split.keys():
        raise ValueError(
            f"cub: the lists in {home} number {len(files):,} images, {len(labels):,} labels and "
            f"{len(split):,} parts; they must be the same numbers, unpack the archive again"
        )
    label = {number: i for i, number in enumerate(classes)}
    for file, values, known in (
        ("image_class_labels", labels, label),
        ("train_test_split", split, PARTS),
    ):
        if unknown := sorted(set(values.values()) - set(known)):
            raise ValueError(
                f"cub: {home / file}.txt has the value {unknown[0]!r}; allowed: "
                f"{some(list(known))}; unpack the archive again"
            )
    found = [
        Row(f"images/{path}", label[labels[number]], PARTS[split[number]])
        for number, path in files.items()
    ]
    return listing(
        "cub", home, with_validation(found), CLASSNAMES, beside=[home / name for name in LISTS]
    )


def _numbered(file: Path) -> dict[str, str]:  # lines `<number> <text>`
    pairs = (line.partition(" ") for line in read_lines("cub", file))
    return {number: text for number, _, text in pairs}


def _classname(text: str) -> str:  # 001.Black_footed_Albatross -> black footed albatross
    return text.rpartition(".")[2].replace("_", " ").lower()


@DATASETS.add("cub", summary="11,788 birds of 200 kinds")
def cub() -> Dataset:
    return listed(
        rows,
        classnames=CLASSNAMES,
        source="https://www.vision.caltech.edu/datasets/cub_200_2011",
        licence="images for non-commercial research and education only",
        published=Counts({"train+val": 5994, "test": 5794}, source="Wah et al. 2011"),
    )

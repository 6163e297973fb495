"""FGVC-Aircraft, 10,000 photographs of 100 variants.

The source defines the parts: `images_variant_<part>.txt` with lines `<number> <variant>`. Class
names are the variants with "-" for "/", so F-16A/B is "F-16A-B", as in the published experiments,
which use folder names as class names. The order is also that of the published experiments, not of
the archive's `variants.txt`. Results are therefore comparable.
"""

from __future__ import annotations

from pathlib import Path

from air_core.datasets.dataset import Counts, Dataset, Listing, listed
from air_core.datasets.places import classnames_of, find_home
from air_core.datasets.split_files import PARTS, lists_listing
from air_core.settings.components import DATASETS

CLASSNAMES = classnames_of("fgvc_aircraft")
GET = (
    "unpack https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/archives/"
    "fgvc-aircraft-2013b.tar.gz in fgvc_aircraft/"
)
HOMES = ("fgvc-aircraft-2013b/data", "data", ".")


def rows(root: Path | None) -> Listing:
    """All images with label and part; reads only the three lists.

    Raises:
        ValueError: a list names an unknown variant, or files are missing.
    """
    marks = ("images", "images_variant_test.txt")
    home = find_home("fgvc_aircraft", root, HOMES, marks, GET)
    lists = {part: home / f"images_variant_{part}.txt" for part in PARTS}
    return lists_listing("fgvc_aircraft", home, lists, CLASSNAMES, _image)


def _image(line: str) -> tuple[str, str]:  # path and class name
    number, _, variant = line.partition(" ")
    return f"images/{number}.jpg", variant.replace("/", "-")


@DATASETS.add("fgvc_aircraft", summary="10,000 aircraft of 100 variants")
def fgvc_aircraft() -> Dataset:
    return listed(
        rows,
        classnames=CLASSNAMES,
        source="https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft",
        licence="non-commercial research only",
        published=Counts({"train": 3334, "val": 3333, "test": 3333}, 100, "Maji et al. 2013"),
    )

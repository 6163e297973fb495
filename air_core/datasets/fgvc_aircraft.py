"""FGVC-Aircraft, 10,000 photographs of 100 variants.

The source defines the parts: `images_variant_<part>.txt` with lines `<number> <variant>`. Class
names are the variants with "-" for "/", so F-16A/B is "F-16A-B", as in the published experiments,
which use folder names as class names. The order is also that of the published experiments, not of
the archive's `variants.txt`. Results are therefore comparable.
"""

from __future__ import annotations

from pathlib import Path

from air_core.datasets.dataset import Counts, Dataset, Listing
from air_core.datasets.places import archive
from air_core.datasets.split_files import PARTS, lists_listing
from air_core.settings.components import DATASETS


def rows(home: Path, classnames: tuple[str, ...]) -> Listing:
    """All images with label and part; reads only the three lists."""
    lists = {part: home / f"images_variant_{part}.txt" for part in PARTS}
    return lists_listing(home, lists, classnames, _image)


def _image(line: str) -> tuple[str, str]:  # path and class name
    number, _, variant = line.partition(" ")
    return f"images/{number}.jpg", variant.replace("/", "-")


@DATASETS.add("fgvc_aircraft", summary="10,000 aircraft of 100 variants")
def fgvc_aircraft() -> Dataset:
    return archive(
        "fgvc_aircraft",
        rows,
        homes=("fgvc-aircraft-2013b/data", "data"),
        marks=("images", "images_variant_test.txt"),
        get="unpack https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/archives/"
        "fgvc-aircraft-2013b.tar.gz in fgvc_aircraft/",
        source="https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft",
        licence="non-commercial research only",
        published=Counts({"train": 3334, "val": 3333, "test": 3333}, 100, "Maji et al. 2013"),
    )

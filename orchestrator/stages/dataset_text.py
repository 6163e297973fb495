"""Class names and template of a dataset as of the time when its images were encoded.

A user may rename a class or edit `template.txt` while a sweep runs, or move the folder afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from air_core.datasets import get_dataset
from air_core.datasets.class_folders import skipped_text
from air_core.datasets.image_folder import OWNERS, PREFIX
from air_core.datasets.images import ImageFiles
from air_core.settings import Ref
from air_core.tools.printable import printable
from orchestrator.errors import DamagedArtifact, MissingArtifact
from orchestrator.keys import Keyed
from orchestrator.store import ArtifactStore

if TYPE_CHECKING:
    from orchestrator.stages.features import FeaturesSpec
    from orchestrator.stages.trial import TrialSpec

SHOWN = 3  # names of unreadable images in a text


@dataclass(frozen=True)
class DatasetText:
    """The text of a dataset that CLIP encodes: class names in the order of labels, and template."""

    classnames: tuple[str, ...]
    template: str


def read_dataset_text(features: FeaturesSpec, store: ArtifactStore) -> DatasetText:
    """Read the text from the record of the features, else from the dataset.

    The dataset is read if the features are missing.

    Raises:
        ValueError: neither the record nor the dataset has the text.
    """
    recorded = recorded_text(features, store)
    if recorded is not None:
        return recorded
    dataset = get_dataset(features.dataset.name)
    return DatasetText(dataset.classnames, dataset.template)


def recorded_text(features: FeaturesSpec, store: ArtifactStore) -> DatasetText | None:
    """Read the text from the record of the features; None if they are missing."""
    with suppress(MissingArtifact):
        info = store.record(features)["info"]
        return DatasetText(tuple(info["classnames"]), info["template"])
    return None


@dataclass(frozen=True)
class UnusedImages:
    """Files of a dataset that no trial reads, as of the time when its images were encoded."""

    unreadable: int
    files: Mapping[str, str]  # reasons of the first unreadable images, by path in the dataset
    skipped: Mapping[str, int]  # files by kind, see `Dataset.skipped`

    def __bool__(self) -> bool:
        return bool(self.unreadable or self.skipped)

    def __str__(self) -> str:
        """Such as `2 unreadable (cat/3.png, dog/7.png); skipped: 3 .heic, 1 in subfolders`."""
        parts = []
        if self.unreadable:
            names = [*map(printable, [*self.files][:SHOWN])]
            names += ["..."] if len(self.files) > SHOWN else []
            parts.append(f"{self.unreadable:,} unreadable ({', '.join(names)})")
        if self.skipped:
            parts.append(f"skipped: {skipped_text(self.skipped)}")
        return "; ".join(parts)


def unused_images(features: Keyed, store: ArtifactStore) -> UnusedImages:
    """Read the unused images from the record of the features; none if it is missing or damaged."""
    info: Mapping[str, Any] = {}
    with suppress(MissingArtifact, DamagedArtifact):
        info = store.record(features)["info"]
    return UnusedImages(
        info.get("unreadable", 0), info.get("unreadable_files", {}), info.get("skipped", {})
    )


def unused_by_dataset(
    features: Iterable[tuple[str, Keyed]], store: ArtifactStore
) -> dict[str, UnusedImages]:
    """The datasets, given by name with their features, that have unused images."""
    found = {dataset_description(name): unused_images(key, store) for name, key in features}
    return {name: unused for name, unused in found.items() if unused}


def tested_classes(trial: TrialSpec, store: ArtifactStore) -> tuple[str, ...]:
    """Class names of a trial's test images, in the order of labels."""
    if trial.test_features is None:
        return trial.classnames
    return read_dataset_text(trial.test_features, store).classnames


def dataset_description(dataset: str) -> str:
    """A short description of a dataset; its name if its folder does not exist any more."""
    try:
        return get_dataset(dataset).about
    except ValueError:
        return dataset


def images_text(dataset: Ref) -> str:
    """Number of images of a user's folder, such as `, 160 images (30 labelled)`; else empty."""
    known = "" if dataset.labelled is None else f" ({dataset.labelled:,} labelled)"
    return f", {dataset.images:,} images{known}" if dataset.name.startswith(PREFIX) else ""


def dataset_licence(dataset: str) -> str:
    """Licence of a dataset's images; that of a user's folder if it does not exist any more."""
    try:
        return get_dataset(dataset).licence
    except ValueError:
        return OWNERS


def image_files(dataset: str, data_root: Path | None) -> Sequence[Path]:
    """The files of a dataset's images, by index; empty if it has none or is not on this machine."""
    try:
        images = get_dataset(dataset).load(data_root).images
    except ValueError:
        return ()
    return images.files if isinstance(images, ImageFiles) else ()

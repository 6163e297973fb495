"""Class names and template of a dataset as of the time when its images were encoded.

A user may rename a class or edit `template.txt` while a sweep runs, or move the folder afterwards.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from air_core.datasets import get_dataset
from air_core.datasets.image_folder import OWNERS
from air_core.specs import FeaturesSpec, TrialSpec
from orchestrator.errors import MissingArtifact
from orchestrator.store import ArtifactStore


@dataclass(frozen=True)
class DatasetText:
    """The text of a dataset that CLIP encodes: class names in the order of labels, and template."""

    classnames: tuple[str, ...]
    template: str


def read_dataset_text(features: FeaturesSpec, store: ArtifactStore) -> DatasetText:
    """Read the text from the record of the features, else from the dataset.

    The dataset is read if the features are missing, or if an earlier version wrote their record.

    Raises:
        ValueError: neither the record nor the dataset has the text.
    """
    recorded = recorded_text(features, store)
    if recorded is not None:
        return recorded
    dataset = get_dataset(features.dataset.name)
    return DatasetText(dataset.classnames, dataset.template)


def recorded_text(features: FeaturesSpec, store: ArtifactStore) -> DatasetText | None:
    """Read the text from the record of the features; None if it has none."""
    with suppress(MissingArtifact):
        info = store.record(features)["info"]
        if "template" in info:
            return DatasetText(tuple(info["classnames"]), info["template"])
    return None


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


def dataset_licence(dataset: str) -> str:
    """Licence of a dataset's images; that of a user's folder if it does not exist any more."""
    try:
        return get_dataset(dataset).licence
    except ValueError:
        return OWNERS

"""Class names and template of a dataset, as they were when its images were encoded.

A user may rename a class or edit `template.txt` while a sweep runs, or move the folder after it.
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
    """What CLIP reads of a dataset: the classes in the order of labels, and the template."""

    classnames: tuple[str, ...]
    template: str


def text_of(features: FeaturesSpec, store: ArtifactStore) -> DatasetText:
    """Of the record of the features; before there is one, or if it is of an earlier version, of
    the dataset itself.

    Raises:
        ValueError: neither is there.
    """
    recorded = recorded_text(features, store)
    if recorded is not None:
        return recorded
    dataset = get_dataset(features.dataset.name)
    return DatasetText(dataset.classnames, dataset.template)


def recorded_text(features: FeaturesSpec, store: ArtifactStore) -> DatasetText | None:
    """Of the record of the features alone."""
    with suppress(MissingArtifact):
        info = store.record(features)["info"]
        if "template" in info:
            return DatasetText(tuple(info["classnames"]), info["template"])
    return None


def tested_classes(trial: TrialSpec, store: ArtifactStore) -> tuple[str, ...]:
    """Classes of the images that a trial is tested on, in the order of labels."""
    if trial.test_features is None:
        return trial.classnames
    return text_of(trial.test_features, store).classnames


def about(dataset: str) -> str:
    """A few words on a dataset; of a folder that is gone its name."""
    try:
        return get_dataset(dataset).about
    except ValueError:
        return dataset


def licence(dataset: str) -> str:
    """Of its images; those of a folder that is gone are its owner's too."""
    try:
        return get_dataset(dataset).licence
    except ValueError:
        return OWNERS

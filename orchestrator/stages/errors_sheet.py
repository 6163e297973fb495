"""A sheet of the wrongly predicted test images of which a classifier is surest."""

from __future__ import annotations

from contextlib import suppress

import numpy as np

from air_core.datasets.images import Unreadable
from air_core.specs import TrialSpec
from orchestrator.planning.dataset_text import tested_classes
from orchestrator.stages.context import WorkerContext
from orchestrator.stages.pictures import PER_LINE, Tile, captioned_sheet, numbered_lines
from orchestrator.store import TrialRecord

LINES = 6


def errors_sheet(
    spec: TrialSpec, record: TrialRecord, classifier: str | None, worker: WorkerContext
) -> bytes:
    """The PNG: wrong images from the surest on, with true and predicted class.

    Args:
        classifier: text, auxiliary or fused; None: the one that `export` selects.

    Raises:
        ValueError: the trial has no such classifier or no wrong test image, or the dataset changed
            or is missing.
    """
    name, key = classifier or record.default_classifier(), record.key[:12]
    arrays = record.test_arrays()
    if f"probability_{name}" not in arrays:
        raise ValueError(
            f"trial {key} has no probabilities of a {name} classifier: it has no such classifier, "
            "or an older version ran it"
        )
    predicted, labels = arrays[name], arrays["labels"]
    sure = arrays[f"probability_{name}"]
    wrong = np.flatnonzero(predicted != labels)
    if not len(wrong):
        raise ValueError(f"trial {key} has no wrong test image")
    order = wrong[np.argsort(-sure[wrong], kind="stable")][: PER_LINE * LINES]
    classes = tested_classes(spec, worker.store)
    dataset = spec.test_dataset or spec.dataset
    images = worker.examples(dataset).images
    tiles: list[Tile] = []
    for i in order.tolist():
        with suppress(Unreadable):
            answer = f"{sure[i]:.0%} {classes[predicted[i]]}"
            tiles.append(Tile(images[int(arrays["index"][i])], classes[labels[i]], answer))
    facts = [
        ("classifier", name),
        ("wrong", f"{len(wrong):,} of {len(labels):,} test images of {dataset.name}"),
    ]
    title = f"Surest errors of trial {key}"
    foot = "under each image: its class, then the probability of the predicted class"
    return captioned_sheet(title, facts, numbered_lines(tiles), foot)

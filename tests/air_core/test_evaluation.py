"""Metrics of a classifier, and the objectives of a search."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from air_core.classifiers import LinearClassifier
from air_core.evaluation import (
    calibrated_temperature,
    calibration_error,
    measured,
    most_probable,
    objectives,
)
from air_core.types import Classes, Encoded, Labelled

pytestmark = pytest.mark.usefixtures("small_chunks")


@pytest.mark.parametrize("unseen", [None, torch.tensor([1, 4, 5])])
def test_the_most_probable_class_is_among_those_of_the_pool_at_a_temperature(unseen):
    logits = 3 * torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    logits[7, 4] = logits[7, 1] = 9.0  # of equal ones the first
    probability, positions = most_probable(logits, Classes(6, unseen), 1.7)
    expected = ((logits if unseen is None else logits[:, unseen]) / 1.7).softmax(dim=1).max(dim=1)
    assert torch.equal(probability, expected.values)
    assert torch.equal(positions, expected.indices)
    assert positions[7] == (1 if unseen is None else 0)


def test_accuracy_is_over_all_images_and_recall_per_class():
    found = measured(torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, 0]), Classes(4))
    assert found.accuracy == 0.5
    assert found.per_class[:2] == (0.5, 0.5)
    assert all(math.isnan(recall) for recall in found.per_class[2:])  # classes without images
    assert found.predictions.tolist() == [0, 0, 1, 2]


def test_the_main_metric_of_trzsl_is_the_harmonic_mean():
    labels = torch.tensor([0, 0, 0, 0, 1, 2])
    found = measured(torch.tensor([0, 0, 0, 3, 1, 0]), labels, Classes(4, torch.tensor([1, 2])))
    assert (found.seen, found.unseen) == (0.75, 0.5)
    assert found.harmonic_mean == found.headline == pytest.approx(0.6)
    assert measured(3 - labels, labels, Classes(4, torch.tensor([1, 2]))).headline == 0.0
    assert measured(labels, labels, Classes(4)).headline == 1.0


# ---------------------------------------------------------------- objectives


def plain(sharpness: float = 5.0) -> LinearClassifier:
    return LinearClassifier(torch.eye(3), torch.zeros(3), torch.zeros(3), False, sharpness)


def some_images(count: int, seed: int) -> Encoded:
    return Encoded(torch.randn(count, 3, generator=torch.Generator().manual_seed(seed)))


def mutual_information(scores: np.ndarray) -> float:
    """I(image; class): mean over images of sum_c p log p, minus the same of the mean p."""
    inside = np.mean([sum(p * math.log(p) for p in row if p > 0) for row in scores])
    return inside - sum(p * math.log(p) for p in scores.mean(axis=0) if p > 0)


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 1000.0])
@pytest.mark.parametrize("unseen", [None, torch.tensor([0, 2])])
def test_mutual_information_over_the_classes_of_the_pool_equals_a_plain_reference(
    sharpness, unseen
):
    pool, classes = some_images(40, 0), Classes(3, unseen)
    scores = classes.columns(plain(sharpness).logits(pool)).softmax(dim=-1)
    expected = pytest.approx(mutual_information(scores.double().numpy()), abs=1e-7)
    assert objectives(plain(sharpness), pool, None, classes) == {"mutual_information": expected}


def test_validation_accuracy_needs_validation_images():
    pool, images = some_images(40, 0), some_images(20, 1)
    labels = images.features.argmax(dim=-1)
    labels[:5] = (labels[:5] + 1) % 3
    found = objectives(plain(), pool, Labelled(images, labels), Classes(3))
    assert found["validation_accuracy"] == 0.75
    assert (
        found["mutual_information"]
        == objectives(plain(), pool, None, Classes(3))["mutual_information"]
    )


# ---------------------------------------------------------------- calibration


def test_at_the_calibrated_temperature_confidence_is_the_accuracy_of_validation_images():
    images = some_images(60, 0)
    labels = torch.where(torch.arange(60) % 3 > 0, images.features.argmax(dim=-1), 0)
    classifier = plain(sharpness=20.0)
    logits = classifier.logits(images)
    right = (logits.argmax(dim=-1) == labels).sum().item()
    temperature = calibrated_temperature(classifier, Labelled(images, labels))
    confidence = (logits / temperature).softmax(dim=-1).amax(dim=-1).mean()
    assert confidence == pytest.approx((right + 1) / 62, abs=1e-3)  # nothing is certain
    assert temperature > 2
    assert calibrated_temperature(classifier, None) == 1.0


def test_the_calibration_error_is_the_distance_of_confidence_and_accuracy_over_bins():
    probability = torch.tensor([0.95, 0.95, 0.95, 0.95, 0.4, 0.4])
    right = torch.tensor([True, True, True, False, True, False])
    expected = 4 / 6 * 0.2 + 2 / 6 * 0.1
    assert calibration_error(probability, right) == pytest.approx(expected, abs=1e-6)
    assert calibration_error(torch.ones(3), torch.ones(3).bool()) == 0.0

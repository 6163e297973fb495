"""Weights of text, auxiliary and evidence by the agreement of their predictions."""

from __future__ import annotations

import math

import pytest
import torch

from air_core.fusion import agreement_weights

CLASSES = 10


def predictions(labels: torch.Tensor, accuracy: float, seed: int) -> torch.Tensor:
    """Predictions of a classifier that errs independently of others."""
    draws = torch.Generator().manual_seed(seed)
    right = torch.rand(len(labels), generator=draws) < accuracy
    other = (labels + torch.randint(1, CLASSES, labels.shape, generator=draws)) % CLASSES
    return torch.where(right, labels, other)


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.randint(CLASSES, (5000,), generator=torch.Generator().manual_seed(0))


def test_shares_are_the_log_odds_of_the_hidden_accuracies(labels):
    accuracies = (0.9, 0.5, 0.7)
    votes = [predictions(labels, a, seed) for seed, a in enumerate(accuracies)]
    odds = [math.log(a * (CLASSES - 1) / (1 - a)) for a in accuracies]
    expected = [each / sum(odds) for each in odds]
    assert agreement_weights(votes, CLASSES) == pytest.approx(expected, abs=0.02)
    order = [2, 0, 1]
    shuffled = agreement_weights([votes[i] for i in order], CLASSES)
    assert shuffled == pytest.approx([expected[i] for i in order], abs=0.02)


def test_a_classifier_at_chance_has_almost_no_weight(labels):
    votes = [predictions(labels, a, seed) for seed, a in enumerate((0.8, 0.8, 1 / CLASSES))]
    assert agreement_weights(votes, CLASSES)[2] < 0.03


def test_the_agreement_of_two_does_not_tell_which_is_better(labels):
    votes = [predictions(labels, a, seed) for seed, a in enumerate((0.9, 0.5))]
    assert agreement_weights(votes, CLASSES) == [0.5, 0.5]
    assert agreement_weights(votes[:1], CLASSES) == [1.0]


def test_classifiers_that_agree_everywhere_or_nowhere_have_equal_shares():
    same = torch.arange(30) % CLASSES
    assert agreement_weights([same] * 3, CLASSES) == pytest.approx([1 / 3] * 3)
    apart = [(same + shift) % CLASSES for shift in range(3)]
    assert agreement_weights(apart, CLASSES) == pytest.approx([1 / 3] * 3)

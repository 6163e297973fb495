"""Tests of single strategies; tests/spec/test_components.py has the contract of all."""

from __future__ import annotations

import pytest
import torch

from air_core.pseudo_labels import assign, capacity
from air_core.specs import PseudoLabelSettings


def some_scores(images: int = 120, classes: int = 6, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(images, classes, generator=generator)).softmax(dim=-1)


@pytest.mark.parametrize("kind", ["top_k", "predicted", "candidates"])
@pytest.mark.parametrize("growth", ["fixed", "growing"])
def test_a_class_gets_no_more_images_than_its_slots(kind, growth):
    scores = some_scores()
    settings = PseudoLabelSettings(kind=kind, growth=growth, k=5, alpha=0.7, beta=0.5)
    previous = None
    for iteration in range(4):
        previous = assign(scores, settings, iteration=iteration, iterations=4, previous=previous)
        most = previous.labels.bincount().max().item()
        assert most <= capacity(settings, *scores.shape, iteration, 4)


def test_growth_covers_the_pool_in_the_last_round():
    scores = some_scores(120, 6)
    settings = PseudoLabelSettings(kind="top_k", growth="growing")
    last = assign(scores, settings, iteration=9, iterations=10, previous=None)
    assert len(last) == 120


def test_upl_selects_the_most_confident_images_of_each_predicted_class():
    scores = some_scores(120, 6)
    settings = PseudoLabelSettings(kind="predicted", growth="fixed", k=5)
    labels = assign(scores, settings, iteration=0, iterations=1, previous=None)
    confidence, best = scores.max(dim=1)
    for c in range(6):
        members = (best == c).nonzero().flatten()
        strongest = members[confidence[members].argsort(descending=True)[:5]]
        assert labels.indices[labels.labels == c].tolist() == sorted(strongest.tolist())


def test_no_selected_image_is_an_error_that_names_the_settings():
    scores = torch.full((0, 3), 1 / 3)
    with pytest.raises(ValueError, match="no pool image was selected"):
        assign(scores, PseudoLabelSettings(kind="top_k"), iteration=0, iterations=1, previous=None)

"""Denoising evidence: time steps, candidates, errors of the tiny model, and probabilities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from air_core.datasets import get_dataset
from air_core.diffusion.denoising import DenoisingScorer, candidate_classes, time_step
from air_core.diffusion.lora import square
from air_core.evidence import balanced, evidence_probabilities, mean_scores
from air_core.settings import EvidenceScoring
from orchestrator.stages.inputs import images_folder

pytestmark = pytest.mark.usefixtures("small_chunks")

SCORING = EvidenceScoring(block=16, precision="fp32")
NAN = float("nan")


@pytest.fixture(scope="module")
def digits() -> Any:
    return get_dataset("digits").load(None)


@pytest.fixture(scope="module")
def scorer() -> DenoisingScorer:
    return DenoisingScorer(
        Path(images_folder("tiny")), SCORING, get_dataset("digits").classnames, 32
    )


@pytest.fixture(scope="module")
def latents(scorer, digits) -> torch.Tensor:
    pixels = np.stack([square(digits.images[i], 32) for i in range(40)])
    return scorer.latents(torch.from_numpy(pixels))


def test_any_first_time_steps_spread_over_the_range():
    for count in (1, 3, 8, 20):
        steps = [time_step(draw, 0.2, 0.8, 1000) for draw in range(count)]
        assert len({*steps}) == count
        assert min(steps) >= 200
        assert max(steps) < 800
        gaps = np.diff(sorted([200, *steps, 800]))
        assert gaps.max() <= 2 * 600 / (count + 1)
    assert time_step(0, 1.0, 1.0, 1000) == 999


def test_an_error_does_not_depend_on_the_other_images_of_the_batch(scorer, latents):
    """So a block is scored alike whatever was scored before."""
    every = torch.ones(40, 10, dtype=torch.bool)
    whole = scorer.errors(latents, range(40), 2, every)
    part = scorer.errors(latents[5:9], range(5, 9), 2, every[:4])
    assert torch.allclose(whole[5:9], part, atol=1e-5)
    assert not torch.allclose(whole, scorer.errors(latents, range(40), 3, every), atol=1e-3)
    again = scorer.errors(latents, range(40), 2, every)
    assert torch.equal(whole, again)


def test_the_evidence_recognises_digits_without_any_label(scorer, latents, digits):
    """Chance is 10 %."""
    every = torch.ones(40, 10, dtype=torch.bool)
    errors = torch.stack([scorer.errors(latents, range(40), draw, every) for draw in range(4)])
    predicted = evidence_probabilities(errors, 0.8).argmax(dim=1)
    labels = torch.from_numpy(digits.labels[:40])
    assert (predicted == labels).double().mean() > 0.3


def test_candidates_are_the_best_of_clip_and_then_of_the_first_draws():
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]])
    earlier = np.array([[[0.9, 0.1, 0.2, NAN], [NAN, 0.3, 0.2, 0.1]]], dtype=np.float32)
    assert candidate_classes(logits, None, None, 2).all()
    first = candidate_classes(logits, 3, None, 2)
    assert first.tolist() == [[True, True, True, False], [False, True, True, True]]
    second = candidate_classes(logits, 3, earlier, 2)
    assert second.tolist() == [[False, True, True, False], [False, False, True, True]]


def test_scores_compare_the_classes_that_have_all_draws():
    errors = torch.tensor([[[0.5, 0.4, 0.9]], [[0.1, 0.4, NAN]]])  # (2 draws, 1 image, 3 classes)
    assert mean_scores(errors).tolist()[0] == pytest.approx([0.0, -0.1, -float("inf")])


def test_probabilities_have_the_confidence_and_skip_what_was_not_scored():
    generator = torch.Generator().manual_seed(0)
    errors = torch.rand(3, 200, 5, generator=generator)
    errors[:, 7] = NAN
    errors[:, 8, 2] = NAN
    q = evidence_probabilities(errors, 0.6)
    assert q[7].isnan().all()
    assert q[8, 2] == 0
    scored = torch.arange(200) != 7
    assert q[scored].amax(dim=1).mean().item() == pytest.approx(0.6, abs=1e-3)
    assert torch.allclose(q[scored].sum(dim=1), torch.ones(199))


def test_balancing_gives_each_class_its_share_of_the_scored_images():
    generator = torch.Generator().manual_seed(1)
    q = (3 * torch.rand(300, 4, generator=generator) + torch.tensor([2.0, 0, 0, 0])).softmax(dim=1)
    q[::5] = NAN
    even = balanced(torch.cat([q, 0 * q[:, :1]], dim=1))  # a class without any score keeps none
    assert even[::5].isnan().all()
    even = even[~even[:, 0].isnan()]
    assert even.sum(dim=0).tolist() == pytest.approx([60.0] * 4 + [0.0], rel=1e-3)
    assert even.sum(dim=1).tolist() == pytest.approx([1.0] * 240, rel=1e-4)

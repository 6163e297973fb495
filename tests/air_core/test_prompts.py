"""Prompt learners, beside the contract that all keep (orchestrator.planning.contracts)."""

from __future__ import annotations

import pytest
import torch

from air_core.prompts import PromptLearner, build_learner
from air_core.settings import PromptSettings
from air_core.settings.components import LEARNERS
from air_core.types import Encoded

TEMPLATE = "a photo of a {}"
NAMES = ("digit zero", "digit seven", "ankle_boot")


def learner(tiny_clip, modality: str = "text", seed: int = 0, length: int = 4) -> PromptLearner:
    settings = PromptSettings(length=length)
    return build_learner(modality, settings, tiny_clip, NAMES, TEMPLATE, seed)


def some_images(tiny_clip, count: int = 5) -> Encoded:
    width = tiny_clip.model.text_projection.shape[1]
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(count, width, generator=generator)
    tokens = torch.randn(count, 17, tiny_clip.vision.width, generator=generator)
    return Encoded(torch.nn.functional.normalize(features, dim=-1), tokens)


@pytest.mark.parametrize("modality", LEARNERS)
def test_another_seed_gives_another_initial_prompt(tiny_clip, modality):
    """But for a learner that starts at 0."""
    one, other = (learner(tiny_clip, modality, seed).prompt for seed in (1, 2))
    assert not torch.equal(one, other) or not one.any()


@pytest.mark.parametrize("length", [1, 16])
def test_a_text_prompt_has_length_vectors_near_zero(tiny_clip, length):
    context = learner(tiny_clip, length=length).prompt
    assert context.shape == (length, tiny_clip.token_width)
    assert context.std().item() == pytest.approx(0.02, rel=0.3)
    assert context.mean().abs().item() < 0.01


def test_a_visual_prompt_is_near_zero_and_deep_ones_have_tokens_for_every_block(tiny_clip):
    width, layers = tiny_clip.vision.width, tiny_clip.vision.layers
    for depth, shape in (("shallow", (8, width)), ("deep", (layers, 8, width))):
        settings = PromptSettings(length=8, depth=depth)
        one = build_learner("visual", settings, tiny_clip, NAMES, TEMPLATE, 0)
        assert one.prompt.shape == shape
        assert 0 < one.prompt.std() < 1.1 * width**-0.5
        assert one.logits(some_images(tiny_clip)).shape == (5, len(NAMES))

"""Prompts that are learned: one learner a file, all behind one protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor
from torch.nn import Parameter

from air_core.backbone import Backbone
from air_core.prompts.text import TextPrompt, text_logits
from air_core.prompts.visual import VisualPrompt
from air_core.specs import PromptSettings
from air_core.types import Batch


class PromptLearner(Protocol):
    """A classifier with something to learn; the backbone stays frozen."""

    def logits(self, batch: Batch) -> Tensor:
        """(N, C), differentiable in the prompt."""
        ...

    @property
    def prompt(self) -> Parameter:
        """All that is learned."""
        ...


def logits_together(learners: Sequence[PromptLearner], batches: Sequence[Batch]) -> list[Tensor]:
    """(N, C) of each learner for its own batch, differentiable in all prompts.

    Text prompts before the same names share one pass of the tower. Others take turns: a visual
    prompt goes with its images, and a pass of those is bound by arithmetic anyway.
    """
    alike = [one for one in learners if type(one) is TextPrompt]
    if len(alike) == len(learners) and len({one.companions for one in alike}) == 1:
        return text_logits(alike, batches)
    return [one.logits(batch) for one, batch in zip(learners, batches, strict=True)]


def build_learner(
    modality: str,
    settings: PromptSettings,
    backbone: Backbone,
    classnames: Sequence[str],
    template: str,
    seed: int,
) -> PromptLearner:
    """A fresh prompt; the same seed gives the same start."""
    if modality == "visual":
        return VisualPrompt(settings, backbone, classnames, template, seed)
    return TextPrompt(settings, backbone, classnames, seed)


def restored_learner(
    modality: str,
    settings: PromptSettings,
    backbone: Backbone,
    classnames: Sequence[str],
    template: str,
    prompt: Tensor,
) -> PromptLearner:
    """A prompt that was learned before, with these classes."""
    learner = build_learner(modality, settings, backbone, classnames, template, seed=0)
    learner.prompt.data.copy_(prompt)
    return learner

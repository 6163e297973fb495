"""Learned prompts: text and visual learners behind one protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor
from torch.nn import Parameter

from air_core.backbone import Backbone
from air_core.components import LEARNERS
from air_core.prompts.text import TextPrompt, text_logits
from air_core.specs import PromptSettings
from air_core.types import Encoded


class PromptLearner(Protocol):
    """A classifier with a learned prompt; the backbone stays frozen.

    A learner is made from its settings, the backbone, class names, template and seed. Together with
    the prompt these give the same logits again; the shape of the prompt depends on them alone.
    """

    def logits(self, batch: Encoded) -> Tensor:
        """(N, C) on the device of the images, differentiable in the prompt.

        In training the images are on the device of the prompt, otherwise on the CPU.
        """
        ...

    @property
    def prompt(self) -> Parameter:
        """The only learned parameter."""
        ...


@runtime_checkable
class StartsFromImages(Protocol):
    """A learner whose prompt starts from the images that it is trained on, such as a cache."""

    def start_from(self, batch: Encoded, targets: Tensor) -> None:
        """Set the prompt before the training of a round.

        Args:
            batch: M images, pseudo-labelled, labelled and synthetic ones.
            targets: (M, C) one-hot, multi-hot or soft.
        """
        ...


def logits_together(learners: Sequence[PromptLearner], batches: Sequence[Encoded]) -> list[Tensor]:
    """(N, C) of each learner for its own batch, differentiable in all prompts.

    Text prompts with the same backbone, length and class names share one pass of the text tower.
    Other learners run one after the other: a visual prompt is encoded together with its images,
    so there is no pass to share.
    """
    texts = [learner for learner in learners if type(learner) is TextPrompt]
    if len(texts) == len(learners) and len({text.pass_key for text in texts}) == 1:
        return text_logits(texts, batches)
    return [learner.logits(batch) for learner, batch in zip(learners, batches, strict=True)]


def build_learner(
    modality: str,
    settings: PromptSettings,
    backbone: Backbone,
    classnames: Sequence[str],
    template: str,
    seed: int,
) -> PromptLearner:
    """A prompt at its start; the same seed gives the same start."""
    learner: PromptLearner = LEARNERS.load(modality)(
        LEARNERS.settings_of(modality, settings), backbone, classnames, template, seed
    )
    return learner


def restored_learner(
    modality: str,
    settings: PromptSettings,
    backbone: Backbone,
    classnames: Sequence[str],
    template: str,
    prompt: Tensor,
) -> PromptLearner:
    """A learner with these classes and a prompt that was learned before."""
    learner = build_learner(modality, settings, backbone, classnames, template, seed=0)
    learner.prompt.data.copy_(prompt)
    return learner

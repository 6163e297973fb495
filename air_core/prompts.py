"""Learned prompts: text and visual learners behind one protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import Parameter

from air_core.backbone import Backbone
from air_core.classifiers import class_texts
from air_core.settings import PromptSettings
from air_core.settings.components import LEARNERS
from air_core.types import Encoded

START_STD = 0.02  # of context vectors


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


class Bundled(Protocol):
    """A learner with the fact `bundled`: a bundle has its prompt and its class texts.

    Logits are the cosine of these image features to the class texts, at CLIP's temperature.
    """

    @staticmethod
    def features(backbone: Backbone, prompt: Tensor, batch: Encoded) -> Tensor:
        """(N, D) of unit length, where the images are; N may be traced by torch.export."""
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


@LEARNERS.add(
    "text",
    summary="CoOp context vectors",
    reads={"length"},
    facts=["context", "transfers", "bundled"],
)
class TextPrompt:
    """Context vectors before the class name, shared by all classes (CoOp, arXiv:2109.01134).

    `[SOS] v1 ... vL classname [EOT]` with v learned; v starts at N(0, 0.02^2).
    """

    def __init__(
        self,
        settings: PromptSettings,
        backbone: Backbone,
        classnames: Sequence[str],
        template: str,
        seed: int,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(settings.length, backbone.token_width, generator=generator)
        self.context = Parameter((START_STD * start).to(backbone.device))  # (L, W)
        self.backbone = backbone
        self.classnames = tuple(classnames)

    def logits(self, batch: Encoded) -> Tensor:
        """(N, C) cosine to each class's text, at CLIP's temperature."""
        [logits] = text_logits([self], [batch])
        return logits

    @staticmethod
    def features(backbone: Backbone, prompt: Tensor, batch: Encoded) -> Tensor:
        """Those of CLIP, since the prompt is in the class texts; see `Bundled`."""
        return batch.features

    @property
    def prompt(self) -> Parameter:
        """(L, W)"""
        return self.context

    @property
    def pass_key(self) -> tuple[int, int, tuple[str, ...]]:
        """Equal for prompts that can share a pass of the text tower."""
        return id(self.backbone), len(self.context), self.classnames


def text_logits(prompts: Sequence[TextPrompt], batches: Sequence[Encoded]) -> list[Tensor]:
    """Logits (N, C) of each prompt for its own batch, from one pass of the text tower.

    The prompts have the same `pass_key`; all batches are on one device, and the logits too.
    """
    backbone, names = prompts[0].backbone, prompts[0].classnames
    contexts = torch.stack([prompt.context for prompt in prompts])  # (R, L, W)
    weights = backbone.encode_context(contexts, names)  # (R, C, D)
    # In training no copy: the images are where the prompt is. Elsewhere the class texts are few.
    weights = weights.to(batches[0].features.device)
    return [
        backbone.logit_scale * batch.features @ weight.T
        for batch, weight in zip(batches, weights, strict=True)
    ]


@LEARNERS.add(
    "visual",
    summary="VPT tokens",
    reads={"length", "depth"},
    facts=["tokens", "transfers", "bundled"],
)
class VisualPrompt:
    """Tokens beside the image patches (VPT, arXiv:2203.12119); class texts stay as they are.

    `[CLS] v1 ... vP patches` with v learned: in the first block, or new ones in each block.
    """

    def __init__(
        self,
        settings: PromptSettings,
        backbone: Backbone,
        classnames: Sequence[str],
        template: str,
        seed: int,
    ) -> None:
        width = backbone.vision.width
        shape = [settings.length, width]
        if settings.depth == "deep":
            shape.insert(0, backbone.vision.layers)
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(*shape, generator=generator)
        self.tokens = Parameter((width**-0.5 * start).to(backbone.device))
        self.backbone = backbone
        self.weight = class_texts(backbone, classnames, template)  # (C, D)

    def logits(self, batch: Encoded) -> Tensor:
        """(N, C) cosine to each class's text, at CLIP's temperature."""
        if not len(batch):  # no test images; the vision tower needs one
            return torch.empty(0, len(self.weight), device=batch.features.device)
        features = self.features(self.backbone, self.tokens, batch)
        return self.backbone.logit_scale * features @ self.weight.T.to(features.device)

    @staticmethod
    def features(backbone: Backbone, prompt: Tensor, batch: Encoded) -> Tensor:
        """Those of images with the prompt beside their patches; see `Bundled`."""
        assert batch.tokens is not None
        parts: Sequence[Tensor] = [batch.tokens]
        if not (torch.is_grad_enabled() or torch.compiler.is_exporting()):
            parts = torch.split(batch.tokens, backbone.at_once)
        return torch.cat([backbone.encode_tokens(each, prompt).to(each.device) for each in parts])

    @property
    def prompt(self) -> Parameter:
        """(P, V); with `depth: deep` (layers, P, V)."""
        return self.tokens

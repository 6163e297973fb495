"""Learned context vectors before the class name, shared by all classes (CoOp, arXiv:2109.01134)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from air_core.backbone import Backbone
from air_core.specs import PromptSettings
from air_core.types import Encoded

START_STD = 0.02


class TextPrompt:
    """`[SOS] v1 ... vL classname [EOT]` with v learned; v starts at N(0, 0.02^2)."""

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

"""Learned context vectors before the class name, shared by all classes (CoOp, arXiv:2109.01134)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from air_core.backbone import Backbone
from air_core.specs import PromptSettings
from air_core.types import Batch

START_STD = 0.02


class TextPrompt:
    """`[SOS] v1 ... vL classname [EOT]` with v learned, started at N(0, 0.02^2)."""

    def __init__(
        self, settings: PromptSettings, backbone: Backbone, classnames: Sequence[str], seed: int
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(settings.length, backbone.token_width, generator=generator)
        self.context = Parameter((START_STD * start).to(backbone.device))  # (L, W)
        self.backbone = backbone
        self.classnames = tuple(classnames)

    def logits(self, batch: Batch) -> Tensor:
        """(N, C) cosine to each class's text, at CLIP's temperature."""
        weight = self.backbone.encode_context(self.context, self.classnames)  # (C, D)
        # Features stay where they are, on the CPU; the few class texts come to them.
        return self.backbone.logit_scale * batch.features @ weight.to(batch.features.device).T

    @property
    def prompt(self) -> Parameter:
        """(L, W)"""
        return self.context

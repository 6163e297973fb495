"""Learned tokens beside the image patches (VPT, arXiv:2203.12119); class texts stay as they are."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from air_core.backbone import Backbone
from air_core.classifiers import class_texts
from air_core.specs import PromptSettings
from air_core.types import Encoded


class VisualPrompt:
    """`[CLS] v1 ... vP patches` with v learned: in the first block, or new ones in each block."""

    def __init__(
        self,
        settings: PromptSettings,
        backbone: Backbone,
        classnames: Sequence[str],
        template: str,
        seed: int,
    ) -> None:
        width = backbone.patch_width
        shape = [settings.length, width]
        if settings.depth == "deep":
            shape.insert(0, backbone.vision_layers)
        generator = torch.Generator().manual_seed(seed)
        start = STARTS[settings.init](shape, backbone.patch_size, generator)
        self.tokens = Parameter((width**-0.5 * start).to(backbone.device))
        self.backbone = backbone
        self.weight = class_texts(backbone, classnames, template)  # (C, D)

    def logits(self, batch: Encoded) -> Tensor:
        """(N, C) cosine to each class's text, at CLIP's temperature."""
        if batch.tokens is None:
            raise ValueError("a visual prompt needs image tokens; these images have features only")
        if not len(batch):  # no test images; the vision tower needs one
            return torch.empty(0, len(self.weight), device=batch.tokens.device)
        size = len(batch) if torch.is_grad_enabled() else self.backbone.at_once
        parts = torch.split(batch.tokens, max(1, size))
        features = torch.cat([self._encoded(tokens) for tokens in parts])  # (N, D)
        return self.backbone.logit_scale * features @ self.weight.T.to(features.device)

    def _encoded(self, tokens: Tensor) -> Tensor:  # (B, T, V) -> (B, D)
        return self.backbone.encode_tokens(tokens, self.tokens).to(tokens.device)

    @property
    def prompt(self) -> Parameter:
        """(P, V); with `depth: deep` (vision_layers, P, V)."""
        return self.tokens


def _normal(shape: Sequence[int], patch: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator)


def _uniform(shape: Sequence[int], patch: int, generator: torch.Generator) -> Tensor:
    """Xavier's range for a patch of three channels, as in VPT."""
    reach = math.sqrt(6 / (3 * patch * patch + shape[-1]))
    return reach * (2 * torch.rand(*shape, generator=generator) - 1)


STARTS = {"normal": _normal, "uniform": _uniform}

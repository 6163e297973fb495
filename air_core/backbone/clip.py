"""A frozen CLIP behind a few verbs. Knows nothing of prompts that are learned or of datasets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import normalize

from air_core.backbone.blocks import weights_dtype
from air_core.backbone.text import context_encoder
from air_core.backbone.vision import check_vision, patch_tokens, prompted_features

# B images, C classes, D feature width, W token width, L context length; T tokens of an image,
# P learned ones, V their width.

AT_ONCE = 256  # images of a pass without gradient; a device short of memory takes fewer


class Backbone:
    """A frozen CLIP. All features have unit length, and single precision at least.

    Args:
        model: an open_clip model; its weights are frozen here.
        preprocess: PIL image -> (3, H, W).
        tokenizer: open_clip's, with the model's vocabulary.

    Raises:
        ValueError: its text tower takes no learned vectors.
    """

    def __init__(self, model: Any, preprocess: Any, tokenizer: Any) -> None:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.model = model.eval()
        self.preprocess = preprocess
        self.tokenizer = tokenizer
        self.logit_scale = float(model.logit_scale.exp())
        self.at_once = AT_ONCE
        self._text = getattr(model, "text", model)  # some models keep the tower apart
        self._context = context_encoder(self._text, tokenizer)

    @property
    def token_width(self) -> int:
        return int(self._text.token_embedding.weight.shape[1])

    @property
    def device(self) -> torch.device:
        return torch.device(self._text.token_embedding.weight.device)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights of both towers; norms and embeddings may be wider."""
        return weights_dtype(self._text)

    @property
    def patch_width(self) -> int:
        """Width of an image token. This and the next two raise as `image_tokens` does."""
        return int(self._vision.class_embedding.shape[0])

    @property
    def patch_size(self) -> int:
        """Side of a patch, in pixels."""
        return int(self._vision.conv1.kernel_size[0])

    @property
    def vision_layers(self) -> int:
        return len(self._vision.transformer.resblocks)

    @property
    def _vision(self) -> Any:
        check_vision(self.model.visual)
        return self.model.visual

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image]) -> Tensor:
        """(B, D) on the CPU, in the order given."""
        features = []
        for start in range(0, len(images), self.at_once):
            pixels = self._pixels(images[start : start + self.at_once])
            features.append(_unit(self.model.encode_image(pixels)).cpu())
        return torch.cat(features)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """(C, D), one per text."""
        tokens = self.tokenizer(list(texts)).to(self.device)
        return _unit(self.model.encode_text(tokens))

    def encode_context(self, context: Tensor, classnames: Sequence[str]) -> Tensor:
        """Text features of learned vectors before class names.

        Several prompts share one pass, such as the seeds of one point.

        Args:
            context: (..., L, W) learned vectors.
            classnames: C names.

        Returns:
            (..., C, D), differentiable in `context`.

        Raises:
            ValueError: a name does not fit behind the context.

        Source: CoOp (arXiv:2109.01134).
        """
        lead, (length, width) = context.shape[:-2], context.shape[-2:]
        prompts = context.reshape(-1, length, width)
        features = self._context.encode(prompts, tuple(classnames))  # (R, C, D)
        return _unit(features.view(*lead, len(classnames), -1))

    @torch.no_grad()
    def image_tokens(self, images: Sequence[Image], dtype: torch.dtype | None = None) -> Tensor:
        """What images bring to the first block, whatever the prompt: to be stored.

        Args:
            images: B images.
            dtype: of the result; half precision halves the store. None: that of the model.

        Returns:
            (B, T, V) on the CPU: [CLS], then patches.

        Raises:
            ValueError: the vision tower takes no learned tokens.
        """
        tokens = []
        for start in range(0, len(images), self.at_once):
            pixels = self._pixels(images[start : start + self.at_once])
            tokens.append(patch_tokens(self._vision, pixels).to("cpu", dtype or self.dtype))
        return torch.cat(tokens)

    def encode_tokens(self, tokens: Tensor, prompt: Tensor) -> Tensor:
        """Image features with learned tokens beside the patches.

        Args:
            tokens: (B, T, V) from `image_tokens`.
            prompt: (P, V), before the first block; or (vision_layers, P, V), new ones before each
                block. The first are normalised as image tokens were.

        Returns:
            (B, D), differentiable in `prompt`.

        Raises:
            ValueError: a prompt of another shape, or a vision tower that takes none.

        Source: VPT (arXiv:2203.12119), shallow and deep.
        """
        tower = self._vision
        shallow, deep = ("P", self.patch_width), (self.vision_layers, "P", self.patch_width)
        if (*prompt.shape[:-2], "P", prompt.shape[-1]) not in (shallow, deep):
            raise ValueError(
                f"a visual prompt is {shallow} or {deep} here, but this one {tuple(prompt.shape)}"
            )
        tokens = tokens.to(prompt.device, self.dtype)
        return _unit(prompted_features(tower, tokens, prompt.to(self.dtype)))

    def _pixels(self, images: Sequence[Image]) -> Tensor:  # (B, 3, H, W)
        pixels = torch.stack([self.preprocess(image) for image in images])
        return pixels.to(self.device, self.dtype)


def _unit(features: Tensor) -> Tensor:
    """Of length 1, in single precision at least: logits near 30 have no digits in half of it."""
    wide = torch.promote_types(features.dtype, torch.float32)
    return normalize(features.to(wide), dim=-1)

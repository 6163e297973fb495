"""A frozen CLIP: encodes images and texts, with or without learned tokens.

This module depends neither on prompt classes nor on datasets.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import normalize

from air_core.backbone.blocks import weights_dtype
from air_core.backbone.text import context_encoder
from air_core.backbone.vision import VisionTower, vision_tower
from air_core.tools.ahead import computed_ahead

# B images, C classes, D feature width, W token width, L context length; T tokens of an image,
# P learned ones, V their width.

AT_ONCE = 256  # images per pass without gradient; reduced if a device has too little memory
MAX_THREADS = 16  # that open images; each can need 0.5 GB for the largest allowed image

# Images, or tensors (3, H, W) after `preprocess`; threads prepare those of a sequence.
Images = Sequence[Image | Tensor] | Iterator[Tensor]


@contextmanager
def tf32_products(allowed: bool = True) -> Iterator[None]:
    """Let CUDA round the factors of matrix products and convolutions in float32 to TF32.

    A setting of the process; afterwards it is as before. With `allowed` False nothing changes.
    """
    if not allowed:
        yield
        return
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


class Backbone:
    """A frozen CLIP. All features have unit length and at least single precision.

    Args:
        model: an open_clip model; its weights are frozen.
        preprocess: PIL image -> (3, H, W).
        tokenizer: open_clip's tokenizer with the model's vocabulary.

    Attributes:
        at_once: images per pass.
        threads: that open and preprocess images; 0: as many as torch uses.

    Raises:
        ValueError: its text tower does not accept learned vectors.
    """

    def __init__(self, model: Any, preprocess: Any, tokenizer: Any) -> None:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.model = model.eval()
        self.preprocess = preprocess
        self.tokenizer = tokenizer
        self.logit_scale = float(model.logit_scale.exp())
        self.at_once, self.threads = AT_ONCE, 0
        self._decoding = threading.Lock()
        self.precision = "fp32"  # set by `load_backbone`
        self._text = getattr(model, "text", model)  # some models have the text tower as a module
        self._context = context_encoder(self._text, tokenizer)

    @property
    def token_width(self) -> int:
        return int(self._text.token_embedding.weight.shape[1])

    @property
    def device(self) -> torch.device:
        return torch.device(self._text.token_embedding.weight.device)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights of both towers; norms and embeddings can be wider."""
        return weights_dtype(self._text)

    @property
    def uses_tf32(self) -> bool:
        """Whether its products, and those of its gradients, are computed by `tf32_products`.

        Not on a CPU, where "high" may also stand for other kinds of rounding.
        """
        return self.precision == "tf32" and self.device.type == "cuda"

    @property
    def vision(self) -> VisionTower:
        """The image tower, for learned tokens.

        Raises:
            ValueError: it accepts none.
        """
        return vision_tower(self.model.visual)

    @torch.no_grad()
    def encode_images(self, images: Images) -> Tensor:
        """Image features (B, D) on the CPU, in the order of `images`."""
        with tf32_products(self.uses_tf32):
            encode, batches = self.model.encode_image, self._batches(images)
            return torch.cat([_unit(encode(pixels)).cpu() for pixels in batches])

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Text features (C, D), one per text."""
        tokens = self.tokenizer(list(texts)).to(self.device)
        with tf32_products(self.uses_tf32):
            encoded = self.model.encode_text(tokens)
        return _unit(encoded)

    def encode_context(self, context: Tensor, classnames: Sequence[str]) -> Tensor:
        """Text features of class names with learned vectors before them.

        Several prompts, such as those of the seeds of one point, share one pass.

        Args:
            context: (..., L, W) learned vectors.
            classnames: C names.

        Returns:
            (..., C, D), differentiable in `context`.

        Raises:
            ValueError: a name is too long for the space after the context.

        Source: CoOp (arXiv:2109.01134).
        """
        lead, (length, width) = context.shape[:-2], context.shape[-2:]
        prompts = context.reshape(-1, length, width)
        with tf32_products(self.uses_tf32):
            features = self._context.encode(prompts, tuple(classnames))  # (R, C, D)
        return _unit(features.view(*lead, len(classnames), -1))

    @torch.no_grad()
    def image_tokens(self, images: Images, dtype: torch.dtype | None = None) -> Tensor:
        """The image tokens that enter the first block. They do not depend on the prompt, so they
        can be stored.

        Args:
            images: B images.
            dtype: of the result; half precision halves the storage. None: the dtype of the model.

        Returns:
            (B, T, V) on the CPU: patches, in most towers after a [CLS].

        Raises:
            ValueError: the vision tower does not accept learned tokens.
        """
        wanted = dtype or self.dtype
        with tf32_products(self.uses_tf32):
            tokens, batches = self.vision.tokens, self._batches(images)
            return torch.cat([tokens(pixels).to("cpu", wanted) for pixels in batches])

    def encode_tokens(self, tokens: Tensor, prompt: Tensor) -> Tensor:
        """Image features with learned tokens beside the patches.

        Args:
            tokens: (B, T, V) from `image_tokens`.
            prompt: (P, V), tokens before the first block; or (layers, P, V), new tokens
                before each block. Those before the first block are normalised like image tokens.

        Returns:
            (B, D), differentiable in `prompt`.

        Raises:
            ValueError: the tower does not accept learned tokens.

        Source: VPT (arXiv:2203.12119), shallow and deep.
        """
        tokens = tokens.to(prompt.device, self.dtype)
        with tf32_products(self.uses_tf32):
            features = self.vision.features(tokens, prompt.to(self.dtype))
        return _unit(features)

    def prepared(self, images: Sequence[Image | Tensor]) -> Iterator[Tensor]:
        """Images (3, H, W) after `preprocess`, in order. Threads prepare up to `at_once` of them
        before they are needed; several may read `images` at a time."""
        threads = min(self.threads or torch.get_num_threads(), MAX_THREADS)
        return computed_ahead(
            lambda i: self._prepared(images[i]), range(len(images)), threads, self.at_once
        )

    def _prepared(self, image: Image | Tensor) -> Tensor:
        if isinstance(image, Tensor):
            return image
        with self._decoding:  # decoding one image in two threads is not safe
            image.load()
        pixels: Tensor = self.preprocess(image)
        return pixels

    def _batches(self, images: Images) -> Iterator[Tensor]:
        """(B, 3, H, W) each, with `at_once` images, on the device."""
        prepared = self.prepared(images) if isinstance(images, Sequence) else images
        for first in prepared:
            pixels = torch.stack([first, *islice(prepared, self.at_once - 1)])
            yield pixels.to(self.device, self.dtype)


def _unit(features: Tensor) -> Tensor:
    """Scale to length 1, in at least single precision: logits near 30 need more than half."""
    wide = torch.promote_types(features.dtype, torch.float32)
    return normalize(features.to(wide), dim=-1)

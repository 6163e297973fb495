"""Synthetic images: generators, the seeds of images, and the rejection of blank images.

A generator defines an unlimited row of images for every class. The noise of an image depends only
on `image_seed`, so image `index` of a class is the same however many images are drawn. AiR
(arXiv:2504.11930) draws images with a diffusion model that a LoRA adapts to the target domain.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import blake2b
from typing import Protocol

from torch import Tensor

# B images, H height, W width.

# Largest standard deviation of a rejected image, in the 256 levels of a channel. Noise on an empty
# background has more, and drawings and photographs have far more.
FLAT = 4.0
ATTEMPTS = 3  # draws of one image before it is marked as unusable


class ImageGenerator(Protocol):
    """Draws or reads images of named classes."""

    def generate(self, classname: str, indices: Sequence[int], attempts: Sequence[int]) -> Tensor:
        """Draw images of one class as one batch.

        Args:
            classname: of the dataset.
            indices: (B,) positions in the class's row.
            attempts: (B,) number of earlier draws of each position; changes its noise.

        Returns:
            (B, H, W, 3) uint8. Failed images have one colour, see `rejected`.
        """
        ...


def draw(
    generator: ImageGenerator, classname: str, indices: Sequence[int]
) -> tuple[Tensor, list[int], list[bool]]:
    """Draw images of one class as one batch, and repeat the draw for rejected images.

    A repeated draw uses the same batch with the next attempt of the rejected images, and replaces
    only those. After ATTEMPTS draws a rejected image is unusable.

    Returns:
        Images (B, H, W, 3) uint8; the final attempt of each image; whether each image is usable.
    """
    attempts = [0] * len(indices)
    pixels = generator.generate(classname, indices, attempts)
    bad = rejected(pixels)
    for attempt in range(1, ATTEMPTS):
        if not bad.any():
            break
        again = generator.generate(classname, indices, [attempt * one for one in bad.tolist()])
        for slot in bad.nonzero().flatten().tolist():
            pixels[slot] = again[slot]
            attempts[slot] = attempt
        bad = rejected(pixels)
    return pixels, attempts, (~bad).tolist()


def image_seed(generation_seed: int, classname: str, index: int, attempt: int) -> int:
    """63 bits that determine the noise of one image.

    LoRA and guidance do not enter, so images with other settings start from the same noise and can
    be compared pairwise.

    >>> image_seed(0, "digit seven", 3, 0)
    4428387689021003171
    """
    return hashed_seed(generation_seed, classname, index, attempt)


def hashed_seed(*parts: int | str) -> int:
    """63 bits that these numbers and words determine."""
    digest = blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def rejected(images: Tensor) -> Tensor:
    """Whether each image is blank: the standard deviation of every channel is below FLAT levels.

    NaN in a diffusion model and unreadable files also give blank images.

    Args:
        images: (B, H, W, 3) uint8.

    Returns:
        (B,) bool.
    """
    spread = images.flatten(1, 2).float().std(dim=1, correction=0)  # (B, 3)
    return spread.amax(dim=1) < FLAT

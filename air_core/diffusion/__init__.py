"""Synthetic images: who makes them, how they are numbered, which are thrown away.

A generator owes an endless row of images for every class. Image `index` of a class is the same
whoever asks, and however many are asked for: its noise follows from `image_seed` alone. AiR
(arXiv:2504.11930) draws them from a diffusion model that a LoRA has moved to the target domain.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Protocol

from torch import Tensor

from air_core.specs import FolderImages, GeneratedImages

# B images, H height, W width.

# Largest spread of a rejected image, in the 256 levels of a channel: below what noise on an empty
# ground leaves, and far below any drawing or photograph.
FLAT = 4.0
ATTEMPTS = 3  # draws of one image before it is given up


class ImageGenerator(Protocol):
    """A source of images of named classes."""

    def generate(self, classname: str, indices: Sequence[int], attempts: Sequence[int]) -> Tensor:
        """Images of one class, drawn together as one batch.

        Args:
            classname: the class, as the dataset spells it.
            indices: (B,) positions in the class's row.
            attempts: (B,) how often each position was drawn before; moves its noise.

        Returns:
            (B, H, W, 3) uint8. One that could not be made is of one colour, see `rejected`.

        Raises:
            ValueError: there is no such class.
        """
        ...


def load_generator(
    images: GeneratedImages | FolderImages,
    model: Path,
    adapter: Path | None,
    device: str = "cpu",
    thrift: int = 0,
) -> ImageGenerator:
    """The generator of a row of images.

    Args:
        images: which images.
        model: a diffusers folder, or the folder of ready images.
        adapter: folder with the LoRA's weights, exactly if `images` has a LoRA.
        device: where a diffusion model runs.
        thrift: how much memory it saves for time: 1 decodes images one by one, 2 also keeps on
            the device only the part that works.

    Raises:
        ValueError: the folder or the adapter does not fit `images`.
    """
    wants = isinstance(images, GeneratedImages) and images.lora is not None
    if wants != (adapter is not None):
        asked = "ask for a LoRA" if wants else "ask for no LoRA"
        raise ValueError(f"the images {asked}, but the adapter is {adapter}")
    match images:
        case GeneratedImages():
            from air_core.diffusion.pipeline import PipelineGenerator  # diffusers takes seconds

            return PipelineGenerator(
                model,
                images.settings,
                adapter=adapter,
                scale=images.lora_scale,
                device=device,
                thrift=thrift,
            )
        case FolderImages():
            from air_core.diffusion.folder import FolderGenerator

            return FolderGenerator(model, images.classnames, images.size)


def draw(
    generator: ImageGenerator, classname: str, indices: Sequence[int]
) -> tuple[Tensor, list[int], list[bool]]:
    """Images of one class as one batch. A rejected one is drawn again within the same batch, with
    its next attempt, and only that one is replaced; after ATTEMPTS it is given up.

    Returns:
        (B, H, W, 3) uint8; by image the attempt that was kept; by image whether it is usable.
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
    """63 bits that settle the noise of one image.

    Nothing else enters: with and without LoRA, or at another guidance, an image starts from the
    same noise, so that pictures can be compared pairwise.

    >>> image_seed(0, "digit seven", 3, 0)
    4428387689021003171
    """
    name = json.dumps([generation_seed, classname, index, attempt])
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big") >> 1


def rejected(images: Tensor) -> Tensor:
    """Which images are blank: no channel varies by more than FLAT levels (standard deviation).

    A diffusion model that meets NaN, and a file that cannot be read, end here too.

    Args:
        images: (B, H, W, 3) uint8.

    Returns:
        (B,) bool.
    """
    spread = images.flatten(1, 2).float().std(dim=1, correction=0)  # (B, 3)
    return spread.amax(dim=1) < FLAT

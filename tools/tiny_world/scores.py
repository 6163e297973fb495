"""Scores of the tiny models on held-out source images and on the dataset `digits`.

The models were not trained on them, and their labels are used for scores only. `python -m
tools.tiny_world.scores --out DIR` prints the numbers of the model card.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from air_core.datasets import digits
from air_core.datasets.dataset import TEMPLATE
from air_core.diffusion import ImageGenerator, rejected
from air_core.diffusion.pipeline import PipelineGenerator
from air_core.settings import GenerationSettings
from tools.tiny_world.render import CONCEPTS, DIGITS, SIDE, Source, chunk

# N images, C classes, D feature width, S side in pixels.

DIGIT_NAMES = CONCEPTS[: len(DIGITS)]
HELD_OUT = 59  # the last chunk of the 120,000 source images
MEAN, STD = 0.15, 0.28  # of the source pixels in [0, 1], the same for the three channels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="contains clip/ and diffusion/")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(all_scores(arguments.out), indent=2))


def all_scores(out: Path, per_class: int = 20, held_out: Source | None = None) -> dict[str, Any]:
    """All scores of the two models in a folder."""
    clip: CLIP = open_clip.create_model(f"local-dir:{out / 'clip'}", require_pretrained=True)
    tokenizer = SimpleTokenizer(str(out / "clip" / "merges.txt.gz"), context_length=24)
    unseen = held_out or chunk(HELD_OUT)
    settings = GenerationSettings(
        guidance_scale=4.0, num_inference_steps=10, size=SIDE, block=per_class, precision="fp32"
    )
    generator = PipelineGenerator(out / "diffusion", settings)
    vae = generator.pipeline.vae
    return {
        **clip_scores(clip, tokenizer, unseen),
        "linear_probe": linear_probe(clip),
        "vae_mse_held_out": vae_error(vae, unseen.images),
        "vae_mse_handwritten": vae_error(vae, handwritten()[0]),
        **sample_scores(clip, tokenizer, generator, per_class),
    }


def clip_scores(clip: CLIP, tokenizer: SimpleTokenizer, held_out: Source) -> dict[str, float]:
    """Zero-shot accuracies, by set."""
    shown = held_out.concepts < len(DIGIT_NAMES)
    return {
        "held_out_58": zero_shot(clip, tokenizer, held_out.images, held_out.concepts, CONCEPTS),
        "held_out_digits": zero_shot(
            clip, tokenizer, held_out.images[shown], held_out.concepts[shown]
        ),
        "handwritten": zero_shot(clip, tokenizer, *handwritten()),
    }


def sample_scores(
    clip: CLIP, tokenizer: SimpleTokenizer, generator: ImageGenerator, per_class: int
) -> dict[str, float]:
    """Share of generated digits that CLIP classifies as their prompt, and the generation speed."""
    start = time.process_time()
    batches = [generator.generate(name, range(per_class), [0] * per_class) for name in DIGIT_NAMES]
    seconds = time.process_time() - start
    images = torch.cat(batches)
    labels = np.arange(len(DIGIT_NAMES)).repeat(per_class)
    return {
        "sample_agreement": zero_shot(clip, tokenizer, images.numpy(), labels),
        "samples_rejected": float(rejected(images).float().mean()),
        "images_per_cpu_second": len(images) / seconds,
    }


def handwritten() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The 1,797 handwritten digits as (N, S, S, 3) images, and their classes (N,)."""
    images, labels, _ = digits.load()
    return np.stack([np.asarray(image) for image in images]), labels


def clip_input(images: NDArray[np.uint8]) -> Tensor:
    """(N, S, S, 3) uint8 -> (N, 3, S, S), normalised for CLIP."""
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
    return (pixels - MEAN) / STD


@torch.no_grad()
def image_features(clip: CLIP, images: NDArray[np.uint8]) -> Tensor:
    """Unit features (N, D)."""
    clip.eval()
    parts = [
        clip.encode_image(clip_input(images[i : i + 100]), normalize=True)
        for i in range(0, len(images), 100)
    ]
    return torch.cat(parts)


@torch.no_grad()
def text_features(clip: CLIP, tokenizer: SimpleTokenizer, names: tuple[str, ...]) -> Tensor:
    """Unit features (C, D) of the class names in TEMPLATE."""
    clip.eval()
    features: Tensor = clip.encode_text(
        tokenizer([TEMPLATE.format(name) for name in names]), normalize=True
    )
    return features


def zero_shot(
    clip: CLIP,
    tokenizer: SimpleTokenizer,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    names: tuple[str, ...] = DIGIT_NAMES,
) -> float:
    """Share of images whose nearest class text is their own class."""
    logits = image_features(clip, images) @ text_features(clip, tokenizer, names).T  # (N, C)
    return float((logits.argmax(-1).numpy() == labels).mean())


def linear_probe(clip: CLIP) -> float:
    """Test accuracy of logistic regression on image features of digits, with 70 % for training.

    Measures the image tower independently of the text tower.
    """
    images, labels = handwritten()
    features = image_features(clip, images).numpy()
    order = np.random.default_rng(0).permutation(len(images))
    train, test = np.split(order, [int(0.7 * len(order))])
    probe = LogisticRegression(C=100.0, max_iter=2000).fit(features[train], labels[train])
    return float(probe.score(features[test], labels[test]))


@torch.no_grad()
def vae_error(vae: Any, images: NDArray[np.uint8]) -> float:
    """Mean squared error of a round trip; pixels in [-1, 1]."""
    vae.eval()
    errors = [
        (vae.decode(vae.encode(pixels).latents).sample - pixels).square().flatten(1).mean(dim=1)
        for pixels in vae_batches(images)
    ]
    return float(torch.cat(errors).mean())


def vae_batches(images: NDArray[np.uint8]) -> Iterator[Tensor]:
    """Batches of 50 images, which fit the processor's cache: nearly twice as fast as 500."""
    for i in range(0, len(images), 50):
        yield vae_input(images[i : i + 50])


def vae_input(images: NDArray[np.uint8]) -> Tensor:
    """(N, S, S, 3) uint8 -> (N, 3, S, S) in [-1, 1]."""
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float()
    return (pixels / 127.5 - 1).contiguous(memory_format=torch.channels_last)


if __name__ == "__main__":
    main()

"""Pretrain the tiny CLIP on rendered, captioned images.

The loss is symmetric InfoNCE as in CLIP (arXiv:2103.00020) plus a classification term over the 58
concepts. A batch of 256 contains each concept several times, and InfoNCE alone would treat images
of one concept as negatives.

Two states of one training are saved. The shipped CLIP is from the middle of the schedule: its image
tower is as good as the final one but its text tower is weaker, so that prompts have something to
improve. The final text tower initialises the generator's text encoder.
"""

from __future__ import annotations

import gzip
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from open_clip.tokenizer import SimpleTokenizer, default_bpe
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tools.tiny_world import scores
from tools.tiny_world.render import CONCEPTS, Source, caption, framed, source

# B images in a batch, C concepts, L tokens, D feature width.

CONTEXT = 24
MERGES = 1500
EMBED = 128
VISION: dict[str, Any] = {
    "layers": 4, "width": 160, "head_width": 32, "patch_size": 8, "image_size": 32,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "context_length": CONTEXT, "vocab_size": 512 + MERGES + 2, "width": 128, "heads": 2,
    "layers": 2,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ClipTraining:
    """One training: AdamW, warm-up, then cosine to 0."""

    steps: int = 770
    shipped: int = 400  # step of the shipped state
    batch: int = 256
    warmup: int = 60
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    seed: int = 0


def pretrain(work: Path, out: Path, images: int, training: ClipTraining) -> None:
    """Train CLIP; write the shipped state to `out/clip` and the final one to `work`."""
    folder = out / "clip"
    folder.mkdir(parents=True, exist_ok=True)
    write_merges(folder / "merges.txt.gz")
    tokenizer = load_tokenizer(folder / "merges.txt.gz")
    seen, held_out = source(work, images).split()
    clip = build(training.seed)
    start = time.process_time()
    for step, loss in fit(clip, tokenizer, seen, training):
        if step % 50 == 0 or step == training.steps:
            print(
                f"clip {step} loss {loss:.3f} {time.process_time() - start:.0f} CPU-s", flush=True
            )
        if step % 100 == 0 or step == training.steps:
            print(f"clip {step} {scores.clip_scores(clip, tokenizer, held_out)}", flush=True)
        if step == training.shipped:
            save(clip, folder)
    save_file(clip.state_dict(), work / "clip-final.safetensors")


# ---------------------------------------------------------------- tokenizer and model


def write_merges(path: Path) -> None:
    """Write the first merges of CLIP's byte-pair file, with reproducible bytes."""
    lines = gzip.decompress(Path(default_bpe()).read_bytes()).decode().split("\n")
    text = "\n".join(lines[: MERGES + 1])  # the first line is a version
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def load_tokenizer(merges: Path) -> SimpleTokenizer:
    return SimpleTokenizer(bpe_path=str(merges), context_length=CONTEXT)


def build(seed: int) -> CLIP:
    """A CLIP with open_clip's initialisation."""
    torch.manual_seed(seed)
    return CLIP(EMBED, CLIPVisionCfg(**VISION), CLIPTextCfg(**TEXT), quick_gelu=False)


def save(clip: CLIP, folder: Path) -> None:
    """Write a self-contained open_clip folder in half precision (`local-dir:<folder>`)."""
    state = {name: t.detach().half().contiguous() for name, t in clip.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    config = {
        "model_cfg": {"embed_dim": EMBED, "vision_cfg": VISION, "text_cfg": TEXT},
        "preprocess_cfg": {
            "mean": [scores.MEAN] * 3,
            "std": [scores.STD] * 3,
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")


# ---------------------------------------------------------------- training


def fit(
    clip: CLIP, tokenizer: SimpleTokenizer, seen: Source, training: ClipTraining
) -> Iterator[tuple[int, float]]:
    """Train in place; yield (finished steps, loss)."""
    rng = np.random.default_rng([training.seed, 1])
    optimizer = torch.optim.AdamW(
        _groups(clip, training.weight_decay),
        lr=training.learning_rate,
        betas=(0.9, 0.98),
        eps=1e-6,
    )
    order = _passes(len(seen), training.batch, rng)
    for step in range(training.steps):
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * _warmup_cosine(step, training)
        batch = np.sort(next(order))
        captions = [caption(seen.attributes[i], rng) for i in batch]
        concepts = [framed(name, rng) for name in CONCEPTS]
        clip.train()
        with exact_attention():
            loss = contrastive_loss(
                clip,
                scores.clip_input(seen.images[batch]),
                tokenizer(captions + concepts),
                torch.from_numpy(seen.concepts[batch]),
            )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            clip.logit_scale.clamp_(0, math.log(100))
        yield step + 1, float(loss.detach())


def contrastive_loss(clip: CLIP, images: Tensor, texts: Tensor, labels: Tensor) -> Tensor:
    """InfoNCE over images and captions plus the concept term.

    Args:
        images: (B, 3, S, S).
        texts: (B + C, L): a caption for each image, then a text for each concept.
        labels: (B,) concept of each image.
    """
    image = F.normalize(clip.encode_image(images), dim=-1)  # (B, D)
    text = F.normalize(clip.encode_text(texts), dim=-1)
    scale = clip.logit_scale.exp()
    pairs = scale * image @ text[: len(image)].T  # (B, B)
    own = torch.arange(len(image))
    contrast = (F.cross_entropy(pairs, own) + F.cross_entropy(pairs.T, own)) / 2

    concept = scale * image @ text[len(image) :].T  # (B, C)
    shown = F.one_hot(labels, concept.shape[1]).float().T  # (C, B)
    present = shown.sum(dim=1) > 0
    targets = shown[present] / shown[present].sum(dim=1, keepdim=True)
    concept_loss = F.cross_entropy(concept, labels) + F.cross_entropy(concept.T[present], targets)
    return contrast + concept_loss / 2


@contextmanager
def exact_attention() -> Iterator[None]:
    """Use the plain attention kernel, which has the fastest backward pass on a CPU."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def _groups(clip: CLIP, weight_decay: float) -> list[dict[str, Any]]:
    decayed: list[Tensor] = []
    free: list[Tensor] = []
    for name, parameter in clip.named_parameters():
        matrix = parameter.ndim >= 2 and "embedding" not in name
        (decayed if matrix else free).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]


def _passes(n: int, batch: int, rng: np.random.Generator) -> Iterator[np.ndarray[Any, Any]]:
    """Endless batches of positions; each pass contains every image once."""
    while True:
        order = rng.permutation(n)
        for i in range(0, n - batch + 1, batch):
            yield order[i : i + batch]


def _warmup_cosine(step: int, training: ClipTraining) -> float:
    if step < training.warmup:
        return (step + 1) / training.warmup
    share = (step - training.warmup) / max(1, training.steps - training.warmup)
    return 0.5 * (1 + math.cos(math.pi * share))

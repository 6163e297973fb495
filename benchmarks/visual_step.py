"""How much does it save to train a visual prompt on stored image tokens?

Baseline: what CPL does. Each step loads its images from disk, decodes and transforms them (twice,
as CPL's dataset does, though one copy is used), and sends them through the whole tower with the
learned tokens inside. Two loader processes read ahead. Lean: tokens were stored once in half
precision; a step runs what depends on the prompt. Both steps are forward and backward to the
prompt with frozen weights; their features are compared before anything is timed.

    python benchmarks/visual_step.py [--batch 16] [--steps 3] [--threads 2] [--device cpu]

Images are 500 x 375 JPEGs, as in CUB. ViT-B/32 has random weights: its time does not depend on
them; `tiny` is the embedded CLIP. Where the tower takes most of the time, as ViT-B/32 does on a
CPU, what is left of the gain is what the lean tower leaves out; `loading_s` is what a faster device
would wait for. Times are the least disturbed of the steps. The last line is JSON; `ratio` is the
baseline's time over the lean one's on ViT-B/32. `ratio_cpu` is loading and tower over the lean step
in processor time, which on a machine that others use is the one to read, with --threads 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).parents[1]))

from air_core.backbone import Backbone
from air_core.backbone.loading import load_backbone
from benchmarks.text_step import random_vit_b_32

LENGTH = 16
SIZE = (500, 375)
LOADERS = 2


def draw_photos(folder: Path, count: int) -> list[Path]:
    """JPEGs that cost what photographs cost to decode."""
    rng = np.random.default_rng(0)
    files = []
    for i in range(count):
        rough = Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8))
        pixels = np.asarray(rough.resize(SIZE, Image.Resampling.BICUBIC), dtype=np.float32)
        grain = rng.normal(0, 6, (*pixels.shape[:2], 1))
        files.append(folder / f"{i:04}.jpg")
        Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8)).save(files[-1], quality=90)
    return files


class Photos(torch.utils.data.Dataset[Tensor]):
    """As CPL reads them."""

    def __init__(self, files: list[Path], preprocess: Any) -> None:
        self.files = files
        self.preprocess = preprocess

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        image = Image.open(self.files[index]).convert("RGB")
        self.preprocess(image)  # CPL's unused second copy
        pixels: Tensor = self.preprocess(image)
        return pixels


def whole_tower(backbone: Backbone, pixels: Tensor, prompt: Tensor) -> Tensor:
    """(B, D): learned tokens between [CLS] and the patches, before ln_pre."""
    tower, count = backbone.model.visual, len(pixels)
    patches = tower.conv1(pixels).flatten(2).transpose(1, 2)
    start = tower.class_embedding.expand(count, 1, -1)
    states = torch.cat([start, patches], dim=1) + tower.positional_embedding
    learned = prompt.expand(count, -1, -1)
    states = tower.ln_pre(torch.cat([states[:, :1], learned, states[:, 1:]], dim=1))
    return normalize(tower.ln_post(tower.transformer(states))[:, 0] @ tower.proj, dim=-1)


def seconds(step: Callable[[], Any], prompt: Tensor, steps: int) -> tuple[float, float]:
    """Least time of a step, forward and backward: on the clock, and of processors."""
    times = []
    for _ in range(steps + 1):  # the first one warms up
        prompt.grad = None
        started, busy = time.perf_counter(), time.process_time()
        features = step()
        if features is not None:
            features.square().sum(dim=0).max().backward()
        if prompt.is_cuda:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - started, time.process_time() - busy))
    return min(wall for wall, _ in times[1:]), min(cpu for _, cpu in times[1:])


def measure(backbone: Backbone, files: list[Path], batch: int, steps: int) -> dict[str, float]:
    width, device = backbone.patch_width, backbone.device
    prompt = torch.nn.Parameter(width**-0.5 * torch.randn(LENGTH, width, device=device))
    loader = torch.utils.data.DataLoader(
        Photos(files, backbone.preprocess), batch_size=batch, num_workers=LOADERS
    )
    stored = backbone.image_tokens([Image.open(f).convert("RGB") for f in files], torch.float16)
    pixels = next(iter(loader)).to(device)
    with torch.no_grad():
        expected = whole_tower(backbone, pixels, prompt)
        apart = float(
            (backbone.encode_tokens(stored[:batch].to(device), prompt) - expected).norm()
            / expected.norm()
        )
    assert apart < 2e-3, f"the ways differ by {apart}"  # stored in half precision
    batches: Iterator[Tensor] = iter(loader)

    def baseline() -> Tensor:
        return whole_tower(backbone, next(batches).to(device), prompt)

    def lean() -> Tensor:
        chosen = torch.randint(len(stored), (batch,))
        return backbone.encode_tokens(stored[chosen].to(device), prompt)

    photos = Photos(files, backbone.preprocess)

    def loading() -> None:
        for i in range(batch):
            photos[i]

    times = {
        "baseline_s": seconds(baseline, prompt, steps),
        "lean_s": seconds(lean, prompt, steps),
        "tower_s": seconds(lambda: whole_tower(backbone, pixels, prompt), prompt, steps),
        "loading_s": seconds(loading, prompt, steps),
    }
    found = {name: wall for name, (wall, _) in times.items()}
    found["ratio"] = found["baseline_s"] / found["lean_s"]
    busy = {name: cpu for name, (_, cpu) in times.items()}
    found["ratio_cpu"] = (busy["loading_s"] + busy["tower_s"]) / busy["lean_s"]
    return {name: float(f"{value:.4g}") for name, value in (found | {"apart": apart}).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(asked.threads)
    towers = {
        "tiny": lambda: load_backbone("tiny", asked.device),
        "ViT-B-32": lambda: random_vit_b_32(asked.device),
    }
    found = {}
    with TemporaryDirectory() as folder:
        # Read ahead never runs dry, nor does it end within the steps.
        files = draw_photos(Path(folder), asked.batch * (asked.steps + 1 + 2 * LOADERS))
        for name, load in towers.items():
            found[name] = measure(load(), files, asked.batch, asked.steps)
            print(name, found[name], file=sys.stderr)
    result = {
        "name": "visual_step",
        "ratio": found["ViT-B-32"]["ratio"],
        "ratio_cpu": found["ViT-B-32"]["ratio_cpu"],
        "baseline": f"JPEGs loaded in every step and the whole tower, ViT-B/32, {LENGTH} learned "
        f"tokens, batch {asked.batch}, {asked.threads} threads, {asked.device}",
        **found,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

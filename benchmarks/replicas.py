"""What do the seeds of one point, and the points of a round, cost together?

Baseline: each prompt trained alone. Batched: all in one computation (`air_core.training.fit`), one
pass of the text tower a step. Both train on the same images with the same batches, and the prompts
that come out are compared. The tiny CLIP is bound by the cost of a call, as any text tower on a GPU
is; ViT-B/32 on a CPU by arithmetic, which nobody can share: it shows that nothing is lost.

A round of 4 points with 3 seeds each, which differ in learning rate and in the weight of synthetic
images, is measured with the tiny CLIP three ways: each prompt alone, point after point with the
seeds of each together, and all of it together.

    python benchmarks/replicas.py [--steps 20] [--threads 1] [--repeats 3] [--device cpu]

Random features, and ViT-B/32 with random weights: times do not depend on them. Two minutes on a
core. The last line is JSON; `ratio` is processor time of a training step, one after the other over
batched, with the tiny CLIP and 8 replicas, the least disturbed of the repeats.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

sys.path.insert(0, str(Path(__file__).parents[1]))

from air_core.backbone import Backbone
from air_core.backbone.loading import load_backbone
from air_core.datasets import get_dataset
from air_core.prompts.text import TextPrompt
from air_core.specs import PromptSettings, TrainSettings
from air_core.training import Targeted, Training, fit
from air_core.types import Batch, Labelled
from air_core.weights import tiny_folder
from benchmarks.text_step import random_vit_b_32
from benchmarks.trial import seconds

REPLICAS = (1, 3, 8)
POOL, BATCH = 1000, 64
WORLDS = {"tiny": "digits", "vit_b_32": "eurosat"}  # a dataset for each CLIP
LENGTHS = {"tiny": 4, "vit_b_32": 16}


RATES, WEIGHTS, SEEDS = (0.005, 0.01, 0.02, 0.05), (0.1, 0.3, 1.0, 3.0), 3  # of a round's points


def trainings(world: str, backbone: Backbone, replicas: int, steps: int) -> list[Training]:
    """One a seed: another start, another order of the same images."""
    names = get_dataset(WORLDS[world]).classnames
    width = backbone.model.text_projection.shape[1]
    features = torch.randn(POOL, width, generator=torch.Generator().manual_seed(0))
    targets = one_hot(torch.arange(POOL) % len(names), len(names)).float()
    return [
        Training(
            learner=TextPrompt(PromptSettings(length=LENGTHS[world]), backbone, names, seed),
            real=Targeted(Batch(normalize(features, dim=-1)), targets),
            labelled=None,
            synthetic=None,
            synthetic_weight=0.0,
            loss="cc",
            settings=TrainSettings(batch=BATCH, steps=steps),
            seed=seed,
        )
        for seed in range(replicas)
    ]


def a_round(backbone: Backbone, steps: int) -> list[Training]:
    """Points that differ in learning rate and in the weight of synthetic images; seeds of each."""
    names = get_dataset(WORLDS["tiny"]).classnames
    width = backbone.model.text_projection.shape[1]
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(20 * len(names), width, generator=generator)
    labels = torch.arange(len(names)).repeat(20)
    synthetic = Labelled(Batch(normalize(drawn, dim=-1)), labels)
    return [
        replace(
            one,
            synthetic=synthetic,
            synthetic_weight=weight,
            settings=replace(one.settings, learning_rate=rate),
        )
        for rate, weight in zip(RATES, WEIGHTS, strict=True)
        for one in trainings("tiny", backbone, SEEDS, steps)
    ]


def measure(
    make: Callable[[], list[Training]], sizes: Mapping[str, int], steps: int, repeats: int
) -> dict[str, float]:
    """Seconds of a step of all prompts, on the clock and of processors, each way.

    Args:
        sizes: how many are trained in one computation, by way; `batched` and `sequential` are two.
    """
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in sizes}
    prompts: dict[str, list[Tensor]] = {}
    for _ in range(repeats):  # in turns: a busy moment hits all
        for way, spent in times.items():
            asked = make()
            groups = [asked[at : at + sizes[way]] for at in range(0, len(asked), sizes[way])]
            spent.append(seconds(lambda groups=groups: [fit(group) for group in groups]))
            prompts[way] = [a.learner.prompt.detach() for a in asked]
    apart = max(
        float((one - other).norm() / other.norm())
        for one, other in zip(prompts["batched"], prompts["sequential"], strict=True)
    )
    assert apart < 1e-4, f"the two ways learn prompts that differ by {apart}"
    found: dict[str, float] = {}
    for way, spent in times.items():
        found[f"{way}_s"] = min(wall for wall, _ in spent) / steps
        found[f"{way}_cpu_s"] = min(cpu for _, cpu in spent) / steps
    if "by_point" in sizes:
        found["ratio_to_points"] = found["by_point_cpu_s"] / found["batched_cpu_s"]
    found["ratio_wall"] = found["sequential_s"] / found["batched_s"]
    found["ratio"] = found["sequential_cpu_s"] / found["batched_cpu_s"]
    return {name: float(f"{value:.4g}") for name, value in (found | {"apart": apart}).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20, help="of ViT-B/32; tiny takes ten times")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--worlds", nargs="+", choices=WORLDS, default=list(WORLDS))
    asked = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(asked.threads)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for world in asked.worlds:
        tiny = world == "tiny"
        backbone = (
            load_backbone(tiny_folder(), asked.device) if tiny else random_vit_b_32(asked.device)
        )
        steps = 10 * asked.steps if tiny else asked.steps
        fit(trainings(world, backbone, 1, 2))  # warms up
        found[world] = {}
        for replicas in REPLICAS:
            make = functools.partial(trainings, world, backbone, replicas, steps)
            sizes = {"batched": replicas, "sequential": 1}
            found[world][str(replicas)] = measure(make, sizes, steps, asked.repeats)
            print(world, replicas, found[world][str(replicas)], file=sys.stderr)
        if tiny:
            make = functools.partial(a_round, backbone, steps)
            sizes = {"batched": len(RATES) * SEEDS, "by_point": SEEDS, "sequential": 1}
            found[world]["round"] = measure(make, sizes, steps, asked.repeats)
            print(world, "round", found[world]["round"], file=sys.stderr)
    result = {
        "name": "replicas",
        "ratio": found["tiny"]["8"]["ratio"] if "tiny" in found else None,
        "baseline": f"8 prompts one after the other, tiny CLIP, digits, batches of {BATCH}, "
        f"{asked.threads} thread, {asked.device}",
        "steps": asked.steps,
        **found,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

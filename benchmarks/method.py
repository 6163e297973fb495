"""Speed of the method's code, compared with the usual implementations.

    python benchmarks/method.py text_step [--threads 2] [--repeats 5] [--device cpu]
    python benchmarks/method.py visual_step [--batch 16] [--steps 3] [--threads 2] [--device cpu]
    python benchmarks/method.py trial [--steps 20] [--threads 2] [--device cpu]
    python benchmarks/method.py replicas [--steps 20] [--repeats 3] [--threads 1] [--device cpu]

*text_step*: a training step of a text prompt. Baseline: the step of CoOp and CPL, which encodes one
sequence per class, padded to 77 tokens, with the full tower. `ratio` is the minimum over two
datasets.

*visual_step*: a training step of a visual prompt on stored image tokens. Baseline: the step of CPL,
which loads its images (500 x 375 JPEG, as in CUB), decodes and transforms them twice, and encodes
them with the full tower; two loader processes prefetch images. `ratio` is that of ViT-B/32.

*trial*: a full UL trial with a text prompt (CPL on DTD): ten rounds of 50 epochs on a growing
part of 3,760 images, extrapolated from `--steps` training steps and one labelling pass. Baseline:
the loop of CPL on stored image features, which encodes all class names for every batch.

*replicas*: a training step of 3 and of 8 prompts of one point in one computation. Baseline: the
prompts one after another. `ratio` is that of processor time with the tiny CLIP and 8 prompts, whose
speed is limited by the overhead of calls, like that of a text tower on a GPU.

Each benchmark also checks that both implementations compute the same. ViT-B/32 has random weights,
on which its speed does not depend. Times are the minimum over the repeats. `ratio` compares wall
times and `ratio_cpu` processor times; on a shared machine use `ratio_cpu` with --threads 1. A
benchmark takes some minutes on two cores.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import normalize, one_hot

sys.path.insert(0, str(Path(__file__).parents[1]))

from air_core.backbone import Backbone
from air_core.backbone.loading import load_backbone
from air_core.datasets import get_dataset
from air_core.prompts import TextPrompt
from air_core.pseudo_labels import assign, capacity
from air_core.settings import PromptSettings, PseudoLabelSettings, TrainSettings
from air_core.training import Targeted, Training, fit
from air_core.types import Encoded
from benchmarks.harness import (
    Times,
    measure_time,
    minimum_times,
    options,
    progress,
    random_clip,
    report,
)

CONTEXT = 16  # learned vectors or tokens
BATCH = 64


def differ(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().norm() / other.detach().norm())


def padded_text_features(backbone: Backbone, context: Tensor, names: Sequence[str]) -> Tensor:
    """(C, D) text features of `[SOS] context name [EOT]`, padded to the longest allowed."""
    model, length = backbone.model, len(context)
    # Each x is a placeholder token for one learned vector.
    words = [name.replace("_", " ") for name in names]
    tokens = backbone.tokenizer([" ".join(["x"] * length + [word]) for word in words])
    ends = tokens.argmax(dim=-1)
    embedded = model.token_embedding(tokens.to(context.device)).detach()  # (C, T, W)
    shared = context.expand(len(names), -1, -1)
    states = torch.cat([embedded[:, :1], shared, embedded[:, 1 + length :]], dim=1)
    states = model.transformer(states + model.positional_embedding, attn_mask=model.attn_mask)
    states = model.ln_final(states)
    ended = states[torch.arange(len(names)), ends]
    return normalize(ended @ model.text_projection, dim=-1)


def compared(times: Mapping[str, Times]) -> dict[str, float]:
    """Seconds of each implementation, and the time of the baseline divided by the lean one."""
    return {
        **{f"{name}_s": wall for name, (wall, _) in times.items()},
        "ratio": times["baseline"][0] / times["lean"][0],
        "ratio_cpu": times["baseline"][1] / times["lean"][1],
    }


def step_times(encode: Callable[[], Tensor], prompt: Parameter, repeats: int) -> Times:
    """Time a forward and a backward pass to the learned vectors, after a warm-up step."""

    def step() -> None:
        prompt.grad = None
        encode().square().sum(dim=0).max().backward()

    return minimum_times([measure_time(step) for _ in range(repeats + 1)][1:])


# ---------------------------------------------------------------- text_step


def text_step(args: argparse.Namespace) -> None:
    backbone = random_clip(device=args.device)
    found = {}
    for dataset in ("resisc45", "flowers102"):  # 45 and 102 class names
        found[dataset] = _text_step(backbone, get_dataset(dataset).classnames, args.repeats)
        progress(dataset, found[dataset])
    report(
        "text_step",
        min(one["ratio"] for one in found.values()),
        f"one padded sequence per class, ViT-B/32, context {CONTEXT}, {args.threads} threads, "
        f"{args.device}",
        ratio_cpu=min(one["ratio_cpu"] for one in found.values()),
        **found,
    )


def _text_step(backbone: Backbone, names: Sequence[str], repeats: int) -> dict[str, float]:
    context = Parameter(0.02 * torch.randn(CONTEXT, backbone.token_width, device=backbone.device))
    ways: dict[str, Callable[[], Tensor]] = {
        "lean": lambda: backbone.encode_context(context, names),
        "baseline": lambda: padded_text_features(backbone, context, names),
    }
    with torch.no_grad():
        apart = differ(*(encode() for encode in ways.values()))
    assert apart < 1e-5, f"the implementations differ by {apart}"
    times = {name: step_times(encode, context, repeats) for name, encode in ways.items()}
    return {**compared(times), "apart": apart}


# ---------------------------------------------------------------- visual_step

LOADERS = 2


class Photos(torch.utils.data.Dataset[Tensor]):
    """JPEGs that take as long to decode as photographs, loaded as CPL loads them."""

    def __init__(self, folder: Path, count: int) -> None:
        rng = np.random.default_rng(0)
        self.preprocess: Any = None
        self.files = [folder / f"{i:04}.jpg" for i in range(count)]
        for file in self.files:
            rough = Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8))
            pixels = np.asarray(rough.resize((500, 375), Image.Resampling.BICUBIC), np.float32)
            grain = rng.normal(0, 6, (*pixels.shape[:2], 1))
            Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8)).save(file, quality=90)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        image = Image.open(self.files[index]).convert("RGB")
        self.preprocess(image)  # CPL's unused second copy
        pixels: Tensor = self.preprocess(image)
        return pixels


def whole_tower(backbone: Backbone, pixels: Tensor, prompt: Tensor) -> Tensor:
    """(B, D): learned tokens (P, W) between [CLS] and the patches, before ln_pre.

    With a deep prompt (L, P, W), the tokens of each later block replace the learned tokens there.
    """
    tower, count, length = backbone.model.visual, len(pixels), prompt.shape[-2]
    layers = [prompt] if prompt.dim() == 2 else list(prompt)
    patches = tower.conv1(pixels).flatten(2).transpose(1, 2)
    start = tower.class_embedding.expand(count, 1, -1)
    states = torch.cat([start, patches], dim=1) + tower.positional_embedding
    learned = layers[0].expand(count, -1, -1)
    states = tower.ln_pre(torch.cat([states[:, :1], learned, states[:, 1:]], dim=1))
    for i, block in enumerate(tower.transformer.resblocks):
        if 0 < i < len(layers):
            fresh = layers[i].expand(count, -1, -1)
            states = torch.cat([states[:, :1], fresh, states[:, 1 + length :]], dim=1)
        states = block(states)
    return normalize(tower.ln_post(states)[:, 0] @ tower.proj, dim=-1)


def visual_step(args: argparse.Namespace) -> None:
    found = {}
    with TemporaryDirectory() as folder:
        # Read ahead never runs dry, nor does it end within the steps.
        photos = Photos(Path(folder), args.batch * (args.steps + 2 + 2 * LOADERS))
        for name, load in {
            "tiny": functools.partial(load_backbone, "tiny"),
            "ViT-B-32": functools.partial(random_clip, "ViT-B-32-quickgelu"),
        }.items():
            found[name] = _visual_step(load(args.device), photos, args.batch, args.steps)
            progress(name, found[name])
    report(
        "visual_step",
        found["ViT-B-32"]["ratio"],
        f"JPEGs loaded in every step and the whole tower, ViT-B/32, {CONTEXT} learned tokens, "
        f"batch {args.batch}, {args.threads} threads, {args.device}",
        ratio_cpu=found["ViT-B-32"]["ratio_cpu"],
        **found,
    )


def _visual_step(backbone: Backbone, photos: Photos, batch: int, steps: int) -> dict[str, float]:
    width, device = backbone.vision.width, backbone.device
    prompt = Parameter(width**-0.5 * torch.randn(CONTEXT, width, device=device))
    photos.preprocess = backbone.preprocess
    loader = torch.utils.data.DataLoader(photos, batch_size=batch, num_workers=LOADERS)
    images = [Image.open(file).convert("RGB") for file in photos.files]
    stored = backbone.image_tokens(images, torch.float16)
    pixels = next(iter(loader)).to(device)
    with torch.no_grad():
        lean = backbone.encode_tokens(stored[:batch].to(device), prompt)
        apart = differ(lean, whole_tower(backbone, pixels, prompt))
    assert apart < 2e-3, f"the implementations differ by {apart}"  # stored in half precision
    batches = iter(loader)
    ways: dict[str, Callable[[], Tensor]] = {
        "baseline": lambda: whole_tower(backbone, next(batches).to(device), prompt),
        "lean": lambda: backbone.encode_tokens(
            stored[torch.randint(len(stored), (batch,))].to(device), prompt
        ),
        "tower": lambda: whole_tower(backbone, pixels, prompt),
    }
    times = {name: step_times(way, prompt, steps) for name, way in ways.items()}
    loads = [measure_time(lambda: [photos[i] for i in range(batch)]) for _ in range(steps)]
    times["loading"] = minimum_times(loads)
    # Loaders are separate processes, so loading is timed in this process instead.
    loading_and_tower = times["loading"][1] + times["tower"][1]
    return {**compared(times), "ratio_cpu": loading_and_tower / times["lean"][1], "apart": apart}


# ---------------------------------------------------------------- trial

POOL, TEST = 3760, 1880  # images of DTD
ROUNDS, EPOCHS = 10, 50
SELECTION = PseudoLabelSettings(kind="candidates", growth="growing")


class PaddedPrompt(TextPrompt):
    """A text prompt encoded as in CPL: for every batch of images, padded to 77 tokens."""

    def logits(self, batch: Encoded) -> Tensor:
        parts = []
        for features in torch.split(batch.features, BATCH):
            weight = padded_text_features(self.backbone, self.context, self.classnames)
            parts.append(features @ weight.to(features.device).T)
        return self.backbone.logit_scale * torch.cat(parts)


def plain_training(
    learner: TextPrompt, real: Targeted, settings: TrainSettings, seed: int
) -> Training:
    """Training on pseudo-labelled images only."""
    return Training(
        learner=learner,
        real=real,
        labelled=None,
        synthetic=None,
        synthetic_weight=0.0,
        loss="cc",
        settings=settings,
        seed=seed,
    )


def trial(args: argparse.Namespace) -> None:
    backbone = random_clip(device=args.device)
    names = get_dataset("dtd").classnames
    classes, width = len(names), backbone.model.text_projection.shape[1]
    pool = Encoded(normalize(torch.randn(POOL, width), dim=-1))
    capacities = [capacity(SELECTION, POOL, classes, t, ROUNDS) for t in range(ROUNDS)]
    chosen = torch.arange(classes * capacities[4])
    targets = (torch.rand(len(chosen), classes) < 3 / classes).float()
    targets[chosen, chosen % classes] = 1.0
    real = Targeted(pool[chosen], targets)

    def parts(kind: type[TextPrompt], steps: int) -> tuple[Tensor, Times, Times]:
        """The prompt after `steps` steps, and the times of a step and of labelling the pool."""
        learner = kind(PromptSettings(), backbone, names, "{}", 1)
        settings = TrainSettings(batch=BATCH, steps=steps, warmup=0.0)
        wall, cpu = measure_time(lambda: fit([plain_training(learner, real, settings, 0)]))

        @torch.no_grad()
        def label() -> None:
            scores = learner.logits(pool).softmax(dim=-1)
            assign(scores, SELECTION, iteration=1, iterations=ROUNDS, previous=None)

        return learner.context.detach(), (wall / steps, cpu / steps), measure_time(label)

    steps = sum(EPOCHS * max(1, classes * each // BATCH) for each in capacities)
    # Labelling once per round; a test before the first and after each round.
    passes = ROUNDS + (ROUNDS + 1) * TEST / POOL
    parts(TextPrompt, 2)  # warms up
    contexts, whole, figures = {}, {}, {}
    for name, kind in {"lean": TextPrompt, "baseline": PaddedPrompt}.items():
        contexts[name], step, labelling = parts(kind, args.steps)
        whole[name] = [steps * step[i] + passes * labelling[i] for i in (0, 1)]
        figures |= {f"{name}_step_s": step[0], f"{name}_labelling_s": labelling[0]}
        figures[f"{name}_trial_s"] = whole[name][0]
        progress(name, step, labelling)
    apart = differ(contexts["lean"], contexts["baseline"])
    assert apart < 1e-3, f"the implementations learn prompts that differ by {apart}"
    report(
        "trial",
        whole["baseline"][0] / whole["lean"][0],
        f"CPL's loop on stored features, ViT-B/32, {classes} classes, {args.threads} threads, "
        f"{args.device}",
        ratio_cpu=whole["baseline"][1] / whole["lean"][1],
        timed_steps=args.steps,
        trial_steps=steps,
        labelling_passes=passes,
        apart=apart,
        **figures,
    )


# ---------------------------------------------------------------- replicas

WORLDS = {
    "tiny": ("digits", 4),
    "vit_b_32": ("eurosat", 16),
}  # dataset and number of vectors for each CLIP


def trainings(world: str, backbone: Backbone, replicas: int, steps: int) -> list[Training]:
    """One training per seed; each has another initial prompt and another order of the images."""
    dataset, length = WORLDS[world]
    names, width = get_dataset(dataset).classnames, backbone.model.text_projection.shape[1]
    features = torch.randn(1000, width, generator=torch.Generator().manual_seed(0))
    targets = one_hot(torch.arange(1000) % len(names), len(names)).float()
    real = Targeted(Encoded(normalize(features, dim=-1)), targets)
    settings = TrainSettings(batch=BATCH, steps=steps)
    return [
        plain_training(
            TextPrompt(PromptSettings(length=length), backbone, names, "{}", seed),
            real,
            settings,
            seed,
        )
        for seed in range(replicas)
    ]


def together(
    world: str, backbone: Backbone, count: int, steps: int, repeats: int
) -> dict[str, float]:
    """Seconds of a step of `count` prompts, in one computation and one after another."""
    times: dict[str, list[Times]] = {"lean": [], "baseline": []}
    prompts: dict[str, list[Tensor]] = {}
    for _ in range(repeats):  # alternate, so that load on the machine affects both
        for way, size in (("lean", count), ("baseline", 1)):
            every = trainings(world, backbone, count, steps)
            groups = [every[at : at + size] for at in range(0, count, size)]
            wall, cpu = measure_time(lambda groups=groups: [fit(group) for group in groups])
            times[way].append((wall / steps, cpu / steps))
            prompts[way] = [one.learner.prompt for one in every]
    apart = max(map(differ, prompts["lean"], prompts["baseline"]))
    assert apart < 1e-4, f"the implementations learn prompts that differ by {apart}"
    return {**compared({way: minimum_times(spent) for way, spent in times.items()}), "apart": apart}


def replicas(args: argparse.Namespace) -> None:
    found: dict[str, dict[str, dict[str, float]]] = {}
    for world in WORLDS:
        tiny = world == "tiny"
        backbone = load_backbone("tiny", args.device) if tiny else random_clip(device=args.device)
        steps = 10 * args.steps if tiny else args.steps
        fit(trainings(world, backbone, 1, 2))  # warms up
        found[world] = {}
        for count in (3, 8):
            one = together(world, backbone, count, steps, args.repeats)
            found[world][str(count)] = one
            progress(world, count, one)
    report(
        "replicas",
        found["tiny"]["8"]["ratio_cpu"],
        f"8 prompts one after another, tiny CLIP, digits, batches of {BATCH}, "
        f"{args.threads} thread, {args.device}",
        steps=args.steps,
        **found,
    )


BENCHMARKS: dict[str, tuple[Callable[[argparse.Namespace], None], dict[str, Any]]] = {
    "text_step": (text_step, {"threads": 2, "repeats": 5}),
    "visual_step": (visual_step, {"threads": 2, "batch": 16, "steps": 3}),
    "trial": (trial, {"threads": 2, "steps": 20}),
    "replicas": (replicas, {"threads": 1, "steps": 20, "repeats": 3}),
}


def main() -> None:
    name = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if name not in BENCHMARKS:
        sys.exit(f"{__doc__}\nallowed: {', '.join(BENCHMARKS)}")
    run, defaults = BENCHMARKS[name]
    args = options(__doc__, **defaults, device="cpu")
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    run(args)


if __name__ == "__main__":
    main()

"""How much does the lean text tower save in a training step of a text prompt?

Baseline: what CoOp and CPL do, one sequence a class, padded to 77 tokens, the whole tower for every
token. Both are timed forward and backward to the learned vectors, in one process on the same class
names, and compared before anything is timed. `trimmed` is the baseline with sequences cut behind
the longest name: what is left of the gain where padding is not paid for.

    python benchmarks/text_step.py [--threads 2] [--repeats 5] [--device cpu]

CLIP ViT-B/32 with random weights: its time does not depend on them. Some minutes on two cores.
Times are the least disturbed of the repeats. The last line is JSON; `ratio` is the baseline's time
over the lean one's, the smaller of the two datasets. `ratio_cpu` is the same of processor time,
which on a machine that others use is the one to read, with --threads 1.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).parents[1]))

from air_core.backbone import Backbone
from air_core.datasets import get_dataset

CONTEXT = 16
DATASETS = ("resisc45", "flowers102")  # 45 and 102 class names


def one_sequence_a_class(
    backbone: Backbone, context: Tensor, names: Sequence[str], trimmed: bool
) -> Tensor:
    """(C, D) text features of `[SOS] context name [EOT]`, padded to the longest allowed."""
    model, length = backbone.model, len(context)
    # X stands where the context goes: one token each.
    tokens = backbone.tokenizer([" ".join(["x"] * length + [name]) for name in names])
    ends = tokens.argmax(dim=-1)
    if trimmed:
        tokens = tokens[:, : int(ends.max()) + 1]
    embedded = model.token_embedding(tokens.to(context.device)).detach()  # (C, T, W)
    shared = context.expand(len(names), -1, -1)
    states = torch.cat([embedded[:, :1], shared, embedded[:, 1 + length :]], dim=1)
    states = states + model.positional_embedding[: states.shape[1]]
    mask = model.attn_mask[: states.shape[1], : states.shape[1]]
    states = model.ln_final(model.transformer(states, attn_mask=mask))
    ended = states[torch.arange(len(names)), ends]
    return normalize(ended @ model.text_projection, dim=-1)


def seconds(
    encode: Callable[[Tensor], Tensor], context: Tensor, repeats: int
) -> tuple[float, float]:
    """Least time of forward and backward: on the clock, and of processors."""
    times = []
    for _ in range(repeats):
        context.grad = None
        started, busy = time.perf_counter(), time.process_time()
        encode(context).square().sum(dim=0).max().backward()
        if context.is_cuda:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - started, time.process_time() - busy))
    return min(wall for wall, _ in times), min(cpu for _, cpu in times)


def measure(backbone: Backbone, names: Sequence[str], repeats: int) -> dict[str, float]:
    start = 0.02 * torch.randn(CONTEXT, backbone.token_width, device=backbone.device)
    context = torch.nn.Parameter(start)
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "lean_s": lambda c: backbone.encode_context(c, names),
        "trimmed_s": lambda c: one_sequence_a_class(backbone, c, names, trimmed=True),
        "baseline_s": lambda c: one_sequence_a_class(backbone, c, names, trimmed=False),
    }
    with torch.no_grad():  # the first one warms up
        features = [encode(context) for encode in ways.values()]
    apart = max(float((one - features[0]).norm() / features[0].norm()) for one in features)
    assert apart < 1e-5, f"the ways differ by {apart}"
    times = {
        name: seconds(encode, context, 3 * repeats if name == "lean_s" else repeats)
        for name, encode in ways.items()
    }
    found = {name: wall for name, (wall, _) in times.items()}
    ratios = {
        "ratio": found["baseline_s"] / found["lean_s"],
        "ratio_cpu": times["baseline_s"][1] / times["lean_s"][1],
        "ratio_trimmed": found["trimmed_s"] / found["lean_s"],
    }
    return {name: float(f"{v:.4g}") for name, v in (found | ratios | {"apart": apart}).items()}


def random_vit_b_32(device: str) -> Backbone:
    import open_clip

    logging.disable(logging.WARNING)  # that weights are random is what we want
    model, _, preprocess = open_clip.create_model_and_transforms(
        "ViT-B-32-quickgelu", pretrained=None, device=device
    )
    return Backbone(model, preprocess, open_clip.get_tokenizer("ViT-B-32"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5, help="of the slow ways")
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(asked.threads)
    backbone = random_vit_b_32(asked.device)
    found = {}
    for name in DATASETS:
        found[name] = measure(backbone, get_dataset(name).classnames, asked.repeats)
        print(name, found[name], file=sys.stderr)
    result = {
        "name": "text_step",
        "ratio": min(one["ratio"] for one in found.values()),
        "ratio_cpu": min(one["ratio_cpu"] for one in found.values()),
        "baseline": f"one padded sequence per class, ViT-B/32, context {CONTEXT}, "
        f"{asked.threads} threads, {asked.device}",
        **found,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

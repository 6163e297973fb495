"""How much does it save to encode all class names in one packed sequence?

Baseline: one sequence a class, as CoOp does, forward and backward to the context, in the same run
and on the same names. `trimmed` is the same with sequences cut behind the longest name: what is
left of the gain when padding is not paid for. Results are compared before anything is timed.

    python benchmarks/packed_text.py [--full]

--full times CLIP ViT-B/32's text tower too (random weights: its time does not depend on them);
about two minutes.
The last line is JSON; `ratio` is the baseline's time over the packed one's on the tiny CLIP.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).parents[1]))

from air_core.backbone import Backbone, load_backbone, tiny_folder

CLASSES, CONTEXT = 100, 16
ADJECTIVES = ("red", "old", "round", "flat", "long", "thin", "dark", "open", "wide", "cold")
NOUNS = ("boot", "shirt", "heart", "star", "ring", "box", "tree", "house", "cup", "key")
NAMES = [f"{adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS]


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
    embedded = model.token_embedding(tokens).detach()  # (C, T, W)
    shared = context.expand(len(names), -1, -1)
    states = torch.cat([embedded[:, :1], shared, embedded[:, 1 + length :]], dim=1)
    states = states + model.positional_embedding[: states.shape[1]]
    mask = model.attn_mask[: states.shape[1], : states.shape[1]]
    states = model.ln_final(model.transformer(states, attn_mask=mask))
    ended = states[torch.arange(len(names)), ends]
    return normalize(ended @ model.text_projection, dim=-1)


def seconds(encode: Callable[[Tensor], Tensor], context: Tensor, repeats: int) -> float:
    """Median time of forward and backward."""
    times = []
    for _ in range(repeats + 1):
        context.grad = None
        started = time.perf_counter()
        encode(context).square().sum(dim=0).max().backward()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])  # the first one warms up


def measure(backbone: Backbone, repeats: int) -> dict[str, float]:
    context = torch.nn.Parameter(0.02 * torch.randn(CONTEXT, backbone.token_width))
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "packed_s": lambda c: backbone.encode_context(c, NAMES),
        "trimmed_s": lambda c: one_sequence_a_class(backbone, c, NAMES, trimmed=True),
        "baseline_s": lambda c: one_sequence_a_class(backbone, c, NAMES, trimmed=False),
    }
    features = [encode(context).detach() for encode in ways.values()]
    apart = max((one - features[0]).abs().max().item() for one in features)
    assert apart < 1e-4, f"the ways differ by {apart}"
    found = {name: seconds(encode, context, repeats) for name, encode in ways.items()}
    ratios = {
        "ratio": found["baseline_s"] / found["packed_s"],
        "ratio_trimmed": found["trimmed_s"] / found["packed_s"],
    }
    return {name: float(f"{v:.4g}") for name, v in (found | ratios | {"apart": apart}).items()}


def random_vit_b_32() -> Backbone:
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms("ViT-B-32", pretrained=None)
    return Backbone(model, preprocess, open_clip.get_tokenizer("ViT-B-32"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="ViT-B/32's text tower too")
    full = parser.parse_args().full
    torch.manual_seed(0)
    torch.set_num_threads(1)
    towers = {"tiny": measure(load_backbone(tiny_folder()), repeats=9)}
    if full:
        towers["ViT-B-32"] = measure(random_vit_b_32(), repeats=2)
    for name, found in towers.items():
        print(name, found, file=sys.stderr)
    setting = f"one sequence per class, {CLASSES} classes, context {CONTEXT}, one thread"
    result = {
        "name": "packed_text",
        "ratio": towers["tiny"]["ratio"],
        "baseline": setting,
        "towers": towers,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

"""How much does the lean way save over a whole UL trial with a text prompt (CPL on DTD)?

Both ways learn the same prompt from the same pseudo-labelled images on stored image features; both
are timed on `--steps` training steps and one labelling pass, and scaled to the schedule of CPL:
ten rounds of 50 epochs, batches of 64, a growing share of 3,760 images in 47 classes.
Baseline: what CPL does. Each step sends one sequence a class through the text tower, padded to 77
tokens; so does each batch of 64 images that is labelled or tested. Lean: `air_core.training.fit`
and the learner's logits, where a pass encodes the class names once. The prompts that come out are
compared. Encoding the images once costs the same in both ways and is in neither.

    python benchmarks/trial.py [--steps 20] [--threads 2] [--device cpu]

CLIP ViT-B/32 with random weights and random features: its time does not depend on them. Some
minutes on two cores. The last line is JSON; `ratio` is the whole trial's time, baseline over lean,
`ratio_cpu` the same of processor time.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).parents[1]))

from air_core.backbone import Backbone
from air_core.datasets import get_dataset
from air_core.prompts.text import TextPrompt
from air_core.pseudo_labels import assign, capacity
from air_core.specs import PromptSettings, PseudoLabelSettings, TrainSettings
from air_core.training import Targeted, Training, fit
from air_core.types import Batch
from benchmarks.text_step import one_sequence_a_class, random_vit_b_32

DATASET, POOL, TEST = "dtd", 3760, 1880
ROUNDS, EPOCHS, BATCH = 10, 50, 64
SELECTION = PseudoLabelSettings(kind="candidates", growth="growing")


class PaddedPrompt(TextPrompt):
    """The same prompt, encoded as CPL does: for every batch of images, padded to 77 tokens."""

    def logits(self, batch: Batch) -> Tensor:
        parts = []
        for features in torch.split(batch.features, BATCH):
            weight = one_sequence_a_class(self.backbone, self.context, self.classnames, False)
            parts.append(features @ weight.to(features.device).T)
        return self.backbone.logit_scale * torch.cat(parts)


def trial_steps(classes: int) -> int:
    """Training steps of a trial: each round trains on more of the pool."""
    chosen = [classes * capacity(SELECTION, POOL, classes, t, ROUNDS) for t in range(ROUNDS)]
    return sum(EPOCHS * max(1, images // BATCH) for images in chosen)


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """On the clock, and of processors."""
    started, busy = time.perf_counter(), time.process_time()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, time.process_time() - busy


def measure(
    kind: type[TextPrompt], backbone: Backbone, pool: Batch, real: Targeted, steps: int
) -> tuple[Parameter, dict[str, tuple[float, float]]]:
    """The prompt after some steps; times of a step and of labelling the pool."""
    names = get_dataset(DATASET).classnames
    learner = kind(PromptSettings(), backbone, names, seed=1)
    settings = TrainSettings(batch=BATCH, steps=steps, warmup=0.0)
    training = Training(
        learner=learner,
        real=real,
        labelled=None,
        synthetic=None,
        synthetic_weight=0.0,
        loss="cc",
        settings=settings,
        seed=0,
    )
    trained = seconds(lambda: fit([training]))

    @torch.no_grad()
    def label() -> None:
        scores = learner.logits(pool).softmax(dim=-1)
        assign(scores, SELECTION, iteration=1, iterations=ROUNDS, previous=None)

    return learner.context, {
        "step": (trained[0] / steps, trained[1] / steps),
        "labelling": seconds(label),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each way")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(asked.threads)
    backbone = random_vit_b_32(asked.device)
    classes = len(get_dataset(DATASET).classnames)
    width = backbone.model.text_projection.shape[1]
    pool = Batch(normalize(torch.randn(POOL, width), dim=-1))
    chosen = torch.arange(classes * capacity(SELECTION, POOL, classes, 4, ROUNDS))
    targets = (torch.rand(len(chosen), classes) < 3 / classes).float()
    targets[chosen, chosen % classes] = 1.0
    real = Targeted(pool[chosen], targets)
    steps = trial_steps(classes)
    # Labelled once a round, tested after each and before the first.
    passes = ROUNDS + (ROUNDS + 1) * TEST / POOL

    contexts, times, found = {}, {}, {}
    measure(TextPrompt, backbone, pool, real, 2)  # warms up
    for name, kind in {"lean": TextPrompt, "baseline": PaddedPrompt}.items():
        contexts[name], times[name] = measure(kind, backbone, pool, real, asked.steps)
        found[f"{name}_step_s"] = times[name]["step"][0]
        found[f"{name}_labelling_s"] = times[name]["labelling"][0]
        print(name, {part: round(t[0], 4) for part, t in times[name].items()}, file=sys.stderr)
    lean, plain = contexts["lean"].detach(), contexts["baseline"].detach()
    apart = float((lean - plain).norm() / plain.norm())
    assert apart < 1e-3, f"the two ways learn prompts that differ by {apart}"
    whole = {
        name: [steps * t["step"][i] + passes * t["labelling"][i] for i in (0, 1)]
        for name, t in times.items()
    }
    found |= {f"{name}_trial_s": of[0] for name, of in whole.items()} | {"apart": apart}
    result = {
        "name": "trial",
        "ratio": round(whole["baseline"][0] / whole["lean"][0], 2),
        "ratio_cpu": round(whole["baseline"][1] / whole["lean"][1], 2),
        "baseline": f"CPL's loop on stored features, ViT-B/32, {classes} classes, "
        f"{asked.threads} threads, {asked.device}",
        "timed_steps": asked.steps,
        "trial_steps": steps,
        "labelling_passes": round(passes, 2),
        **{name: float(f"{value:.4g}") for name, value in found.items()},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

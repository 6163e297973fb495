"""A trial of random settings learns, or fails with a sentence that names the cause.

The images are the real digits and digits drawn by the tiny diffusion model."""

from __future__ import annotations

import math
import random
import typing
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from air_core.methods import METHODS
from air_core.settings.flat import Key, trial_keys
from orchestrator.planning import Resolver
from orchestrator.spec import cells_of, load_sweep
from orchestrator.stages.context import WorkerContext
from orchestrator.stages.trial_run import run_trial
from orchestrator.store import ArtifactStore
from tests.helpers.inputs import build_inputs

TRIALS = 30
ALWAYS = {"lora": None, "train.steps": 2, "images_per_class": 3, "iterations": 2}
SKIPPED = ("dataset", "test_dataset", "backbone", "generator", "precision", "images_from")
SKIPPED += ("seed", "split_seed")
SKIPPED_GROUPS = ("lora", "generation", "initial_labels", "evidence", "train.steps", "train.epochs")
FEW: dict[str, list[Any]] = {  # other values take long, or leave classes without an image
    "modality": ["text", "text", "text", "visual"],
    "images_per_class": [0, 1, 2, 8],
    "iterations": [0, 1, 3],
    "auxiliary.rounds": [1, 3],
    "generation.block": [1, 4],
    "pool_size": [10, 37, 10_000],
}


def values_of(key: Key) -> list[Any]:
    """All choices; of numbers the smallest, the default and a large one."""
    limits, default = key.limits, key.default
    if key.type is bool:
        return [False, True]
    if typing.get_origin(key.type) is Literal:
        return [*typing.get_args(key.type)]
    if key.type is float:
        high = limits.get("le", 0.95 * limits["lt"] if "lt" in limits else 10 * default)
        return [limits.get("ge", default / 1e6), default, high]
    return [limits["ge"], default or 30, min(10_000, limits.get("le", 10_000))]


VALUES = FEW | {
    name: values_of(key)
    for name, key in trial_keys().items()
    if not name.startswith(SKIPPED_GROUPS) and name not in (*SKIPPED, *FEW)
}
EXPECTED_ERRORS = (  # that depend on the images or the class names
    "shorten the name or prompt.length",
    "lda needs images of a class that differ",
    "leave the control and the bounds of AiR out",
)


def random_settings(rng: random.Random) -> dict[str, Any]:
    method = rng.choice(sorted(METHODS))
    keys = rng.sample(sorted(VALUES), rng.choice([2, 4, 8, 14]))
    settings = ALWAYS | {key: rng.choice(VALUES[key]) for key in keys}
    free = {k: value for k, value in settings.items() if k not in METHODS[method].pins}
    return {"method": method} | free


def test_any_settings_are_learned_or_refused_with_a_sentence(drawn_digits, tmp_path):
    rng, worker = random.Random(0), WorkerContext(ArtifactStore(tmp_path / "runs"))
    resolver, file = Resolver(tmp_path / "digests.json", None), Path(tmp_path / "any.yaml")
    learned = refused = 0
    while learned < TRIALS:
        fixed = {"generator": f"folder:{drawn_digits}", **random_settings(rng)}
        file.write_text(yaml.safe_dump({"version": 1, "name": "any", "fixed": fixed}))
        try:
            [cell] = cells_of(load_sweep(file))
            trial = resolver.trial({**cell.flat, "seed": 1})
        except ValueError:
            refused += 1
            continue
        try:
            build_inputs(trial, worker)
            metrics = run_trial(trial, worker.store).metrics
        except Exception as problem:
            message = f"{type(problem).__name__}: {problem}"
            if not any(words in message for words in EXPECTED_ERRORS):
                pytest.fail(f"{message} with {fixed}")
        else:
            learned += 1
            assert all(math.isfinite(value) for value in metrics.values()), (metrics, fixed)
    assert refused < 10 * learned

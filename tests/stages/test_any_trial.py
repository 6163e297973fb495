"""A trial of random settings learns, or fails with a sentence that names the cause.

The images are the real digits and digits drawn by the tiny diffusion model."""

from __future__ import annotations

import math
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from air_core.methods import METHODS
from orchestrator.planning import Resolver, requirements_of
from orchestrator.planning.plan import build_level
from orchestrator.spec import cells_of, load_sweep
from orchestrator.stages import TrialSpec, stage_module
from orchestrator.stages.context import WorkerContext
from orchestrator.stages.trial_run import run_trial
from orchestrator.store import ArtifactStore

TRIALS = 30
ALWAYS = {"lora": None, "train.steps": 2, "images_per_class": 3, "iterations": 2}
VALUES: dict[str, list[Any]] = {
    "paradigm": ["ul", "ssl", "trzsl"],
    "modality": ["text", "text", "text", "visual"],
    "pool": ["train", "train+val"],
    "shots": [1, 5, 200],
    "class_seed": [500, 0],
    "pool_size": [10, 37, 10_000],
    "labelled_size": [1, 30],
    "pool_ratio": [1.5, 1000.0],
    "pool_missing": [0.1, 0.95],
    "supervision": ["labelled"],
    "transduction": ["gmm"],
    "images_per_class": [0, 1, 2, 8],
    "fusion_weight": [0, 0.001, 1.0],
    "synthetic_weight": [0, 0.3, 2.0],
    "iterations": [0, 1, 3],
    "fidelity.kind": ["text", "argmax", "real_mean", "random", "none"],
    "fidelity.keep": [1, 2],
    "auxiliary.kind": ["prototype", "knn", "cache", "linear_probe"],
    "auxiliary.source": ["synthetic", "real", "both"],
    "auxiliary.center": [False],
    "auxiliary.temperature": ["logit_scale", "kappa"],
    "auxiliary.kappa": [0.01, 1000.0],
    "auxiliary.neighbours": [1, 1000],
    "auxiliary.rounds": [3],
    "auxiliary.k": [1, 2, 5000],
    "auxiliary.refresh": [True, False],
    "auxiliary.k_step": [1, 50],
    "auxiliary.fade": [True],
    "fusion.space": ["logit"],
    "fusion.schedule": ["annealed"],
    "pseudo_labels.kind": ["top_k", "predicted", "threshold"],
    "pseudo_labels.growth": ["fixed", "growing"],
    "pseudo_labels.k": [1, 5000],
    "pseudo_labels.alpha": [0, 1],
    "pseudo_labels.beta": [0, 1],
    "pseudo_labels.threshold": [0, 0.999, 1],
    "pseudo_labels.loss": ["ce", "rc"],
    "prompt.length": [1, 4, 64],
    "prompt.depth": ["deep"],
    "prompt.init": ["uniform"],
    "prompt.restart": [False],
    "train.batch": [1, 100_000],
    "train.synthetic_batch": [1],
    "train.learning_rate": [1e-8, 2.0],
    "train.weight_decay": [0, 0.5],
    "train.warmup": [0, 0.99],
    "train.clip": [1e-6],
    "train.mix": ["real", "synthetic"],
    "train.labelled_weight": [0, 10.0],
    "train.labelled_among": ["all", "seen"],
    "generation.block": [1, 4],
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


def build_inputs(trial: TrialSpec, worker: WorkerContext) -> None:
    """Make what a trial reads, in this process."""
    requirements = requirements_of([trial])
    for requirement in sorted(requirements, key=lambda requirement: build_level(requirement.spec)):
        spec, make = requirement.spec, stage_module(requirement.spec)
        if not requirement.rows:
            make.build(spec, worker)
            continue
        generator = partial(spec.images.open, worker)
        for class_index, block in requirement.missing(worker.store):
            make.build(spec, class_index, block, worker, generator)


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

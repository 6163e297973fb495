"""A small fixed set of finished trials, whose accuracies differ by method, and their tables."""

from __future__ import annotations

from typing import Any

import numpy as np

from orchestrator.reporting import Results
from orchestrator.reporting.rows import FinishedTrial
from orchestrator.spec.presets import defaults

# method -> (accuracy, accuracy of pseudo-labels)
ACCURACY = {
    "zero_shot": (0.50, None),
    "fpl": (0.60, 0.71),
    "cpl": (0.66, 0.74),
    "air": (0.70, 0.79),
    "air_control": (0.695, 0.78),
    "air_ceiling": (0.90, 0.95),
}
QUICKSTART = tuple(ACCURACY)[:-1]
NUMBERS = {"zero_shot": 0, "fpl": 2, "grip": 3, "cpl": 4, "air": 5, "air_control": 8}
NUMBERS["air_ceiling"] = 9


def trials(
    method: str,
    *,
    splits: tuple[int, ...] = (0,),
    seeds: tuple[int, ...] = (1, 2, 3),
    settings: dict[str, Any] | None = None,
    dataset: str = "digits",
    cell: str = "",
    point: int = 0,
    objective: float | None = None,
    better: float = 0.0,
) -> list[FinishedTrial]:
    """The trials of one point, on 300 of 1,000 images that are equally hard for all methods."""
    accuracy, pseudo = ACCURACY[method]
    settings = settings or {}
    number = NUMBERS[method]
    ease = np.random.default_rng(0).random(1000)
    labels = np.random.default_rng(1).integers(0, 10, 1000)
    result = []
    for split in splits:
        ids = np.sort(np.random.default_rng([2, split]).choice(1000, 300, replace=False))
        for seed in seeds:
            noise_seed = 0 if method == "zero_shot" else seed
            rng = np.random.default_rng([3, split, noise_seed, number])
            right = ease[ids] + 0.1 * rng.standard_normal(300) < accuracy + better
            predictions = np.where(right, labels[ids], (labels[ids] + 1) % 10)
            metrics = dict.fromkeys(("test/accuracy", "test/accuracy_text"), float(right.mean()))
            if pseudo:
                metrics["pseudo/accuracy"] = pseudo + 0.01 * rng.standard_normal()
            if method in ("air", "air_control"):
                metrics["test/accuracy_fused"] = metrics["test/accuracy"] + 0.08
                metrics["test/accuracy_auxiliary"] = metrics["test/accuracy"] + 0.02
            flat = defaults(method, {"dataset": dataset}) | settings
            result.append(
                FinishedTrial(
                    cell=cell or f"{dataset}-{method}",
                    method=method,
                    flat=flat
                    | {"paradigm": "ul", "modality": "text", "seed": seed, "split_seed": split},
                    settings=settings,
                    searched=frozenset(() if objective is None else settings),
                    point=point,
                    seed=None if method == "zero_shot" else seed,
                    split_seed=split,
                    objective=objective,
                    metrics=metrics,
                    image_ids=ids,
                    predictions=predictions,
                    by_classifier={"text": predictions},
                    labels=labels[ids],
                )
            )
    return result


def results(finished: list[FinishedTrial], objective: str | None = None) -> Results:
    classes = {trial.flat["dataset"]: 10 for trial in finished}
    return Results(finished, objective, classes)


def quickstart() -> list[FinishedTrial]:
    return [trial for method in QUICKSTART for trial in trials(method)]


def searched(guides: bool = True) -> list[FinishedTrial]:
    """A host with one point and AiR with six points.

    The second point has the best objective, the third the best test accuracy.

    Args:
        guides: whether the objective ranks the points by test accuracy.
    """
    points = [
        (120, 0.5, 0.20, -0.05),
        (60, 0.348192, 0.90, 0.08),
        (30, 0.1, 0.80, 0.12),
        (30, 0.2, 0.10, -0.10),
        (30, 0.3, 0.40, 0.01),
        (30, 0.4, 0.30, -0.02),
    ]
    if not guides:
        betters = (-0.02, -0.05, 0.12, 0.08, -0.10, 0.01)
        points = [(*point[:3], better) for point, better in zip(points, betters, strict=True)]
    return trials("cpl", splits=(0, 1), seeds=(1, 2), objective=0.7) + [
        trial
        for point, (images, weight, objective, better) in enumerate(points)
        for trial in trials(
            "air",
            splits=(0, 1),
            seeds=(1, 2),
            settings={"images_per_class": images, "fusion_weight": weight},
            point=point,
            objective=objective,
            better=better,
        )
    ]


def one_line(text: str) -> str:
    return " ".join(text.split())

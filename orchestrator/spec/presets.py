"""Defaults of a sweep file's settings, by method and by the names that a cell picks.

A *world* is the value of `backbone` or `generator`. The table of methods is
`air_core.methods.METHODS`. Precedence: default < dataset < world < method's defaults < method's
pins < fixed < overrides < grid < space. The worlds of other generators are read from their files
(`orchestrator.planning.resolve`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from air_core.datasets import keeps_validation
from air_core.methods import EMBEDDED, METHODS

Worlds = Mapping[tuple[str, str], Mapping[str, Any]]  # settings by key and value

KEPT = {"pool": "train"}  # of datasets that keep their validation images
# Defaults of a world, by key and value; the last one wins. All other defaults are those of
# air_core.settings, for Stable Diffusion 1.5 and CLIP ViT-B/32.
WORLDS: dict[tuple[str, str], dict[str, Any]] = {
    ("generator", "tiny"): {
        "initial_labels.k": 32,
        "lora.rank": 8,
        "lora.steps": 300,
        "lora.batch": 16,
        "lora.learning_rate": 2e-3,
        # Processors without bf16 instructions emulate them, ten times slower.
        "lora.precision": "fp32",
        "generation.precision": "fp32",
        "generation.guidance_scale": 4.0,
        "generation.num_inference_steps": 10,
        "generation.size": 32,
        "generation.block": 16,
        "evidence.precision": "fp32",
        "evidence.block": 64,
        "fidelity.kind": "none",
    },
    ("backbone", "tiny"): {
        "precision": "fp32",  # older than TF32, which changes nothing on a CPU
        "auxiliary.kind": "lda",
        "fusion_weight": 0.8,
        "pseudo_labels.alpha": 0.9,
        "pseudo_labels.beta": 0.9,
        "train.steps": 100,
        "train.learning_rate": 0.2,
        "train.weight_decay": 0.01,
        "train.warmup": 0.05,
        "synthetic_weight": 0.0,
    },
}

# Said before a run, and beside accuracies that are not better than chance.
SETUP_ONLY = (
    "the tiny models test the set-up only and know no photographs: for results set backbone and "
    "generator to real models (docs/your_images.md)"
)


def tests_setup_only(backbone: str, dataset: str) -> bool:
    """Whether the tiny CLIP reads a folder of images."""
    return backbone == EMBEDDED["backbone"] and dataset.startswith("folder:")


def defaults(method: str, chosen: Mapping[str, Any], worlds: Worlds = WORLDS) -> dict[str, Any]:
    """Settings of a method in the world that `chosen` picks, where they differ from the default.

    Args:
        method: a key of METHODS.
        chosen: dotted keys of the sweep file (fixed and grid); only dataset, backbone and
            generator are read.
        worlds: WORLDS, and others that were read from files.
    """
    names = {key: chosen.get(key, default) for key, default in EMBEDDED.items()}
    flat: dict[str, Any] = dict(names)
    if keeps_validation(str(names["dataset"])):
        flat |= KEPT
    for (key, value), settings in worlds.items():
        if names[key] == value:
            flat |= settings
    return flat | METHODS[method].sets | METHODS[method].pins

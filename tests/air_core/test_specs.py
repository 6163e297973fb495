"""Specs: conversion to and from flat keys, normalisation, and the artifacts that trials share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from air_core.methods import METHODS
from air_core.settings import Ref
from air_core.settings.conditions import uses_auxiliary, uses_images
from air_core.settings.flat import from_flat, to_flat
from air_core.settings.normal import normalised
from orchestrator.keys import artifact_key
from orchestrator.stages import GeneratedImages, TrialSpec, trial_of

NAMES = ("digit zero", "digit one")
REFS = {
    "dataset": Ref(name="digits", digest="d"),
    "backbone": Ref(name="tiny", digest="b"),
    "generator": Ref(name="tiny", digest="g"),
}
FOLDER = {**REFS, "generator": Ref(name="folder:/pictures", digest="f")}

# Settings that make other settings irrelevant.
NO_ROUND = {"iterations": 0}
ONE_ROUND = {"iterations": 1, "auxiliary.source": "real"}
NO_IMAGES = {"images_per_class": 0}
NOT_FUSED = {"fusion_weight": 0.0}
SYNTHETIC_ONLY = {"auxiliary.source": "synthetic"}
REAL_ONLY = {"auxiliary.source": "real", "synthetic_weight": 0.0}
BOTH_BUT_NO_IMAGES = {"auxiliary.source": "both", "images_per_class": 0}
GROWING = {"pseudo_labels.growth": "growing"}
EVIDENCE = {"evidence.draws": 4}
LABELLED = {"paradigm": "ssl", "supervision": "labelled"}
ERRORS_ALONE = {**NO_IMAGES, **EVIDENCE}


def trial(refs: dict[str, Ref] = REFS, **flat: Any) -> TrialSpec:
    return trial_of({k.replace("__", "."): v for k, v in flat.items()}, refs, NAMES)


def at(flat: dict[str, Any], key: str, value: Any, refs: dict[str, Ref] = REFS) -> TrialSpec:
    return trial_of({**flat, key: value}, refs, NAMES)


def key(spec: TrialSpec) -> str:
    return artifact_key(spec).digest


# ---------------------------------------------------------------- flat and nested


def test_several_texts_read_from_json_are_those_of_a_sweep_file():
    texts = ("a {}", "a small {}")
    assert trial(lora__caption=[*texts]) == trial(lora__caption=texts)


@pytest.mark.parametrize("method", METHODS)
def test_flat_keys_of_a_trial_become_the_same_trial_again(method):
    spec = METHODS[method].trial({"seed": 3, "pool_size": 7, "train.steps": 5})
    flat = {name: value for name, value in to_flat(spec).items() if name not in REFS}
    refs = {name: getattr(spec, name) for name in REFS}
    assert from_flat(flat, refs) == spec


# ---------------------------------------------------------------- settings without effect

# Settings without effect: (other settings, key, a value, another value).
WITHOUT_EFFECT = [
    ({}, "test_dataset", None, REFS["dataset"]),
    ({}, "shots", 1, 2),
    ({}, "lora.source", "all", "pseudo"),
    ({}, "evidence.low", 0.2, 0.4),
    (NO_ROUND, "pseudo_labels.kind", "top_k", "candidates"),
    (NO_ROUND, "synthetic_weight", 0.3, 1.0),
    (NO_ROUND, "supervision", "labelled", "pseudo"),
    (NO_ROUND, "seed", 1, 2),
    (ONE_ROUND, "auxiliary.refresh", True, False),
    (ONE_ROUND, "fusion.schedule", "fixed", "annealed"),
    (BOTH_BUT_NO_IMAGES, "auxiliary.source", "both", "real"),
    (NOT_FUSED, "auxiliary.source", "both", "real"),
    (NO_IMAGES, "fusion_weight", 0.3, 0.7),
    (NO_IMAGES, "lora.rank", 4, 8),
    (NO_IMAGES, "images_from", "generator", "true_labels"),
    (SYNTHETIC_ONLY, "auxiliary.k", 8, 16),
    (REAL_ONLY, "images_per_class", 0, 50),
    ({"fidelity.kind": "none"}, "fidelity.keep", 4, 8),
    ({"initial_labels.kind": "pool"}, "initial_labels.true_share", None, 0.5),
    ({"auxiliary.source": "real"}, "fidelity.keep", 4, 8),
    (GROWING, "pseudo_labels.k", 8, 16),
    ({"pseudo_labels.kind": "top_k"}, "pseudo_labels.alpha", 0.5, 0.9),
    ({"train.steps": 100}, "train.epochs", 5, 50),
    ({"train.mix": "real"}, "synthetic_weight", 0.3, 1.0),
    ({"lora.passes": 3}, "lora.steps", 100, 200),
    ({"images_from": "lora_images"}, "lora.rank", 4, 8),
    (LABELLED, "iterations", 1, 5),
    (LABELLED, "evidence.draws", 0, 4),
    (ERRORS_ALONE, "generation.seed", 0, 1),
]


@pytest.mark.parametrize(("where", "name", "one", "other"), WITHOUT_EFFECT)
def test_a_setting_without_effect_changes_no_key(where, name, one, other):
    specs = [at(where, name, value) for value in (one, other)]
    assert specs[0] != specs[1]
    assert key(specs[0]) == key(specs[1])
    for spec in specs:
        once = normalised(spec)
        assert normalised(once) == once
        assert (uses_images(once), uses_auxiliary(once)) == (
            uses_images(spec),
            uses_auxiliary(spec),
        )
        assert once.features == spec.features


def test_settings_of_generation_have_no_effect_on_a_folder_of_ready_images():
    others = {"lora.rank": 8, "initial_labels.k": 8, "generation.seed": 1}
    for name, value in {**others, "generation.precision": "fp32"}.items():
        assert key(at({}, name, value, FOLDER)) == key(trial(FOLDER)), name


def test_generators_that_are_not_used_do_not_change_the_key():
    assert key(trial(images_per_class=0)) == key(trial(FOLDER, images_per_class=0))
    assert key(trial()) != key(trial(FOLDER))


# The same with an effect. Each setting alone is in tests/root/test_keys.py.
WITH_EFFECT = [
    ({}, "test_dataset", None, Ref(name="others", digest="o")),
    ({}, "generation.template", ("a {}", "a small {}"), ("a small {}", "a {}")),
    (NO_ROUND, "fusion_weight", 0.3, 0.7),
    (NO_ROUND, "images_per_class", 25, 50),
    (NO_ROUND, "split_seed", 0, 1),
    ({**NO_ROUND, **REAL_ONLY}, "auxiliary.k", 8, 16),
    ({"paradigm": "ssl", "images_from": "lora_images"}, "lora.source", "all", "pseudo"),
]


@pytest.mark.parametrize(("where", "name", "one", "other"), WITH_EFFECT)
def test_a_setting_with_an_effect_changes_the_key(where, name, one, other):
    assert key(at(where, name, one)) != key(at(where, name, other))


# ---------------------------------------------------------------- artifacts


def test_without_lora_the_row_does_not_depend_on_the_split():
    assert trial(lora=None).images == trial(lora=None, split_seed=1, pool="train").images


def test_base_images_are_the_same_row_without_lora():
    spec = trial(lora__rank=8)
    assert isinstance(spec.images, GeneratedImages)
    assert spec.base_features.images == replace(spec.images, lora=None)
    assert spec.base_features == trial(lora=None).synthetic_features
    assert trial(lora=None).base_features is None


@pytest.mark.parametrize(
    ("flat", "reads"),
    [
        ({}, True),
        ({"images_per_class": 0}, False),
        ({"fusion_weight": 0.0}, True),  # in the loss
        ({"fusion_weight": 0.0, "synthetic_weight": 0.0}, False),
        ({"fusion_weight": 0.0, "iterations": 0}, False),
        ({"iterations": 0}, True),  # in the fused classifier
        ({"auxiliary.source": "real", "synthetic_weight": 0.0}, False),
        ({"auxiliary.source": "real"}, True),  # in the loss
        ({"auxiliary.source": "both", "synthetic_weight": 0.0}, True),
    ],
)
def test_a_trial_reads_images_only_where_they_are_fused_or_trained_on(flat, reads):
    spec = trial_of(flat, REFS, NAMES)
    assert (spec.images is not None) == reads
    assert (spec.synthetic_features is not None) == reads

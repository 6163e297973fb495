"""Specs: conversion to and from flat keys, normalisation, and the artifacts that trials share."""

from __future__ import annotations

import operator
import random
import typing
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from air_core.settings import Ref
from air_core.settings.conditions import uses_auxiliary, uses_images
from air_core.settings.flat import to_flat, trial_keys
from air_core.settings.normal import normalised
from orchestrator.keys import artifact_key
from orchestrator.stages import FolderImages, GeneratedImages, TrialSpec, trial_of

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


def test_every_default_is_within_its_limits():
    for known in trial_keys().values():
        for limit, value in known.limits.items():
            assert known.default is None or getattr(operator, limit)(known.default, value), known


# ---------------------------------------------------------------- settings without effect

# Settings without effect: (other settings, key, a value, another value).
WITHOUT_EFFECT = [
    ({}, "test_dataset", None, REFS["dataset"]),
    ({}, "shots", 1, 2),
    ({"paradigm": "trzsl"}, "shots", 1, 2),
    ({"paradigm": "ssl"}, "labelled_size", 40, None),
    ({}, "lora.source", "all", "pseudo"),
    ({}, "evidence.low", 0.2, 0.4),
    (NO_ROUND, "pseudo_labels.kind", "top_k", "candidates"),
    (NO_ROUND, "train.learning_rate", 0.1, 0.2),
    (NO_ROUND, "synthetic_weight", 0.3, 1.0),
    (NO_ROUND, "supervision", "labelled", "pseudo"),
    (NO_ROUND, "seed", 1, 2),
    (ONE_ROUND, "auxiliary.refresh", True, False),
    (ONE_ROUND, "fusion.schedule", "fixed", "annealed"),
    (BOTH_BUT_NO_IMAGES, "auxiliary.source", "both", "real"),
    (NOT_FUSED, "auxiliary.source", "both", "real"),
    (NOT_FUSED, "fidelity.keep", 4, 8),
    (NO_IMAGES, "fusion_weight", 0.3, 0.7),
    (NO_IMAGES, "lora.rank", 4, 8),
    (NO_IMAGES, "generation.guidance_scale", 4.0, 7.5),
    (NO_IMAGES, "images_from", "generator", "true_labels"),
    (SYNTHETIC_ONLY, "auxiliary.k", 8, 16),
    (REAL_ONLY, "images_per_class", 0, 50),
    ({"fidelity.kind": "none"}, "fidelity.keep", 4, 8),
    ({"auxiliary.source": "real"}, "fidelity.keep", 4, 8),
    ({"initial_labels.kind": "pool"}, "initial_labels.true_share", None, 0.5),
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
    assert at(where, name, one) != at(where, name, other)
    assert key(at(where, name, one)) == key(at(where, name, other))


def test_settings_of_generation_have_no_effect_on_a_folder_of_ready_images():
    for name in ("lora.rank", "initial_labels.k", "generation.seed", "generation.precision"):
        one, other, *_ = values_of(name)
        assert key(at({}, name, one, FOLDER)) == key(at({}, name, other, FOLDER)), name


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


# Values of keys in random trials: few, so that equal values are frequent.
WORDS = {
    "lora.caption": ["a photo of a {}", "{}"],
    "generation.template": ["a photo of a {}", ("{}", "a {}")],
    "train.steps": [None, 5],
    "lora.passes": [None, 5],
}


def values_of(name: str) -> list[Any]:
    known = trial_keys()[name]
    if name in WORDS:
        return WORDS[name]
    if typing.get_origin(known.type) is typing.Literal:
        return list(typing.get_args(known.type))
    if known.type is bool:
        return [False, True]
    if known.type is int:
        low = int(known.limits["ge"])
        return [low, low + 1, known.default, known.limits.get("le", known.default + 5)]
    low = known.limits.get("ge", 1e-3)
    return [low, known.default, known.limits.get("le", 0.9)]


SETTINGS = [name for name in trial_keys() if name not in (*REFS, "test_dataset", "lora")]


def settings_of(number: int) -> dict[str, Any]:
    """Random settings. Each has random numbers of its own, so that a further setting changes no
    other one."""
    flat: dict[str, Any] = {}
    for name in SETTINGS:
        own = random.Random(f"{number} {name}")
        if own.random() < 0.5:
            flat[name] = own.choice(values_of(name))
    if number % 2:
        return flat
    return {n: v for n, v in flat.items() if not n.startswith("lora.")} | {"lora": None}


RANDOM = st.integers(0, 2**32 - 1).map(settings_of)
REFERENCES = st.sampled_from([REFS, FOLDER])


@given(RANDOM, REFERENCES)
def test_normalising_again_changes_nothing_and_keeps_the_inputs_of_a_trial(flat, refs):
    spec = trial_of(flat, refs, NAMES)
    once = normalised(spec)
    assert normalised(once) == once
    assert key(once) == key(spec)
    assert uses_images(once) == uses_images(spec)
    assert uses_auxiliary(once) == uses_auxiliary(spec)
    assert once.features == spec.features


# ---------------------------------------------------------------- artifacts


def test_without_lora_the_row_does_not_depend_on_the_split():
    assert trial(lora=None).images == trial(lora=None, split_seed=1, pool="train").images


def test_base_images_are_the_same_row_without_lora():
    spec = trial(lora__rank=8)
    assert isinstance(spec.images, GeneratedImages)
    assert spec.base_features.images == replace(spec.images, lora=None)
    assert spec.base_features == trial(lora=None).synthetic_features
    assert trial(lora=None).base_features is None


def test_a_folder_of_ready_images_has_no_lora():
    spec = trial(FOLDER, generation__size=64)
    assert spec.images == FolderImages(
        model=FOLDER["generator"], classnames=NAMES, size=64, block=8
    )
    assert spec.lora_adapter is None
    assert spec.base_features is None


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


@given(RANDOM)
def test_flat_keys_become_a_nested_trial_and_the_same_flat_keys_again(flat):
    spec = trial_of(flat, REFS, NAMES)
    again = to_flat(spec)
    assert flat.items() <= (again if spec.lora else {**again, "lora": None}).items()
    named = {name: value for name, value in again.items() if name not in REFS}
    assert trial_of(named, REFS, NAMES) == spec

"""Keys: the settings that change them, the settings that do not, and golden keys."""

from __future__ import annotations

import dataclasses
import json
import os
import typing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from air_core.methods import EMBEDDED, METHODS
from air_core.settings import (
    EvidenceScoring,
    GenerationSettings,
    InitialLabelsSettings,
    LoraTraining,
    Ref,
    SplitSettings,
)
from air_core.settings.flat import to_flat, trial_keys
from air_core.settings.normal import normalised
from orchestrator.keys import artifact_key
from orchestrator.spec import presets
from orchestrator.spec._trial_values import reason_not_searchable
from orchestrator.stages import FolderImages, TrialSpec, trial_of

GOLDEN = Path(__file__).parents[1] / "golden" / "keys.json"
CLASSES = tuple(f"digit {word}" for word in ("zero", "one", "two"))
TINY = {name: Ref(name="tiny", digest=f"{name} digest") for name in EMBEDDED}
LARGE = {
    "dataset": Ref(name="digits", digest="digits"),
    "backbone": Ref(name="ViT-B-32/openai", digest="vit b 32"),
    "generator": Ref(name="sd15", digest="stable diffusion"),
}
FOLDER = {**TINY, "generator": Ref(name="folder:/pictures", digest="pictures")}


def trial(method: str = "air", refs: dict[str, Ref] = TINY, **changes: Any) -> TrialSpec:
    chosen = {name: ref.name for name, ref in refs.items() if name != "dataset"}
    flat = presets.defaults(method, {"dataset": "digits", **chosen})
    flat = {name: value for name, value in flat.items() if name not in refs}
    flat |= {k.replace("__", "."): v for k, v in changes.items()}
    return normalised(trial_of(flat, refs, CLASSES))


def stages(spec: TrialSpec) -> dict[str, Any]:
    """Every spec nested in a trial, by stage."""
    specs: dict[str, Any] = {"trials": spec, "features": spec.features}
    if spec.synthetic_features is not None:
        specs |= {"synthetic": spec.synthetic_features, "images": spec.images}
    if spec.lora_adapter is not None:
        specs |= {"lora": spec.lora_adapter, "labels": spec.lora_adapter.labels}
    if spec.evidence_errors is not None:
        specs["evidence"] = spec.evidence_errors
    return specs


def digests(spec: TrialSpec) -> dict[str, str]:
    return {stage: artifact_key(nested).digest for stage, nested in stages(spec).items()}


# ---------------------------------------------------------------- golden

PUBLISHED = {
    **{f"{method}, tiny": trial(method) for method in METHODS},
    **{f"{method}, large": trial(method, LARGE) for method in METHODS},
    "air, tiny, no LoRA": trial(lora=None),
    "air, tiny, ready images": trial(refs=FOLDER),
    "air, tiny, both sources": trial(auxiliary__source="both", auxiliary__refresh=True),
    "air, tiny, seed 2 of split 1": trial(seed=2, split_seed=1),
    "air, large, 50 images": trial(refs=LARGE, images_per_class=50),
}


def test_keys_of_published_specs_equal_the_golden_ones():
    """A changed key invalidates the artifacts in existing stores.

    Raise a recipe number if the results change.
    """
    keys = {
        name: {
            stage: "{0.stage}/v{0.recipe}/{0.digest}".format(artifact_key(nested))
            for stage, nested in stages(spec).items()
        }
        for name, spec in PUBLISHED.items()
    }
    if os.environ.get("AIRSWEEP_UPDATE_GOLDEN") == "1":
        GOLDEN.write_text(json.dumps(keys, indent=1, sort_keys=True) + "\n")
    assert keys == json.loads(GOLDEN.read_text())


# ---------------------------------------------------------------- content of a key


@pytest.mark.parametrize("name", ["dataset", "backbone", "generator"])
def test_a_key_depends_on_the_content_of_an_input_and_not_on_its_name(name):
    spec = trial()
    renamed = replace(spec, **{name: Ref(name="elsewhere", digest=TINY[name].digest)})
    changed = replace(spec, **{name: Ref(name=TINY[name].name, digest="other")})
    assert digests(renamed) == digests(spec)
    assert digests(changed)["trials"] != digests(spec)["trials"]
    assert "changes the images" in reason_not_searchable(name)


ROW: dict[str, Any] = {"classnames": CLASSES, "size": 32, "block": 8}


def test_a_key_contains_stage_recipe_and_a_short_description_that_is_a_valid_folder_name():
    key = artifact_key(trial(seed=3))
    assert str(key) == f"trials/v1/tiny-ul-text-s3-{key.digest[:12]}"
    assert len(key.digest) == 40
    row = artifact_key(FolderImages(model=Ref(name="folder:/a b/../c", digest="x"), **ROW))
    assert row.slug == "c"
    long = artifact_key(FolderImages(model=Ref(name="folder:" + "x" * 200, digest="x"), **ROW))
    assert len(long.slug) <= 60
    assert long.digest == row.digest


# ---------------------------------------------------------------- stages that a setting changes

STAGES = ("features", "labels", "lora", "images", "synthetic", "evidence", "trials")


def names(settings: type, group: str = "") -> set[str]:
    return {f"{group}.{f.name}".strip(".") for f in dataclasses.fields(settings)}


# The settings by the first stage that they change; later stages change too. All other settings
# change the trial alone.
CHANGES = {
    "features": {"precision"},
    "labels": {
        "lora.source",
        *names(SplitSettings),
        *names(InitialLabelsSettings, "initial_labels"),
    },
    # The LoRA is trained at the size of the images.
    "lora": {"generation.size", *names(LoraTraining, "lora")},
    "images": {"lora.scale", *names(GenerationSettings, "generation")} - {"generation.size"},
    "evidence": names(EvidenceScoring, "evidence"),
}
FIRST = {name: stage for stage, of in CHANGES.items() for name in of}
SSL, TRZSL, VISUAL = {"paradigm": "ssl"}, {"paradigm": "trzsl"}, {"modality": "visual"}
REFRESHED = {"auxiliary__source": "both", "auxiliary__refresh": True}
CONTEXT: dict[str, dict[str, Any]] = {  # the settings with which a setting has an effect
    "shots": SSL,
    "lora.source": SSL,
    "train.labelled_weight": SSL,
    "class_seed": TRZSL,
    "train.labelled_among": TRZSL,
    "auxiliary.kappa": {"auxiliary__temperature": "kappa"},
    "auxiliary.neighbours": {"auxiliary__kind": "knn"},
    "auxiliary.rounds": {"auxiliary__source": "real"},
    "auxiliary.k": {"fidelity__kind": "real_mean"},
    "auxiliary.refresh": {"auxiliary__source": "both"},
    "auxiliary.k_step": REFRESHED,
    "auxiliary.fade": REFRESHED,
    "pseudo_labels.k": {"pseudo_labels__growth": "fixed"},
    "pseudo_labels.threshold": {"pseudo_labels__kind": "threshold"},
    "prompt.depth": VISUAL,
    "evidence.prune_to": {"evidence__prune_after": 1},
}


def other_value(name: str, value: Any) -> Any:
    kind = trial_keys()[name].type
    if typing.get_origin(kind) is typing.Literal:
        return next(word for word in typing.get_args(kind) if word != value)
    match value:
        case bool(value):
            return not value
        case int(value):
            return value + 1
        case float(value):
            return value / 2 or 0.5
        case str(value):
            return f"{value}, {{}}"
    return 3


@pytest.mark.parametrize(
    "name",
    [n for n in trial_keys() if n not in (*EMBEDDED, "test_dataset", "lora")],
)
def test_a_setting_changes_its_stage_and_later_stages_and_is_searchable_if_only_trials(name):
    # The large models train and generate in bf16, the tiny ones in fp32.
    context = {"refs": LARGE, **CONTEXT.get(name, {})}
    if name.startswith("evidence."):
        context["evidence__draws"] = 2
    base = trial(**context)
    changes = {name.replace(".", "__"): other_value(name, to_flat(base)[name])}
    before, after = digests(base), digests(trial(**{**context, **changes}))
    different = {stage for stage in before if before[stage] != after.get(stage)}
    if name in ("auxiliary.source", "images_from"):  # without synthetic images, no row of them
        different -= {"images", "synthetic", "lora", "labels"}
    assert different == before.keys() & STAGES[STAGES.index(FIRST.get(name, "trials")) :]
    # More images of the same row of denoising errors are one key, and take longer.
    prepares = different != {"trials"} or name == "evidence.images"
    changes_preparation = "changes the" in (reason_not_searchable(name) or "")
    assert (changes_preparation or name == "split_seed") == prepares

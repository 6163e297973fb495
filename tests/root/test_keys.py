"""Identity: what moves a key, what must not, and the keys that GPU-hours hang on."""

from __future__ import annotations

import json
import math
import os
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from air_core.flat import from_flat, to_flat, trial_keys
from air_core.specs import (
    AuxiliarySettings,
    FeaturesSpec,
    FolderImages,
    GeneratedImages,
    LabelsSpec,
    LoraSpec,
    Ref,
    SyntheticFeaturesSpec,
    TrialSpec,
)
from orchestrator import keys
from orchestrator.keys import RECIPES, artifact_key, canonical_json
from orchestrator.spec import presets

GOLDEN = Path(__file__).parents[1] / "golden" / "keys.json"
CLASSES = tuple(f"digit {word}" for word in ("zero", "one", "two"))
TINY = {name: Ref(name="tiny", digest=f"{name} digest") for name in presets.OUTSIDE}
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
    return from_flat(
        {**flat, **{k.replace("__", "."): v for k, v in changes.items()}}, refs, CLASSES
    )


def stages(spec: TrialSpec) -> dict[str, Any]:
    """Every spec that a trial nests, by stage."""
    found: dict[str, Any] = {"trials": spec, "features": spec.features}
    if spec.synthetic_features is not None:
        found |= {"synthetic": spec.synthetic_features, "images": spec.images}
    if spec.lora_adapter is not None:
        found |= {"lora": spec.lora_adapter, "labels": spec.lora_adapter.labels}
    return found


def digests(spec: TrialSpec) -> dict[str, str]:
    return {stage: artifact_key(one).digest for stage, one in stages(spec).items()}


# ---------------------------------------------------------------- golden

PUBLISHED = {
    **{f"{method}, tiny": trial(method) for method in presets.METHODS},
    **{f"{method}, large": trial(method, LARGE) for method in presets.METHODS},
    "air, tiny, one LoRA round": trial(lora__rounds=1),
    "air, tiny, no LoRA": trial(lora=None),
    "air, tiny, ready images": trial(refs=FOLDER),
    "air, tiny, both sources": trial(auxiliary__source="both", auxiliary__refresh=True),
    "air, tiny, seed 2 of split 1": trial(seed=2, split_seed=1),
    "air, large, 50 images": trial(refs=LARGE, images_per_class=50),
}


def test_keys_of_published_specs_equal_the_golden_ones():
    """Whoever changes one of these throws away what others have computed. If the results
    themselves changed, raise a recipe; a new setting carries `absent_means`."""
    found = {
        name: {
            stage: "{0.stage}/v{0.recipe}/{0.digest}".format(artifact_key(one))
            for stage, one in stages(spec).items()
        }
        for name, spec in PUBLISHED.items()
    }
    if os.environ.get("AIRSWEEP_UPDATE_GOLDEN") == "1":
        GOLDEN.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    assert found == json.loads(GOLDEN.read_text())


# ---------------------------------------------------------------- what is in a key


@pytest.mark.parametrize("name", ["dataset", "backbone", "generator"])
def test_the_name_of_a_thing_outside_never_matters_its_content_does(name):
    spec = trial()
    renamed = replace(spec, **{name: Ref(name="elsewhere", digest=TINY[name].digest)})
    changed = replace(spec, **{name: Ref(name=TINY[name].name, digest="other")})
    assert digests(renamed) == digests(spec)
    assert digests(changed)["trials"] != digests(spec)["trials"]


def test_a_key_says_stage_recipe_and_a_few_words():
    key = artifact_key(trial(seed=3))
    assert str(key) == f"trials/v2/tiny-ul-text-s3-{key.digest[:12]}"
    assert len(key.digest) == 40


def test_words_of_a_key_are_safe_as_a_folder_name():
    row = artifact_key(FolderImages(model=Ref(name="folder:/a b/../c", digest="x"), **ROW))
    assert row.slug == "folder-a-b-c"
    long = artifact_key(FolderImages(model=Ref(name="folder:" + "x" * 200, digest="x"), **ROW))
    assert len(long.slug) <= 60
    assert long.digest == row.digest


ROW: dict[str, Any] = {"classnames": CLASSES, "size": 32, "block": 8}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_has_no_place_in_a_key(value):
    with pytest.raises(ValueError, match="no place in a key"):
        artifact_key(trial(train__learning_rate=value))


@pytest.mark.parametrize("value", [Path("x"), b"x", {1: "x"}, {"x"}, object()])
def test_a_key_is_made_of_plain_data_only(value):
    with pytest.raises(TypeError):
        canonical_json({"value": value})


NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
PLAIN = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(PLAIN)
def test_canonical_json_keeps_the_value_and_nothing_of_its_order(value):
    assert json.loads(canonical_json(value)) == value
    assert canonical_json(backwards(value)) == canonical_json(value)


def backwards(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: backwards(value[name]) for name in reversed(value)}
    return [backwards(item) for item in value] if isinstance(value, list) else value


# ---------------------------------------------------------------- what a setting moves

STAGES = ("features", "labels", "lora", "images", "synthetic", "trials")
# The first stage that a setting moves; those after it follow. Everything else is the trial's own.
MOVES = {
    "features": ("precision",),
    "labels": (
        *("paradigm", "shots", "split_seed", "class_seed", "pool", "leaky_pool"),
        *("pool_size", "pool_ratio", "pool_missing", "initial_labels.k", "lora.source"),
    ),
    "lora": (
        *("lora.rank", "lora.steps", "lora.batch", "lora.learning_rate", "lora.caption"),
        *("lora.precision", "generation.size"),  # it is trained at the size that is drawn
    ),
    "images": (
        *("lora.scale", "generation.seed", "generation.template", "generation.guidance_scale"),
        *("generation.num_inference_steps", "generation.block", "generation.precision"),
    ),
}
FIRST = {name: stage for stage, names in MOVES.items() for name in names}
WHERE: dict[str, dict[str, Any]] = {  # where a setting counts at all
    "shots": {"paradigm": "ssl"},
    "lora__source": {"paradigm": "ssl"},
    "class_seed": {"paradigm": "trzsl"},
}
# With one kind alone; or only with a second LoRA round, as one of whose labels it counts.
ALONE = ("initial_labels.kind", "initial_labels.images_per_class", "lora.rounds")


def another(name: str, now: Any) -> Any:
    kind = trial_keys()[name].type
    if typing.get_origin(kind) is typing.Literal:
        return next(word for word in typing.get_args(kind) if word != now)
    match now:
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
    "name", [n for n in trial_keys() if n not in (*presets.OUTSIDE, "test_dataset", "lora", *ALONE)]
)
def test_a_setting_moves_the_stages_that_it_says_and_no_other(name):
    key = name.replace(".", "__")
    # bf16 is what the large world trains and draws in; the tiny one is in fp32.
    about = {"refs": LARGE, "lora__rounds": 1, **WHERE.get(key, {})}
    base = trial(**about)
    changed = trial(**about, **{key: another(name, to_flat(base)[name])})
    one, other = digests(base), digests(changed)
    moved = {stage for stage in one if one[stage] != other.get(stage)}
    if name in FIRST:
        assert moved == set(STAGES[STAGES.index(FIRST[name]) :])
    elif name == "auxiliary.source":  # without synthetic images nothing is left of their stages
        assert "features" not in moved
    else:
        assert moved <= {"trials"}


# ---------------------------------------------------------------- recipes


@pytest.fixture
def recipes(monkeypatch) -> Iterator[Any]:
    """Raise a stage's recipe number as a code change would."""

    def raise_recipe(stage: type) -> None:
        name, number = RECIPES[stage]
        monkeypatch.setitem(RECIPES, stage, (name, number + 1))
        keys._key.cache_clear()

    yield raise_recipe
    monkeypatch.undo()
    keys._key.cache_clear()


@pytest.mark.parametrize(
    ("stage", "below"),
    [
        (FeaturesSpec, {"features", "labels", "lora", "images", "synthetic", "trials"}),
        (LabelsSpec, {"labels", "lora", "images", "synthetic", "trials"}),
        (LoraSpec, {"lora", "images", "synthetic", "trials"}),
        (GeneratedImages, {"images", "synthetic", "trials"}),
        (SyntheticFeaturesSpec, {"synthetic", "trials"}),
        (TrialSpec, {"trials"}),
        (FolderImages, set()),
    ],
)
def test_another_recipe_moves_its_stage_and_those_below_and_no_other(recipes, stage, below):
    before = digests(trial(lora__rounds=1))
    recipes(stage)
    after = digests(trial(lora__rounds=1))
    assert {name for name in before if before[name] != after[name]} == below


def test_with_two_lora_rounds_a_recipe_of_the_images_moves_the_labels_of_the_second(recipes):
    before = digests(trial(lora__rounds=2))
    recipes(SyntheticFeaturesSpec)
    after = digests(trial(lora__rounds=2))
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"labels", "lora", "images", "synthetic", "trials"}


def test_a_trial_without_images_does_not_follow_the_recipes_of_images(recipes):
    before = digests(trial("cpl"))
    for stage in (LabelsSpec, LoraSpec, GeneratedImages, FolderImages, SyntheticFeaturesSpec):
        recipes(stage)
    assert digests(trial("cpl")) == before


# ---------------------------------------------------------------- settings that came later


@dataclass(frozen=True, kw_only=True)
class LaterAuxiliary(AuxiliarySettings):
    shrinkage: float = field(default=0.2, metadata={"absent_means": 0.2})


def test_a_new_setting_inside_a_trial_keeps_old_keys_too():
    spec = trial()
    settings = {name: getattr(spec.auxiliary, name) for name in vars(spec.auxiliary)}
    same = replace(spec, auxiliary=LaterAuxiliary(**settings))
    other = replace(spec, auxiliary=LaterAuxiliary(**settings, shrinkage=0.5))
    assert digests(same) == digests(spec)
    assert digests(other)["trials"] != digests(spec)["trials"]

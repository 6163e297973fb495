"""Identity: stage + recipe number + hash of the resolved, normalised spec.

A spec has the version of code that no recipe number covers: see `code_version`.

Where something runs, on what and on how many machines is never in a key.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from air_core.normal import normalised
from air_core.specs import (
    FeaturesSpec,
    FolderImages,
    GeneratedImages,
    LabelsSpec,
    LoraSpec,
    Ref,
    SyntheticFeaturesSpec,
    TrialSpec,
)

# Raise a number when the stage's code gives another result for the same spec, and run
# `make golden`. Later stages follow by themselves, since their keys hold this one.
RECIPES: dict[type, tuple[str, int]] = {
    FeaturesSpec: ("features", 1),
    LabelsSpec: ("labels", 1),
    LoraSpec: ("lora", 1),
    GeneratedImages: ("images", 1),
    FolderImages: ("images", 1),
    SyntheticFeaturesSpec: ("synthetic", 1),
    TrialSpec: ("trials", 2),
}

STAGES = tuple(dict.fromkeys(stage for stage, _ in RECIPES.values()))

Stage = (
    FeaturesSpec
    | LabelsSpec
    | LoraSpec
    | GeneratedImages
    | FolderImages
    | SyntheticFeaturesSpec
    | TrialSpec
)


@dataclass(frozen=True, order=True)
class ArtifactKey:
    """Where an artifact lies in the store."""

    stage: str
    recipe: int
    digest: str  # 40 hex digits
    slug: str  # for people

    def __str__(self) -> str:
        return f"{self.stage}/v{self.recipe}/{self.slug}-{self.digest[:12]}"


def artifact_key(spec: Stage) -> ArtifactKey:
    """The key of what a stage makes from this spec. A trial is normalised first."""
    if isinstance(spec, TrialSpec):
        spec = normalised(spec)
    return _key(spec)


@cache
def _key(spec: Stage) -> ArtifactKey:
    stage, recipe = RECIPES[type(spec)]
    return ArtifactKey(stage, recipe, digest(_identity(spec)), slug(spec))


def _identity(spec: Stage) -> Any:
    if not isinstance(spec, TrialSpec):
        return _plain(spec)
    # The inputs carry the recipe numbers of the stages above.
    inputs = [_plain(spec.features), _plain(spec.synthetic_features)]
    own = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec) if _counts(spec, f)}
    own.pop("classnames")  # follows from the dataset
    own.pop("code")
    if code := spec.code_of("trials"):
        own["code"] = code
    return {"recipe": f"trials/{RECIPES[TrialSpec][1]}", "inputs": inputs, **_plain(own)}


def _plain(value: Any) -> Any:
    """Dataclasses as dicts; nested stages carry their recipe; a Ref is its digest."""
    if isinstance(value, Ref):
        return value.digest
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        plain = {
            f.name: _plain(getattr(value, f.name))
            for f in dataclasses.fields(value)
            if _counts(value, f)
        }
        if type(value) in RECIPES:
            plain["recipe"] = "{}/{}".format(*RECIPES[type(value)])
        return plain
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _counts(owner: Any, f: dataclasses.Field[Any]) -> bool:
    """A field added later stays out of the key while it has the value that its absence meant."""
    return "absent_means" not in f.metadata or getattr(owner, f.name) != f.metadata["absent_means"]


def digest(value: Any) -> str:
    """40 hex digits of blake2b over canonical JSON."""
    return hashlib.blake2b(canonical_json(value).encode(), digest_size=20).hexdigest()


def canonical_json(value: Any) -> str:
    """One text for one value: sorted keys, no spaces, and 7.0 is 7.

    Raises:
        TypeError: anything but plain data.
        ValueError: NaN or infinity.

    >>> canonical_json({"b": 7.0, "a": [True, None, "x"]})
    '{"a":[true,null,"x"],"b":7}'
    """
    return json.dumps(
        _canonical(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )


def _canonical(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value} has no place in a key")
        return int(value) if value.is_integer() else value
    if isinstance(value, Mapping):
        if not all(isinstance(name, str) for name in value):
            raise TypeError("only text can name a field of a key")
        return {name: _canonical(item) for name, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [_canonical(item) for item in value]
    raise TypeError(f"a key is plain data, not {type(value).__name__}")


def slug(spec: Stage) -> str:
    """A few words for people, from the spec alone."""
    match spec:
        case FeaturesSpec():
            words = [spec.dataset.name, spec.backbone.name]
            words += ["tokens"] if spec.level == "tokens" else []
        case LabelsSpec():
            split = spec.split
            words = [spec.features.dataset.name, f"split{split.split_seed}"]
            words += [] if split.paradigm == "ul" else [split.paradigm]
            words += ["round2"] if spec.images else []
        case LoraSpec():
            words = [slug(spec.labels), f"r{spec.training.rank}"]
        case GeneratedImages():
            words = [spec.model.name, slug(spec.lora) if spec.lora else "base"]
        case FolderImages():
            words = [spec.model.name]
        case SyntheticFeaturesSpec():
            words = [slug(spec.images), spec.backbone.name]
            words += ["tokens"] if spec.level == "tokens" else []
        case TrialSpec():
            words = [spec.dataset.name, spec.paradigm, spec.modality, f"s{spec.seed}"]
            words += ["on", spec.test_dataset.name] if spec.test_dataset else []
    return re.sub(r"[^A-Za-z0-9]+", "-", "-".join(words)).strip("-")[:60]

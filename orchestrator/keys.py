"""Keys of artifacts: stage, recipe number and hash of the resolved, normalised spec.

A spec contains a code version if its code is not that of its recipe; see `store.code_version`.
A key never depends on the machines: their number, their hardware and their names.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from air_core.specs import Ref, StageSpec, TrialSpec
from air_core.specs.normal import normalised, used_components


@dataclass(frozen=True, order=True)
class ArtifactKey:
    """The address of an artifact in the store."""

    stage: str
    recipe: int
    digest: str  # 40 hex digits
    slug: str  # a short description; not part of the identity

    def __str__(self) -> str:
        return f"{self.stage}/v{self.recipe}/{self.slug}-{self.digest[:12]}"


def artifact_key(spec: StageSpec) -> ArtifactKey:
    """The key of the artifact that a stage makes from this spec; a trial is normalised first."""
    if isinstance(spec, TrialSpec):
        spec = normalised(spec)
    return _key(spec)


@cache
def _key(spec: StageSpec) -> ArtifactKey:
    return ArtifactKey(spec.stage, spec.recipe, digest(_identity(spec)), spec.slug)


def _code(spec: StageSpec) -> str:
    """The code version in a key; empty if it is that of the recipe."""
    if isinstance(spec, TrialSpec):
        return spec.code_of(*_parts(spec))
    return getattr(spec, "code", "")


def _parts(spec: TrialSpec) -> list[str]:
    """The parts of the code that compute a trial."""
    return ["trials", *(registry.part(name) for registry, name in used_components(spec))]


def _identity(spec: StageSpec) -> Any:
    if not isinstance(spec, TrialSpec):
        return plain(spec)
    # The inputs contain the recipe numbers of earlier stages.
    read = [needed.spec for needed in spec.inputs(())]
    added = [each for each in read if each.stage not in ("features", "synthetic")]
    stages = [spec.features, spec.synthetic_features, *sorted(added, key=lambda each: each.stage)]
    inputs = [plain(stage) for stage in stages]
    settings = _settings(spec)
    settings.pop("classnames")  # the dataset determines them
    settings.pop("scored_images")
    settings["code"] = _code(spec)
    return {"recipe": f"{spec.stage}/{spec.recipe}", "inputs": inputs, **plain(settings)}


SCALARS = (bool, int, str, type(None))  # JSON has them as they are


def plain(value: Any) -> Any:
    """Dataclasses as dicts; nested stages with their recipe; a Ref as its digest."""
    if isinstance(value, SCALARS):
        return value
    if isinstance(value, Ref):
        return value.digest
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        found = {name: plain(setting) for name, setting in _settings(value).items()}
        if isinstance(value, StageSpec):
            found |= {"recipe": f"{value.stage}/{value.recipe}", "code": _code(value)}
        return found
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def _settings(owner: Any) -> dict[str, Any]:
    """The fields of a dataclass that are part of the key, with their values."""
    kind: type = type(owner)
    return {name: getattr(owner, name) for name in _fields(kind)}


@cache
def _fields(owner: type) -> tuple[str, ...]:
    """The fields of a dataclass that equality compares."""
    return tuple(f.name for f in dataclasses.fields(owner) if f.compare)


def digest(value: Any) -> str:
    """40 hex digits of blake2b over canonical JSON."""
    return hashlib.blake2b(canonical_json(value).encode(), digest_size=20).hexdigest()


def canonical_json(value: Any) -> str:
    """JSON text that is equal for equal values: sorted keys, no spaces, 7.0 written as 7.

    Raises:
        TypeError: the value contains other types than plain data.
        ValueError: the value contains NaN or infinity.

    >>> canonical_json({"b": 7.0, "a": [True, None, "x"]})
    '{"a":[true,null,"x"],"b":7}'
    """
    return json.dumps(
        _canonical(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )


def _canonical(value: Any) -> Any:
    if isinstance(value, SCALARS):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"a key cannot contain {value}; allowed: finite numbers")
        return int(value) if value.is_integer() else value
    if isinstance(value, Mapping):
        if not all(isinstance(name, str) for name in value):
            raise TypeError("the name of a field in a key must be text")
        return {name: _canonical(item) for name, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [_canonical(item) for item in value]
    raise TypeError(f"a key cannot contain {type(value).__name__}; allowed: plain data")

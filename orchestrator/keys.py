"""Keys of artifacts: stage, recipe number and hash of the resolved, normalised spec.

A spec contains a code version if no recipe number covers its code; see `store.code_version`.
A key never depends on the machines: their number, their hardware and their names.
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
    return ArtifactKey(spec.stage, _recipe(spec)[0], digest(_identity(spec)), spec.slug)


def _recipe(spec: StageSpec) -> tuple[int, str]:
    """Recipe number and code version. A code version that begins with `v<number>` is that of an
    earlier run, see `store.code_version.recorded_versions`."""
    code: str = (
        spec.code_of(*_parts(spec)) if isinstance(spec, TrialSpec) else getattr(spec, "code", "")
    )
    first, _, others = code.partition("+")
    earlier = re.fullmatch(r"v(\d+)", first)
    return (int(earlier[1]), others) if earlier else (spec.recipe, code)


def _parts(spec: TrialSpec) -> list[str]:
    """The parts of the code that compute a trial."""
    return ["trials", *(registry.part(name) for registry, name in used_components(spec))]


def _identity(spec: StageSpec) -> Any:
    if not isinstance(spec, TrialSpec):
        return plain(spec)
    # The inputs contain the recipe numbers of earlier stages.
    read = [needed.spec for needed in spec.inputs((), 0)]
    added = [each for each in read if each.stage not in ("features", "synthetic")]
    stages = [spec.features, spec.synthetic_features, *sorted(added, key=lambda each: each.stage)]
    inputs = [plain(stage) for stage in stages]
    settings = _settings(spec)
    settings.pop("classnames")  # the dataset determines them
    settings.pop("scored_images")
    settings.pop("pool_images")
    recipe, settings["code"] = _recipe(spec)
    if not settings["code"]:
        settings.pop("code")
    return {"recipe": f"{spec.stage}/{recipe}", "inputs": inputs, **plain(settings)}


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
            recipe, code = _recipe(value)
            found.pop("code", None)
            found |= {"recipe": f"{value.stage}/{recipe}"} | ({"code": code} if code else {})
        return found
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def _settings(owner: Any) -> dict[str, Any]:
    """The fields of a dataclass that are part of the key, with their values.

    A field with `absent_means` was added later; with that value the key equals the older key.
    """
    kind: type = type(owner)
    settings = ((name, getattr(owner, name), absent) for name, absent in _fields(kind))
    return {name: value for name, value, absent in settings if value != absent}


@cache
def _fields(owner: type) -> tuple[tuple[str, Any], ...]:
    """The fields of a dataclass that equality compares, each with its `absent_means`."""
    compared = (f for f in dataclasses.fields(owner) if f.compare)
    return tuple((f.name, f.metadata.get("absent_means", dataclasses.MISSING)) for f in compared)


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

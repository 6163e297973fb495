"""External inputs of a trial (datasets and weights), by name and digest."""

from __future__ import annotations

import json
from typing import Any

from air_core.specs import Ref, TrialSpec
from air_core.specs.flat import to_flat
from air_core.specs.normal import normalised

REFS = ("dataset", "test_dataset", "backbone", "generator")


def refs_of(spec: TrialSpec) -> dict[str, Ref]:
    """Select the external inputs that a trial reads, by setting."""
    refs = {name: getattr(spec, name) for name in REFS}
    return {name: ref for name, ref in refs.items() if ref is not None and ref.digest}


def spec_json(spec: TrialSpec, key: str) -> str:
    """Write a trial as JSON: every setting as computed, and the digest of every input.

    `orchestrator.tracking.lookup` reads this JSON.
    """
    spec = normalised(spec)
    resolved: dict[str, Any] = to_flat(spec)
    for name in REFS:
        ref = getattr(spec, name)
        if ref is not None:
            resolved[f"{name}.digest"] = ref.digest
    return json.dumps({"key": key, **resolved}, indent=1, sort_keys=True)

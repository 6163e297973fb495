"""What a trial reads from outside, by name and digest."""

from __future__ import annotations

import json
from typing import Any

from air_core.flat import to_flat
from air_core.normal import normalised
from air_core.specs import Ref, TrialSpec

REFS = ("dataset", "test_dataset", "backbone", "generator")


def refs_of(spec: TrialSpec) -> dict[str, Ref]:
    """The outside things that a trial reads, by their setting."""
    found = {name: getattr(spec, name) for name in REFS}
    return {name: ref for name, ref in found.items() if ref is not None and ref.digest}


def spec_json(spec: TrialSpec, key: str) -> str:
    """The trial as it was computed: every setting, and the digests behind the names.

    `orchestrator.tracking.lookup` reads it back.
    """
    spec = normalised(spec)
    resolved: dict[str, Any] = to_flat(spec)
    for name in REFS:
        ref = getattr(spec, name)
        if ref is not None:
            resolved[f"{name}.digest"] = ref.digest
    return json.dumps({"key": key, **resolved}, indent=1, sort_keys=True)

"""Was what is there made by the code that is here? Nothing is served that another code has made,
unless somebody said that both give the same.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from orchestrator.keys import Stage, artifact_key
from orchestrator.reached import Code, code_of
from orchestrator.store import ArtifactStore, maker
from orchestrator.verification import DamagedArtifact

ACCEPTED = "accepted_code.jsonl"  # in the store: it is the artifacts that are taken as they are


@dataclass(frozen=True)
class Stale:
    """Artifacts of one stage that another code has made."""

    stage: str
    artifacts: int
    changed: tuple[str, ...]  # file: name
    codes: tuple[tuple[str, str], ...]  # then and now

    def __str__(self) -> str:
        more = f" and {len(self.changed) - 4} more" if len(self.changed) > 4 else ""
        return (
            f"{self.stage}: code changed since {self.artifacts} "
            f"{'was' if self.artifacts == 1 else 'were'} made ({', '.join(self.changed[:4])}{more})"
        )


def remedy(stale: Iterable[Stale]) -> str:
    """What to do about it."""
    stages = [one.stage for one in stale]
    accept = " ".join(f"--accept-code {stage}" for stage in stages)
    return (
        f"if results may differ, raise the number of {', '.join(stages)} in RECIPES "
        f"(orchestrator/keys.py); if they are the same, give {accept}"
    )


def stale(specs: Iterable[Stage], store: ArtifactStore) -> tuple[Stale, ...]:
    """What of these artifacts and rows is there, but made by other code; stage after stage."""
    specs = list(specs)
    store.glance(specs)
    accepted = _accepted(store)
    found: dict[str, dict[str, tuple[str, Code]]] = {}
    for spec in specs:
        key = artifact_key(spec)
        try:
            before = store.code(spec)
        except DamagedArtifact:  # whatever reads it refuses it, and a run makes it again
            continue
        if before is None:  # it is not there, or is older than this record
            continue
        now = code_of(spec)
        if before != now.digest and (key.stage, before, now.digest) not in accepted:
            found.setdefault(key.stage, {})[key.digest] = (before, now)
    return tuple(_stale(stage, list(of.values()), store) for stage, of in found.items())


def _stale(stage: str, of: list[tuple[str, Code]], store: ArtifactStore) -> Stale:
    pairs = {(before, now.digest): now for before, now in of}
    changed = {
        name for (before, _), now in pairs.items() for name in now.changed(store.code_parts(before))
    }
    return Stale(stage, len(of), tuple(sorted(changed)), tuple(sorted(pairs)))


def accept(stale: Iterable[Stale], sweep: str, store: ArtifactStore) -> None:
    """Take them as they are, from now on."""
    path = store.refresh(store.root / ACCEPTED)
    said = path.read_text() if path.exists() else ""
    for one in stale:
        for before, now in one.codes:
            entry: dict[str, Any] = {
                "stage": one.stage,
                "before": before,
                "now": now,
                "changed": list(one.changed),
                "sweep": sweep,
                "time": round(time.time()),
                "user": maker()["user"],
            }
            said += json.dumps(entry, sort_keys=True) + "\n"
    store.write(path, said)


def said_of_code(entry: Any) -> bool:
    """Does it say of what stage which code stands for which?"""
    return isinstance(entry, dict) and {"stage", "before", "now"} <= entry.keys()


def _accepted(store: ArtifactStore) -> set[tuple[str, str, str]]:
    path = store.refresh(store.root / ACCEPTED)
    if not path.exists():
        return set()
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    return {(entry["stage"], entry["before"], entry["now"]) for entry in entries}

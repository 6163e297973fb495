"""Where a sweep lives, who runs it, and how its last run ended."""

from __future__ import annotations

import getpass
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.ledger import Ledger
from orchestrator.resolve import Resolver
from orchestrator.store import ArtifactStore, open_store
from orchestrator.sweep import SweepSpec

# Exit codes.
DONE, FAILED, BAD_INPUT, REFUSED, BUDGET, GATE = range(6)
INTERRUPTED, TERMINATED = 130, 143


@dataclass(frozen=True)
class Place:
    """Where a sweep lives: the store, its folder in it, the datasets."""

    store: ArtifactStore
    project: str
    name: str
    data_root: Path | None

    @property
    def folder(self) -> Path:
        return self.store.root / "sweeps" / self.project / self.name

    def ledger(self) -> Ledger:
        return Ledger(self.folder)

    def resolver(self) -> Resolver:
        return Resolver(self.store.root / "digests.json", self.data_root)


class Refused(RuntimeError):
    """Refused before anything started; exit code 3."""


def place_of(sweep: SweepSpec, root: Path, data_root: Path | None) -> Place:
    """Where a sweep goes.

    Raises:
        Refused: a relative store inside a Ray job.
        StoreRefused: another version of airsweep made the store.
    """
    if os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") and not root.is_absolute():
        raise Refused(
            f"the store {str(root)!r} is relative, and this is a Ray job: its working directory "
            "is thrown away at the end; give --store or AIRSWEEP_STORE an absolute folder that "
            "every node sees"
        )
    project = sweep.project or os.environ.get("AIRSWEEP_PROJECT") or "default"
    data = data_root or os.environ.get("AIRSWEEP_DATA") or sweep.data_root
    return Place(open_store(root), project, sweep.name, Path(data) if data else None)


def read_outcome(place: Place) -> dict[str, Any]:
    """outcome.json of the last run; empty if there is none."""
    try:
        outcome: dict[str, Any] = json.loads((place.folder / "outcome.json").read_text())
    except FileNotFoundError:
        return {}
    return outcome


def whoami() -> str:
    """Who runs this, for tags."""
    try:
        return os.environ.get("AIRSWEEP_USER") or getpass.getuser()
    except (KeyError, OSError):
        return "unknown"

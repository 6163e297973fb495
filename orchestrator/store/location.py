"""Where a sweep lives, who runs it, and how its last run ended."""

from __future__ import annotations

import getpass
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.store.artifacts import ArtifactStore
from orchestrator.store.event_log import Ledger, open_ledger
from orchestrator.store.verification import read_cache, read_sealed


@dataclass(frozen=True)
class Place:
    """Where a sweep lives: the store, its folder in it, the datasets.

    Args:
        recorded: results are read by the digests and class names that the last run recorded, and
            no image or weights need to be there.
    """

    store: ArtifactStore
    project: str
    name: str
    data_root: Path | None
    recorded: bool = False

    def __post_init__(self) -> None:
        for name in (self.project, self.name):
            if Path(name).name != name or name in ("", ".."):
                raise ValueError(
                    f"{name!r} is no name of a project or a sweep, but a way to another folder; "
                    "allowed: letters, digits, `.`, `_` and `-`, the first a letter or a digit"
                )

    @property
    def folder(self) -> Path:
        return self.store.root / "sweeps" / self.project / self.name

    def ledger(self) -> Ledger:
        return open_ledger(self.folder, self.store.backend)

    def refresh(self) -> Place:
        """Bring what a bucket says of the sweep to this machine."""
        self.ledger().refresh()
        self.store.backend.pull_folder(self.folder)
        return self

    def write(self, name: str, content: str | bytes) -> None:
        """A file of the sweep."""
        self.store.write(self.folder / name, content)


def place_named(store: ArtifactStore, project: str, name: str) -> Place:
    return Place(store, project, name, None).refresh()


def recorded_names(store: ArtifactStore) -> list[tuple[str, str]]:
    """Project and name of the sweeps of a store, sorted."""
    return store.backend.sweeps()


def recorded_places(store: ArtifactStore) -> list[Place]:
    """Where the sweeps of a store are, by name."""
    return [place_named(store, project, name) for project, name in recorded_names(store)]


RESOLVED = "resolved.json"


def read_resolved(place: Place) -> dict[str, Any]:
    """How a sweep was last run: its options, and the digests of its inputs.

    Raises:
        ValueError: the file is damaged.
        FileNotFoundError: the sweep was not run.
    """
    file = place.folder / RESOLVED
    try:
        return read_sealed(file)
    except ValueError as problem:
        raise ValueError(
            f"{file} is damaged: {problem}; `airsweep run` with the sweep file and its options "
            "writes it anew"
        ) from None


def read_outcome(place: Place) -> dict[str, Any]:
    """outcome.json of the last run; empty if there is none."""
    return read_cache(place.folder / "outcome.json", lambda outcome: outcome, {})


def whoami() -> str:
    """Who runs this, for tags."""
    try:
        return os.environ.get("AIRSWEEP_USER") or getpass.getuser()
    except (KeyError, OSError):
        return "unknown"

"""Where a sweep lives, who runs it, and how its last run ended."""

from __future__ import annotations

import getpass
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.store.artifacts import ArtifactStore
from orchestrator.store.event_log import EventLog, open_event_log
from orchestrator.store.verification import read_cache, read_sealed


@dataclass(frozen=True)
class SweepLocation:
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

    def event_log(self) -> EventLog:
        return open_event_log(self.folder, self.store.backend)

    def refresh(self) -> SweepLocation:
        """Bring what a bucket says of the sweep to this machine."""
        self.event_log().refresh()
        self.store.backend.pull_folder(self.folder)
        return self

    def write(self, name: str, content: str | bytes) -> None:
        """A file of the sweep."""
        self.store.write(self.folder / name, content)


def location_named(store: ArtifactStore, project: str, name: str) -> SweepLocation:
    return SweepLocation(store, project, name, None).refresh()


def recorded_names(store: ArtifactStore) -> list[tuple[str, str]]:
    """Project and name of the sweeps of a store, sorted."""
    return store.backend.sweeps()


def recorded_locations(store: ArtifactStore) -> list[SweepLocation]:
    """Where the sweeps of a store are, by name."""
    return [location_named(store, project, name) for project, name in recorded_names(store)]


RESOLVED = "resolved.json"


def read_resolved(location: SweepLocation) -> dict[str, Any]:
    """How a sweep was last run: its options, and the digests of its inputs.

    Raises:
        ValueError: the file is damaged.
        FileNotFoundError: the sweep was not run.
    """
    file = location.folder / RESOLVED
    try:
        return read_sealed(file)
    except ValueError as problem:
        raise ValueError(
            f"{file} is damaged: {problem}; `airsweep run` with the sweep file and its options "
            "writes it anew"
        ) from None


def read_outcome(location: SweepLocation) -> dict[str, Any]:
    """outcome.json of the last run; empty if there is none."""
    return read_cache(location.folder / "outcome.json", lambda outcome: outcome, {})


def whoami() -> str:
    """Who runs this, for tags."""
    try:
        return os.environ.get("AIRSWEEP_USER") or getpass.getuser()
    except (KeyError, OSError):
        return "unknown"

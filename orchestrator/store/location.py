"""Location of a sweep in a store, and the files that its last run left there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.store.artifacts import ArtifactStore
from orchestrator.store.event_log import EventLog
from orchestrator.store.storage import Bucket
from orchestrator.store.verification import read_cache, read_written


@dataclass(frozen=True)
class SweepLocation:
    """Store and folder of a sweep, and the root of its datasets."""

    store: ArtifactStore
    project: str
    name: str
    data_root: Path | None

    def __post_init__(self) -> None:
        for name in (self.project, self.name):
            if Path(name).name != name or name in ("", ".."):
                raise ValueError(
                    f"{name!r} is no valid name of a project or a sweep, because it leads to "
                    "another folder; allowed: letters, digits, `.`, `_` and `-`, starting with a "
                    "letter or a digit"
                )

    @property
    def full_name(self) -> str:
        """PROJECT/NAME."""
        return f"{self.project}/{self.name}"

    @property
    def folder(self) -> Path:
        return self.store.root / "sweeps" / self.project / self.name

    def event_log(self) -> EventLog:
        storage = self.store.storage
        return EventLog(self.folder, storage if isinstance(storage, Bucket) else None)

    def refresh(self) -> SweepLocation:
        """Download the event log and the files of the sweep from a bucket."""
        if isinstance(self.store.storage, Bucket):
            self.event_log().refresh()
            self.store.storage.refresh(self.folder)
        return self

    def write(self, name: str, content: str | bytes) -> None:
        """Write a file of the sweep, unless it has this content."""
        path, data = self.folder / name, content.encode() if isinstance(content, str) else content
        if not path.exists() or path.read_bytes() != data:
            self.store.storage.put(path, data)


def recorded_locations(store: ArtifactStore) -> list[SweepLocation]:
    """Locations of the sweeps of a store, sorted by name, with their files downloaded."""
    return [SweepLocation(store, *names, None).refresh() for names in store.sweeps()]


RESOLVED = "resolved.json"


def read_resolved(location: SweepLocation) -> dict[str, Any]:
    """resolved.json of the last run: its options, and the digests of its inputs; empty before the
    first one.

    Raises:
        ValueError: the file is damaged.
    """
    file = location.folder / RESOLVED
    try:
        file.stat()  # not `exists`, which is False if the folder of the store is a file
    except FileNotFoundError:
        return {}
    return read_written(file, dict)


def read_outcome(location: SweepLocation) -> dict[str, Any]:
    """outcome.json of the last run; empty if it does not exist."""
    return read_cache(location.folder / "outcome.json", lambda outcome: outcome, {})

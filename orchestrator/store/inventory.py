"""Inventory of a store: artifacts, rows, checkpoints, and leftovers of killed processes.

`take_inventory` reads names, sizes and records, but no arrays, so it is fast and imports no heavy
library. Paths are below the store's folder. In a bucket store they stand for the objects in the
bucket, not for the local copies.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from orchestrator.errors import BucketUnreachable, DamagedArtifact
from orchestrator.store.artifacts import DAMAGED, ROW, UNFINISHED, ArtifactStore
from orchestrator.store.backends import RECORD, stored_name
from orchestrator.store.buckets import Entry, run_concurrently
from orchestrator.store.verification import parse_record

SHARD = re.compile(r"(\d{4,})-(\d{5,})\.[a-z]+")  # a file of a row
UNKNOWN = "unknown"  # owner of a file without a recorded user


@dataclass(frozen=True)
class Holding:
    """An artifact with its record, or a row with its shards."""

    path: Path
    record: Mapping[str, Any]  # row.json of a row; empty if it cannot be read
    files: Mapping[str, int]  # bytes by name

    @property
    def stage(self) -> str:
        return self.path.parent.parent.name

    @property
    def name(self) -> str:
        return "/".join(self.path.parts[-3:])

    @property
    def digest(self) -> str:
        """The first 12 hex digits of the key, by which the store finds it."""
        return self.path.name.rpartition("-")[2]

    @property
    def user(self) -> str:
        return str(self.record.get("user", UNKNOWN))

    def stored_name(self, name: str) -> str:
        """Name under which the store keeps a file of the record."""
        in_bucket = stored_name(name, str(self.record["files"][name]))
        return in_bucket if in_bucket in self.files else name

    @cached_property
    def bytes(self) -> int:
        return sum(self.files.values())

    @cached_property
    def shards(self) -> dict[tuple[int, int], str]:
        """File names of a row's shards by class and block; empty for other artifacts."""
        found = filter(None, map(SHARD.fullmatch, self.files))
        return {(int(shard[1]), int(shard[2])): shard[0] for shard in found}

    @property
    def images(self) -> int | None:
        """Number of images, including rejected ones; None: no images, or not known."""
        if not self.shards:
            found: int | None = self.record.get("info", {}).get("images")
            return found
        if self.stage == "evidence":
            return None
        spec = self.record.get("spec", {})
        spec = spec.get("images", spec)
        block: int | None = spec.get("block") or spec.get("settings", {}).get("block")
        return None if block is None else block * len(self.shards)


@dataclass(frozen=True)
class Leftover:
    """A file or folder that the store ignores: its writer was killed, or is still working."""

    path: Path
    reason: str
    bytes: int
    modified: float  # seconds since the epoch

    def json(self, root: Path) -> dict[str, Any]:
        path = str(self.path.relative_to(root))
        return {"path": path, "why": self.reason, "bytes": self.bytes}


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint of work that is not complete."""

    path: Path
    bytes: int

    @property
    def digest(self) -> str:
        """The first 12 hex digits of its artifact's key."""
        return self.path.stem.partition("-")[0]


@dataclass(frozen=True)
class Inventory:
    store: ArtifactStore
    holdings: tuple[Holding, ...]
    leftovers: tuple[Leftover, ...]
    checkpoints: tuple[StoredCheckpoint, ...]


def take_inventory(store: ArtifactStore) -> Inventory:
    """List the current content of a store.

    Raises:
        ValueError: the store does not exist or has no artifact yet.
    """
    folders: dict[str, dict[str, Entry]] = defaultdict(dict)
    for entry in store.backend.list_files("artifacts/*/*/*"):
        folder, _, name = entry.name.rpartition("/")
        folders[folder][name] = entry
    if not folders and not store.artifacts.is_dir():
        raise ValueError(
            f"{store.name} has no artifacts yet: run a sweep, or choose another store with --store"
        )
    record_names = {folder: ROW if ROW in files else RECORD for folder, files in folders.items()}
    records: dict[str, dict[str, Any]] = {}

    def read(folder: str) -> None:
        file = store.root / folder / record_names[folder]
        try:
            with store.backend.open(file) as handle:
                records[folder] = parse_record(handle.read(), file)
        except BucketUnreachable:
            raise
        except (OSError, DamagedArtifact):
            records[folder] = {}

    run_concurrently(read, [f for f, files in folders.items() if record_names[f] in files])
    holdings: list[Holding] = []
    leftovers: list[Leftover] = []
    for folder, files in sorted(folders.items()):
        path = store.root / folder
        sizes = {name: entry.size for name, entry in files.items() if name}
        holding = Holding(path, records.get(folder, {}), sizes)
        if path.name.startswith("."):
            leftovers.append(_leftover(path, _reason_hidden(path.name), files))
        elif record_names[folder] not in files and not holding.shards:
            leftovers.append(_leftover(path, "a folder without a record", files))
        else:
            holdings.append(holding)
            for name, why in _unrecorded_files(holding):
                leftovers.append(_leftover(path / name, why, {name: files[name]}))
    unfinished: list[StoredCheckpoint] = []
    for entry in store.backend.list_files(UNFINISHED):
        path = store.root / entry.name
        if path.name.startswith("."):
            leftovers.append(_leftover(path, _reason_hidden(path.name), {entry.name: entry}))
        elif not entry.name.endswith("/"):
            unfinished.append(StoredCheckpoint(path, entry.size))
    return Inventory(store, tuple(holdings), tuple(leftovers), tuple(unfinished))


def _leftover(path: Path, why: str, files: Mapping[str, Entry]) -> Leftover:
    entries = files.values()
    size = sum(entry.size for entry in entries)
    return Leftover(path, why, size, max(entry.modified for entry in entries))


def _unrecorded_files(holding: Holding) -> Iterator[tuple[str, str]]:
    """Files that the record does not list, each with the reason why it exists."""
    recorded = holding.record.get("files")
    if recorded is not None:
        recorded = {holding.stored_name(name) for name in recorded}
    for name in holding.files:
        if name.startswith("."):
            yield name, _reason_hidden(name)
        elif recorded is not None and name not in recorded and name != RECORD:
            yield name, "a file that the record does not list"


def _reason_hidden(name: str) -> str:
    return "it was damaged and set aside" if name.startswith(DAMAGED) else "it is incomplete"

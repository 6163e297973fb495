"""What lies in a store: artifacts, rows, unfinished work, and what killed processes left. Knows no
sweep.

Reads names, sizes and records, and opens no array; so it is quick and imports nothing heavy. Paths
are those of the store's folder; of a bucket, what lies there is looked at and not the copies here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from orchestrator.errors import DamagedArtifact, RemoteAway
from orchestrator.store.artifacts import DAMAGED, ROW, UNFINISHED, ArtifactStore
from orchestrator.store.backends import RECORD, stored_name
from orchestrator.store.buckets import Entry, side_by_side
from orchestrator.store.verification import parse_record

SHARDS = {"images": ".parquet", "synthetic": ".safetensors"}  # stages that are rows
UNKNOWN = "unknown"  # an owner that nobody wrote down


@dataclass(frozen=True)
class Holding:
    """An artifact with its record, or a row with its shards."""

    path: Path
    record: Mapping[str, Any]  # of a row its row.json; empty where it cannot be read
    files: Mapping[str, int]  # bytes by name

    @property
    def stage(self) -> str:
        return self.path.parent.parent.name

    @property
    def name(self) -> str:
        return "/".join(self.path.parts[-3:])

    @property
    def digest(self) -> str:
        """12 hex digits: by them the store finds it."""
        return self.path.name.rpartition("-")[2]

    @property
    def user(self) -> str:
        return str(self.record.get("user", UNKNOWN))

    def stored(self, name: str) -> str:
        """Where a file that the record names lies in the folder."""
        in_bucket = stored_name(name, str(self.record["files"][name]))
        return in_bucket if in_bucket in self.files else name

    @cached_property
    def bytes(self) -> int:
        return sum(self.files.values())

    @cached_property
    def shards(self) -> dict[tuple[int, int], str]:
        """File names by class and block; empty where it is no row."""
        suffix = SHARDS.get(self.stage)
        if suffix is None:
            return {}
        places = {name: name.removesuffix(suffix).split("-") for name in self.files}
        return {
            (int(place[0]), int(place[1])): name
            for name, place in places.items()
            if name.endswith(suffix) and len(place) == 2 and "".join(place).isdigit()
        }

    @property
    def images(self) -> int | None:
        """How many images it holds, holes among them; None: it holds none, or does not say."""
        if self.stage not in SHARDS:
            found: int | None = self.record.get("info", {}).get("images")
            return found
        spec = self.record.get("spec", {})
        spec = spec.get("images", spec)
        block: int | None = spec.get("block") or spec.get("settings", {}).get("block")
        return None if block is None else block * len(self.shards)


@dataclass(frozen=True)
class Leftover:
    """A file or folder that counts for nothing: its maker was killed, or is still at work."""

    path: Path
    why: str
    bytes: int
    changed: float  # seconds since the epoch


@dataclass(frozen=True)
class Unfinished:
    """What long work has so far, such as a training's checkpoint."""

    path: Path
    bytes: int

    @property
    def digest(self) -> str:
        """12 digits of its artifact's key."""
        return self.path.stem.partition("-")[0]


@dataclass(frozen=True)
class Inventory:
    store: ArtifactStore
    holdings: tuple[Holding, ...]
    leftovers: tuple[Leftover, ...]
    unfinished: tuple[Unfinished, ...]

    @property
    def name(self) -> str:
        return self.store.name

    @property
    def root(self) -> Path:
        return self.store.root


def take_inventory(store: ArtifactStore) -> Inventory:
    """All that lies in a store now.

    Raises:
        ValueError: there is no store.
    """
    folders: dict[str, dict[str, Entry]] = defaultdict(dict)
    for one in store.backend.listed("artifacts/*/*/*"):
        folder, _, name = one.name.rpartition("/")
        folders[folder][name] = one
    if not folders and not store.artifacts.is_dir():
        raise ValueError(
            f"nothing was made in {store.name} yet: run a sweep, or choose another with --store"
        )
    known = {folder: ROW if folder.split("/")[1] in SHARDS else RECORD for folder in folders}
    records: dict[str, dict[str, Any]] = {}

    def read(folder: str) -> None:
        file = store.root / folder / known[folder]
        try:
            with store.backend.open(file) as handle:
                records[folder] = parse_record(handle.read(), file)
        except RemoteAway:
            raise
        except (OSError, DamagedArtifact):  # `verify` says which
            records[folder] = {}

    side_by_side(read, [folder for folder, files in folders.items() if known[folder] in files])
    holdings: list[Holding] = []
    leftovers: list[Leftover] = []
    for folder, files in sorted(folders.items()):
        path = store.root / folder
        sizes = {name: entry.size for name, entry in files.items() if name}
        holding = Holding(path, records.get(folder, {}), sizes)
        if path.name.startswith("."):
            leftovers.append(_leftover(path, _why_hidden(path.name), files))
        elif known[folder] not in files and not holding.shards:
            leftovers.append(_leftover(path, "a folder without a record", files))
        else:
            holdings.append(holding)
            for name, why in _strays(holding):
                leftovers.append(_leftover(path / name, why, {name: files[name]}))
    unfinished: list[Unfinished] = []
    for one in store.backend.listed(UNFINISHED):
        path = store.root / one.name
        if path.name.startswith("."):
            leftovers.append(_leftover(path, _why_hidden(path.name), {one.name: one}))
        elif not one.name.endswith("/"):
            unfinished.append(Unfinished(path, one.size))
    return Inventory(store, tuple(holdings), tuple(leftovers), tuple(unfinished))


def _leftover(path: Path, why: str, files: Mapping[str, Entry]) -> Leftover:
    entries = files.values()
    size = sum(one.size for one in entries)
    return Leftover(path, why, size, max(one.changed for one in entries))


def _strays(holding: Holding) -> Iterator[tuple[str, str]]:
    recorded = holding.record.get("files")
    if recorded is not None:
        recorded = {holding.stored(name) for name in recorded}
    for name in holding.files:
        if name.startswith("."):
            yield name, _why_hidden(name)
        elif recorded is not None and name not in recorded and name != RECORD:
            yield name, "a file that the record does not know"


def _why_hidden(name: str) -> str:
    return "it was damaged and set aside" if name.startswith(DAMAGED) else "it is half made"

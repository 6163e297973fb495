"""What lies in a store: artifacts, rows, unfinished work, what made them of what code, and what
killed processes left. Knows no sweep.

Reads names, sizes and records, and opens no array; so it is quick and imports nothing heavy. What
lies in a bucket is looked at there, not in this machine's mirror; paths are those that it has or
would have in the mirror.
"""

from __future__ import annotations

import errno
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

from orchestrator.backends import RECORD, BucketBackend, stored_name
from orchestrator.remote import Entry, Remote, side_by_side
from orchestrator.store import DAMAGED, ROW, UNFINISHED, ArtifactStore
from orchestrator.verification import DamagedArtifact, parse_record, read_record

SHARDS = {"images": ".parquet", "synthetic": ".safetensors"}  # stages that are rows
ASIDE = "it was damaged and set aside"
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
    uid: int


@dataclass(frozen=True)
class Loose:
    """A training's checkpoint."""

    path: Path
    bytes: int
    uid: int

    @property
    def digest(self) -> str:
        """12 digits of its artifact's key."""
        return self.path.stem.partition("-")[0]


@dataclass(frozen=True)
class Inventory:
    root: Path
    holdings: tuple[Holding, ...]
    leftovers: tuple[Leftover, ...]
    unfinished: tuple[Loose, ...] = ()
    bucket: Remote | None = None

    @property
    def name(self) -> str:
        return str(self.bucket or self.root)

    def open(self, path: Path) -> BinaryIO:
        """
        Raises:
            OSError: it is not there, or cannot be read.
        """
        if self.bucket is None:
            return open(path, "rb")
        file = TemporaryFile()  # noqa: SIM115
        if not self.bucket.download(path.relative_to(self.root).as_posix(), file):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        file.seek(0)
        return file


def take_inventory(store: ArtifactStore) -> Inventory:
    """All that lies in a store now.

    Raises:
        ValueError: there is no store.
    """
    backend = store.backend
    if isinstance(backend, BucketBackend):
        found = _in_bucket(store, backend.remote)
    else:
        found = _in_folder(store)
    if found is None:
        raise ValueError(
            f"nothing was made in {store.name} yet: run a sweep, or choose another with --store"
        )
    return found


def _in_folder(store: ArtifactStore) -> Inventory | None:
    if not store.artifacts.is_dir():
        return None
    holdings: list[Holding] = []
    leftovers: list[Leftover] = []
    for path in sorted(store.artifacts.glob("*/*/*")):
        if not path.is_dir():
            continue
        if path.name.startswith("."):
            why = ASIDE if path.name.startswith(DAMAGED) else "a builder's folder"
            leftovers.append(_leftover(path, why))
            continue
        files = dict(_sizes(path))
        known = ROW if path.parent.parent.name in SHARDS else RECORD
        holding = Holding(path, _read(path / known), files)
        if known not in files and not holding.shards:
            leftovers.append(_leftover(path, "a folder without a record"))
            continue
        holdings.append(holding)
        leftovers += [_leftover(path / name, why) for name, why in _strays(holding)]
    unfinished: list[Loose] = []
    for path in sorted((store.root / UNFINISHED).glob("*")):
        if path.name.startswith("."):
            leftovers.append(_leftover(path, "half a file"))
        else:
            stat = path.lstat()
            unfinished.append(Loose(path, stat.st_size, stat.st_uid))
    return Inventory(
        store.root,
        tuple(holdings),
        tuple(leftovers),
        unfinished=tuple(unfinished),
    )


def _in_bucket(store: ArtifactStore, remote: Remote) -> Inventory | None:
    folders: dict[str, dict[str, Entry]] = defaultdict(dict)
    for one in remote.listed("artifacts"):
        folder, _, name = one.name.rpartition("/")
        folders[folder][name] = one
    known = {f: ROW if f.split("/")[0] in SHARDS else RECORD for f in folders}
    records: dict[str, Any] = {}

    def read(folder: str) -> None:
        data = remote.get(f"artifacts/{folder}/{known[folder]}") or b"{}"
        try:
            records[folder] = parse_record(data, store.artifacts / folder / known[folder])
        except DamagedArtifact:  # `verify` says which
            records[folder] = {}

    side_by_side(read, [folder for folder, files in folders.items() if known[folder] in files])
    holdings: list[Holding] = []
    leftovers: list[Leftover] = []
    for folder, files in sorted(folders.items()):
        path = store.artifacts / folder
        sizes = {name: entry.size for name, entry in files.items()}
        holding = Holding(path, records.get(folder, {}), sizes)
        whole = known[folder] in files or holding.shards
        strays = dict(_strays(holding)) if whole else dict.fromkeys(files, "it has no record")
        holdings += [holding] if whole else []
        leftovers += [
            Leftover(path / name, why, files[name].size, files[name].changed, -1)
            for name, why in strays.items()
        ]
    if not folders:
        return None
    return Inventory(store.root, tuple(holdings), tuple(leftovers), bucket=remote)


def _strays(holding: Holding) -> Iterator[tuple[str, str]]:
    recorded = holding.record.get("files")
    if recorded is not None:
        recorded = {holding.stored(name) for name in recorded}
    for name in holding.files:
        if name.startswith("."):
            yield name, ASIDE if name.startswith(DAMAGED) else "half a file"
        elif recorded is not None and name not in recorded and name != RECORD:
            yield name, "a file that the record does not know"


def _read(file: Path) -> dict[str, Any]:
    try:
        return read_record(file)
    except (OSError, DamagedArtifact):  # `verify` says which
        return {}


def _sizes(folder: Path) -> Iterator[tuple[str, int]]:
    try:
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda one: one.name):
                yield entry.name, entry.stat(follow_symlinks=False).st_size
    except FileNotFoundError:  # somebody renames a shard, or removes, at this moment
        return


def _leftover(path: Path, why: str) -> Leftover:
    stat = path.lstat()  # a link may lead nowhere, or to itself
    inside = [one.lstat() for one in path.rglob("*")] if path.is_dir() else []
    return Leftover(
        path,
        why,
        sum(one.st_size for one in inside) if inside else stat.st_size,
        max(one.st_mtime for one in (stat, *inside)),
        stat.st_uid,
    )


def size(count: float) -> str:
    """Bytes for people.

    >>> size(0), size(1536), size(3 * 2**30)
    ('0 B', '1.5 KiB', '3.0 GiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"

"""What lies in a store: artifacts, rows, unfinished work, what made them of what code, and what
killed processes left. Knows no sweep.

Reads names, sizes and records, and opens no array; so it is quick and imports nothing heavy.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from orchestrator.store import CODE, RECORD, ROW, UNFINISHED, ArtifactStore

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
    """A file outside the artifacts that counts: a training's checkpoint, or a code's parts."""

    path: Path
    bytes: int
    uid: int

    @property
    def digest(self) -> str:
        """Of a checkpoint 12 digits of its artifact's key, of parts that of their code."""
        return self.path.stem.partition("-")[0]


@dataclass(frozen=True)
class Inventory:
    root: Path
    holdings: tuple[Holding, ...]
    leftovers: tuple[Leftover, ...]
    unfinished: tuple[Loose, ...] = ()
    codes: tuple[Loose, ...] = ()


def take_inventory(store: ArtifactStore) -> Inventory:
    """All that lies in a store now.

    Raises:
        ValueError: there is no store.
    """
    if not store.artifacts.is_dir():
        raise ValueError(
            f"nothing was made in {store.root} yet: run a sweep, or choose another with --store"
        )
    holdings: list[Holding] = []
    leftovers: list[Leftover] = []
    for path in sorted(store.artifacts.glob("*/*/*")):
        if not path.is_dir():
            continue
        if path.name.startswith("."):
            leftovers.append(_leftover(path, "a builder's folder"))
            continue
        files = dict(_sizes(path))
        known = ROW if path.parent.parent.name in SHARDS else RECORD
        holding = Holding(path, _read(path / known), files)
        if known not in files and not holding.shards:
            leftovers.append(_leftover(path, "a folder without a record"))
            continue
        holdings.append(holding)
        leftovers += [_leftover(path / name, why) for name, why in _strays(holding)]
    found: dict[str, list[Loose]] = {UNFINISHED: [], CODE: []}
    for folder, loose in found.items():
        for path in sorted((store.root / folder).glob("*")):
            if path.name.startswith("."):
                leftovers.append(_leftover(path, "half a file"))
            else:
                stat = path.stat()
                loose.append(Loose(path, stat.st_size, stat.st_uid))
    return Inventory(
        store.root,
        tuple(holdings),
        tuple(leftovers),
        unfinished=tuple(found[UNFINISHED]),
        codes=tuple(found[CODE]),
    )


def _strays(holding: Holding) -> Iterator[tuple[str, str]]:
    recorded = holding.record.get("files")
    for name in holding.files:
        if name.startswith("."):
            yield name, "half a file"
        elif recorded is not None and name not in recorded and name != RECORD:
            yield name, "a file that the record does not know"


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except (FileNotFoundError, ValueError):  # `verify` says which
        return {}
    return found if isinstance(found, dict) else {}


def _sizes(folder: Path) -> Iterator[tuple[str, int]]:
    try:
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda one: one.name):
                yield entry.name, entry.stat(follow_symlinks=False).st_size
    except FileNotFoundError:  # somebody renames a shard, or removes, at this moment
        return


def _leftover(path: Path, why: str) -> Leftover:
    stat = path.stat()
    inside = [one.stat() for one in path.rglob("*")] if path.is_dir() else []
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

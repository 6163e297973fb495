"""What a store contains, and garbage collection: artifacts that no recorded sweep needs, and
leftovers of killed processes.

`contents` reads names, sizes and records, but no arrays, so it imports no heavy library. An
artifact or a row is kept or removed as a whole.
"""

from __future__ import annotations

import os
import shutil
import time
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.errors import DamagedArtifact
from orchestrator.store.artifacts import DAMAGED, ROW, UNFINISHED, ArtifactStore
from orchestrator.store.buckets import Entry, run_concurrently
from orchestrator.store.rows import SHARD
from orchestrator.store.storage import RECORD
from orchestrator.store.verification import read_record

UNKNOWN = "unknown"  # owner of a file without a recorded user
MIN_AGE = 24 * 3600.0  # seconds: a process on another machine may be writing younger files


@dataclass(frozen=True)
class StoreRequirements:
    """Artifacts and rows that the recorded sweeps need, by PROJECT/NAME of the sweep."""

    sweeps: Mapping[str, Collection[str]]  # the first 12 hex digits of the keys
    unreadable: Mapping[str, str]  # reason

    def sweeps_needing(self, digest: str) -> list[str]:
        """The sweeps that need an artifact or a row."""
        return [sweep for sweep, digests in self.sweeps.items() if digest in digests]


@dataclass(frozen=True)
class Item:
    """An artifact, a row, the checkpoint of unfinished work, or a leftover.

    The path is below the store's folder; in a bucket store it stands for the objects there.
    """

    path: Path
    bytes: int
    modified: float  # seconds since the epoch
    digest: str = ""  # first 12 hex digits of the key; empty: a leftover
    why: str = ""  # it is a leftover, or may be removed
    user: str = UNKNOWN
    images: int | None = None  # including rejected ones; None: no images, or not known


@dataclass(frozen=True)
class Contents:
    """What a store contains, sorted by path."""

    artifacts: Sequence[Item]  # and rows
    unfinished: Sequence[Item]
    leftovers: Sequence[Item]


def contents(store: ArtifactStore) -> Contents:
    """List what a store contains now.

    Raises:
        ValueError: the store does not exist or has no artifact yet.
    """
    folders: dict[Path, dict[str, Entry]] = defaultdict(dict)
    hidden: dict[Path, dict[str, Entry]] = defaultdict(dict)
    unfinished = []
    for top, depth in (("artifacts", 4), (UNFINISHED, 1)):
        for entry in store.storage.entries(store.root / top, depth):
            path = store.root / top / entry.name
            parts = (top, *entry.name.split("/"))
            dots = [n for n, part in enumerate(parts, 1) if part.startswith(".")]
            if dots:
                hidden[store.root.joinpath(*parts[: dots[0]])][entry.name] = entry
            elif top == UNFINISHED:
                digest = path.stem.partition("-")[0]
                unfinished.append(Item(path, entry.size, entry.modified, digest))
            elif len(parts) == 5:
                folders[store.root.joinpath(*parts[:4])][parts[4]] = entry
    if not folders and not store.artifacts.is_dir():
        raise ValueError(
            f"{store.name} has no artifacts yet: run a sweep, or choose another store with --store"
        )
    items: list[Item] = []
    run_concurrently(lambda path: items.append(_item(store, path, folders[path])), folders)
    for path, files in hidden.items():
        is_damaged = path.name.startswith(DAMAGED)
        why = "it was damaged and set aside" if is_damaged else "it is incomplete"
        items.append(_sized(path, files, why=why))
    items.sort(key=lambda item: item.path)
    artifacts, leftovers = ([i for i in items if bool(i.why) == left] for left in (False, True))
    return Contents(artifacts, sorted(unfinished, key=lambda item: item.path), leftovers)


def _item(store: ArtifactStore, path: Path, files: Mapping[str, Entry]) -> Item:
    """The artifact or row in a folder, or a leftover."""
    name = ROW if ROW in files else RECORD
    shards = sum(SHARD.fullmatch(file) is not None for file in files)
    if name not in files and not shards:
        return _sized(path, files, why="a folder without a record")
    try:
        record = read_record(store.storage.get(path / name) or b"", path / name)
    except DamagedArtifact:
        record = {}  # its owner is unknown
    images = record.get("info", {}).get("images")  # of a row, in a shard
    images = images and images * (shards or 1)
    digest, user = path.name.rpartition("-")[2], str(record.get("user", UNKNOWN))
    return _sized(path, files, digest=digest, user=user, images=images)


def _sized(path: Path, files: Mapping[str, Entry], **fields: Any) -> Item:
    size = sum(entry.size for entry in files.values())
    return Item(path, size, max(entry.modified for entry in files.values()), **fields)


# ---------------------------------------------------------------- removal


def removable(
    found: Contents, requirements: StoreRequirements, me: str, sweep: str | None = None
) -> list[Item]:
    """What no recorded sweep needs, and leftovers; or what one sweep alone needs.

    A row belongs to the user who created it, a file without a record to `me` if this process owns
    it.

    Args:
        sweep: PROJECT/NAME of the sweep.

    Raises:
        ValueError: the requirements of a sweep cannot be read.
    """
    for unreadable, why in requirements.unreadable.items():
        raise ValueError(
            f"the requirements of sweep {unreadable} cannot be read, so nothing is removed: {why}; "
            f"fix that, or remove the folder sweeps/{unreadable} of the store to give up the sweep"
        )
    if sweep:
        alone = (
            item for item in found.artifacts if requirements.sweeps_needing(item.digest) == [sweep]
        )
        return [replace(item, why=f"only {sweep} needs it") for item in alone]
    needless = "no sweep needs it"
    artifacts = [
        replace(item, why=needless)
        for item in found.artifacts
        if not requirements.sweeps_needing(item.digest)
    ]
    complete = {item.digest for item in found.artifacts}
    files = [item for item in found.leftovers if time.time() - item.modified > MIN_AGE]
    for item in found.unfinished:
        if item.digest in complete:
            files.append(replace(item, why="its artifact is complete"))
        elif not requirements.sweeps_needing(item.digest):
            files.append(replace(item, why=needless))
    uid = os.getuid()
    return artifacts + [replace(i, user=me) if i.path.lstat().st_uid == uid else i for i in files]


def remove(items: Sequence[Item]) -> None:
    """Remove artifacts and leftovers. A kill in between leaves no artifact that looks complete.

    Raises:
        OSError: one cannot be removed, for example because another user owns its folder.
    """
    for path in (item.path for item in items):
        if path.is_dir():
            (path / RECORD).unlink(missing_ok=True)  # first, so that the rest counts as missing
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

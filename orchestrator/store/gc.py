"""What a store contains, and garbage collection: artifacts that no recorded sweep needs, and
leftovers of killed processes.

`take_inventory` reads names, sizes and records, but no arrays, so it imports no heavy library. An
artifact or a row is kept or removed as a whole. If the requirements of one sweep cannot be read,
nothing is removed.
"""

from __future__ import annotations

import os
import shutil
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.errors import BucketUnreachable, DamagedArtifact
from orchestrator.store._locks import LOCKS, STORE_LOCK
from orchestrator.store.artifacts import DAMAGED, ROW, UNFINISHED, ArtifactStore
from orchestrator.store.buckets import Entry, run_concurrently
from orchestrator.store.rows import SHARD
from orchestrator.store.storage import RECORD
from orchestrator.store.verification import parse_record

UNKNOWN = "unknown"  # owner of a file without a recorded user
NOT_REMOVED = "could not be removed: it is a link, or in a folder of another user"
MIN_AGE = 24 * 3600.0  # seconds: a process on another machine may be writing younger files


@dataclass(frozen=True)
class Item:
    """An artifact, a row, the checkpoint of unfinished work, or a leftover.

    The path is below the store's folder; in a bucket store it stands for the objects there.
    """

    path: Path
    bytes: int
    modified: float  # seconds since the epoch
    digest: str = ""  # first 12 hex digits of the key; empty: a leftover
    user: str = UNKNOWN
    images: int | None = None  # including rejected ones; None: no images, or not known
    why: str = ""  # it is a leftover, or may be removed

    def json(self, root: Path) -> dict[str, Any]:
        return {"path": str(self.path.relative_to(root)), "why": self.why, "bytes": self.bytes}


@dataclass(frozen=True)
class Inventory:
    store: ArtifactStore
    artifacts: tuple[Item, ...]  # and rows
    unfinished: tuple[Item, ...]
    leftovers: tuple[Item, ...]


def take_inventory(store: ArtifactStore) -> Inventory:
    """List the current content of a store.

    Raises:
        ValueError: the store does not exist or has no artifact yet.
    """
    folders: dict[Path, dict[str, Entry]] = defaultdict(dict)
    leftovers: dict[Path, list[Entry]] = defaultdict(list)
    unfinished = []
    for top, depth in (("artifacts", 4), (UNFINISHED, 1)):
        for entry in store.storage.entries(store.root / top, depth):
            parts = [top, *entry.name.split("/")]
            hidden = [n for n, part in enumerate(parts) if part.startswith(".")]
            if hidden:
                leftovers[store.root.joinpath(*parts[: hidden[0] + 1])].append(entry)
            elif top == UNFINISHED:
                path = store.root / top / entry.name
                digest = path.stem.partition("-")[0]
                unfinished.append(Item(path, entry.size, entry.modified, digest))
            elif len(parts) == 5:
                folders[store.root.joinpath(*parts[:4])][parts[4]] = entry
    if not folders and not store.artifacts.is_dir():
        raise ValueError(
            f"{store.name} has no artifacts yet: run a sweep, or choose another store with --store"
        )
    found: list[Item] = []
    run_concurrently(lambda path: found.append(_item(store, path, folders[path])), folders)
    found += [_sized(path, files, why=_why_hidden(path)) for path, files in leftovers.items()]
    found.sort(key=lambda item: item.path)
    return Inventory(
        store,
        tuple(item for item in found if not item.why),
        tuple(sorted(unfinished, key=lambda item: item.path)),
        tuple(item for item in found if item.why),
    )


def _item(store: ArtifactStore, path: Path, files: Mapping[str, Entry]) -> Item:
    """The artifact or row in a folder, or a leftover."""
    name = ROW if ROW in files else RECORD
    shards = sum(SHARD.fullmatch(file) is not None for file in files)
    if name not in files and not shards:
        return _sized(path, files.values(), why="a folder without a record")
    record: dict[str, Any] = {}
    try:
        record = parse_record(store.storage.get(path / name) or b"", path / name)
    except BucketUnreachable:
        raise
    except (OSError, DamagedArtifact):  # its owner is unknown
        pass
    images = record.get("info", {}).get("images")
    if shards and path.parent.parent.name != "evidence":
        spec = record.get("spec", {})
        spec = spec.get("images", spec)
        block = spec.get("block") or spec.get("settings", {}).get("block")
        images = block and block * shards
    digest, user = path.name.rpartition("-")[2], str(record.get("user", UNKNOWN))
    return _sized(path, files.values(), digest=digest, user=user, images=images)


def _sized(path: Path, files: Collection[Entry], **fields: Any) -> Item:
    newest = max(entry.modified for entry in files)
    return Item(path, sum(entry.size for entry in files), newest, **fields)


def _why_hidden(path: Path) -> str:
    is_damaged = path.name.startswith(DAMAGED)
    return "it was damaged and set aside" if is_damaged else "it is incomplete"


# ---------------------------------------------------------------- removal


@dataclass(frozen=True)
class StoreRequirements:
    """Artifacts and rows that the recorded sweeps need, by PROJECT/NAME of the sweep."""

    sweeps: Mapping[str, Collection[str]]  # the first 12 hex digits of the keys
    unreadable: Mapping[str, str]  # reason

    def sweeps_needing(self, digest: str) -> list[str]:
        """The sweeps that need an artifact or a row."""
        return [sweep for sweep, digests in self.sweeps.items() if digest in digests]


@dataclass(frozen=True)
class GcPlan:
    """What to remove, and what could be removed but belongs to other users."""

    root: Path
    removals: tuple[Item, ...]
    others: tuple[Item, ...]
    sweep: str | None  # PROJECT/NAME: only artifacts that no other sweep needs

    @property
    def bytes(self) -> int:
        return sum(removal.bytes for removal in self.removals)

    def json(self, removed: bool) -> dict[str, Any]:
        return {
            "store": str(self.root),
            "removed": removed,
            "bytes": self.bytes,
            "removals": [item.json(self.root) | {"user": item.user} for item in self.removals],
            "others": [item.json(self.root) | {"user": item.user} for item in self.others],
        }


def plan_gc(
    inventory: Inventory,
    requirements: StoreRequirements,
    me: str,
    all_users: bool,
    sweep: str | None = None,
) -> GcPlan:
    """Find what no recorded sweep needs, and leftovers; or what one sweep alone needs.

    Args:
        me: remove only artifacts of this user, unless `all_users`. A row belongs to the user who
            created it.
        sweep: PROJECT/NAME of the sweep.

    Raises:
        ValueError: the requirements of a sweep cannot be read.
    """
    root = inventory.store.root
    for unreadable, why in requirements.unreadable.items():
        raise ValueError(
            f"the requirements of sweep {unreadable} cannot be read, so nothing is removed: {why}; "
            f"fix that, or remove {root / 'sweeps' / unreadable} to give up the sweep"
        )
    groups: dict[bool, list[Item]] = {True: [], False: []}
    for item in sorted(_removable(inventory, requirements, me, sweep), key=lambda i: -i.bytes):
        groups[all_users or item.user == me != UNKNOWN].append(item)
    return GcPlan(root, tuple(groups[True]), tuple(groups[False]), sweep)


def _removable(
    inventory: Inventory, requirements: StoreRequirements, me: str, sweep: str | None
) -> Iterator[Item]:
    why = f"only {sweep} needs it" if sweep else "no sweep needs it"
    for item in inventory.artifacts:
        if requirements.sweeps_needing(item.digest) == ([sweep] if sweep else []):
            yield replace(item, why=why)
    if sweep:
        return
    unrecorded = [item for item in inventory.leftovers if time.time() - item.modified > MIN_AGE]
    complete = {item.digest for item in inventory.artifacts}
    for item in inventory.unfinished:
        if item.digest in complete:
            unrecorded.append(replace(item, why="its artifact is complete"))
        elif not requirements.sweeps_needing(item.digest):
            unrecorded.append(replace(item, why=why))
    for item in unrecorded:  # has the owner of the file
        yield replace(item, user=me if item.path.lstat().st_uid == os.getuid() else UNKNOWN)


def remove(plan: GcPlan) -> GcPlan:
    """Remove what a plan lists. A kill in between leaves no artifact that looks complete.

    Returns:
        The plan as carried out: removals that failed, for example because another user owns the
        folder, are among `others`.
    """
    removed = [item for item in plan.removals if _remove(item.path)]
    # Locks of killed builders. The caller holds the store exclusively.
    for lock in (plan.root / LOCKS).iterdir():
        if lock != plan.root / STORE_LOCK and time.time() - lock.stat().st_mtime > MIN_AGE:
            with suppress(PermissionError):  # of another user
                lock.unlink()
    failed = [replace(item, why=NOT_REMOVED) for item in plan.removals if item not in removed]
    return replace(plan, removals=tuple(removed), others=(*plan.others, *failed))


def _remove(path: Path) -> bool:
    """Remove a file or folder; whether that succeeded."""
    if path.is_symlink():
        return False
    try:
        if path.is_dir():
            (path / RECORD).unlink(missing_ok=True)  # first, so that the rest counts as missing
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError:
        return False
    return True

"""Garbage collection: finds and removes artifacts that no recorded sweep needs, and leftovers of
killed processes.

If the requirements of one sweep cannot be read, nothing is removed.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.store._locks import STORE_LOCK
from orchestrator.store.backends import LOCKS, RECORD
from orchestrator.store.inventory import UNKNOWN, Inventory

NOT_REMOVED = "could not be removed: it is a link, or in a folder of another user"
MIN_AGE = 24 * 3600.0  # seconds: a process on another machine may be writing younger files


@dataclass(frozen=True)
class Removal:
    """A folder or file to remove, or some files of a folder that stays."""

    path: Path
    reason: str
    bytes: int
    user: str
    files: tuple[str, ...] = ()  # remove only these files of the folder; empty: remove everything


@dataclass(frozen=True)
class GcPlan:
    """What to remove, and what could be removed but belongs to other users."""

    root: Path
    removals: tuple[Removal, ...]
    others: tuple[Removal, ...]
    sweep: str | None  # PROJECT/NAME: only artifacts that no other sweep needs

    @property
    def bytes(self) -> int:
        return sum(removal.bytes for removal in self.removals)

    def json(self, removed: bool) -> dict[str, Any]:
        return {
            "store": str(self.root),
            "removed": removed,
            "bytes": self.bytes,
            "removals": [self._json(removal) for removal in self.removals],
            "others": [self._json(removal) for removal in self.others],
        }

    def _json(self, removal: Removal) -> dict[str, Any]:
        path = str(removal.path.relative_to(self.root))
        fields = {"path": path, "why": removal.reason, "bytes": removal.bytes, "user": removal.user}
        return fields | ({"files": list(removal.files)} if removal.files else {})


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
    removals = sorted(
        _removable(inventory, requirements, me, sweep), key=lambda removal: -removal.bytes
    )
    groups: dict[bool, list[Removal]] = {True: [], False: []}
    for removal in removals:
        groups[all_users or removal.user == me != UNKNOWN].append(removal)
    return GcPlan(root, tuple(groups[True]), tuple(groups[False]), sweep)


def _removable(
    inventory: Inventory, requirements: StoreRequirements, me: str, sweep: str | None
) -> Iterator[Removal]:
    own = requirements.sweeps.get(sweep or "", {})
    others = merge_shards(
        item
        for name, artifacts in requirements.sweeps.items()
        if name != sweep
        for item in artifacts.items()
    )
    why = f"only {sweep} needs it" if sweep else "no sweep needs it"
    for holding in inventory.holdings:
        if sweep and holding.digest not in own:
            continue
        if holding.digest not in others:
            yield Removal(holding.path, why, holding.bytes, holding.user)
            continue
        shards = own[holding.digest] if sweep else holding.shards.keys()
        unneeded = (shards & holding.shards.keys()) - others[holding.digest]
        names = tuple(holding.shards[shard] for shard in sorted(unneeded))
        if names:
            count = sum(holding.files[name] for name in names)
            yield Removal(holding.path, why, count, holding.user, names)
    if sweep:
        return
    complete = {holding.digest for holding in inventory.holdings}
    for checkpoint in inventory.checkpoints:
        if checkpoint.digest in complete or checkpoint.digest not in others:
            reason = "its artifact is complete" if checkpoint.digest in complete else why
            owner = _owner(checkpoint.path, me)
            yield Removal(checkpoint.path, reason, checkpoint.bytes, owner)
    for leftover in inventory.leftovers:
        if time.time() - leftover.modified > MIN_AGE:
            owner = _owner(leftover.path, me)
            yield Removal(leftover.path, leftover.reason, leftover.bytes, owner)


def _owner(path: Path, me: str) -> str:
    """The user of a file without a record: `me` if this process owns the file."""
    return me if path.lstat().st_uid == os.getuid() else UNKNOWN


def remove(plan: GcPlan) -> GcPlan:
    """Remove what a plan lists. A kill in between leaves no artifact that looks complete.

    Returns:
        The plan as carried out: removals that failed, for example because another user owns the
        folder, are among `others`.
    """
    groups: dict[bool, list[Removal]] = {True: [], False: []}
    for removal in plan.removals:
        groups[_remove_files(removal)].append(removal)
    now = time.time()
    # Locks of killed builders. The caller holds the store exclusively.
    for lock in (plan.root / LOCKS).iterdir():
        if lock != plan.root / STORE_LOCK and now - lock.stat().st_mtime > MIN_AGE:
            with suppress(PermissionError):  # of another user
                lock.unlink()
    others = (*plan.others, *(replace(removal, reason=NOT_REMOVED) for removal in groups[False]))
    return replace(plan, removals=tuple(groups[True]), others=others)


def _remove_files(removal: Removal) -> bool:
    """Remove files; whether that succeeded."""
    path = removal.path
    if path.is_symlink():
        return False
    try:
        if removal.files:
            for name in removal.files:
                (path / name).unlink(missing_ok=True)
        elif path.is_dir():
            (path / RECORD).unlink(missing_ok=True)  # first, so that the rest counts as missing
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError:
        return False
    return True


Shards = frozenset[tuple[int, int]]  # (class, block) of a row; empty for other artifacts


@dataclass(frozen=True)
class StoreRequirements:
    """Artifacts and shards that the recorded sweeps need, by PROJECT/NAME of the sweep."""

    sweeps: Mapping[str, Mapping[str, Shards]]  # by the first 12 hex digits of the artifact's key
    unreadable: Mapping[str, str]  # reason

    def sweeps_needing(self, digest: str) -> list[str]:
        """The sweeps that need an artifact or a row."""
        return [sweep for sweep, artifacts in self.sweeps.items() if digest in artifacts]


def merge_shards(requirements: Iterable[tuple[str, Shards]]) -> dict[str, Shards]:
    """Union of the shards of each artifact."""
    found: dict[str, Shards] = {}
    for digest, shards in requirements:
        found[digest] = found.get(digest, frozenset()) | shards
    return found

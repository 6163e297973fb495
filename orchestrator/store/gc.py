"""What can go from a store: what no recorded sweep needs, and what killed processes left.

Nothing is guessed: where one sweep's needs cannot be told, nothing is removed.
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

NOT_REMOVED = "could not be removed: it is a link, or in a folder of somebody else"
LEFT_FOR = 24 * 3600.0  # seconds: what is younger may have a maker on another machine


@dataclass(frozen=True)
class Removal:
    """A folder or file that can go, or some files of a folder that stays."""

    path: Path
    why: str
    bytes: int
    user: str
    files: tuple[str, ...] = ()  # only these of the folder; empty: all of it


@dataclass(frozen=True)
class GcPlan:
    """What can go, and what could but is somebody else's."""

    root: Path
    removals: tuple[Removal, ...]
    others: tuple[Removal, ...]
    sweep: str | None  # PROJECT/NAME: only what it alone needs

    @property
    def bytes(self) -> int:
        return sum(one.bytes for one in self.removals)

    def json(self, removed: bool) -> dict[str, Any]:
        return {
            "store": str(self.root),
            "removed": removed,
            "bytes": self.bytes,
            "removals": [self._plain(one) for one in self.removals],
            "others": [self._plain(one) for one in self.others],
        }

    def _plain(self, one: Removal) -> dict[str, Any]:
        path = str(one.path.relative_to(self.root))
        plain = {"path": path, "why": one.why, "bytes": one.bytes, "user": one.user}
        return plain | ({"files": list(one.files)} if one.files else {})


def plan_gc(
    inventory: Inventory,
    requirements: StoreRequirements,
    me: str,
    all_users: bool,
    sweep: str | None = None,
) -> GcPlan:
    """What can go: what no recorded sweep needs, and leftovers; or what one sweep alone needs.

    Args:
        me: only what this user made, unless `all_users`. A row belongs to the user who began it.
        sweep: PROJECT/NAME of that sweep.

    Raises:
        ValueError: what a sweep needs cannot be told.
    """
    for unread, why in requirements.unread.items():
        raise ValueError(
            f"what sweep {unread} needs cannot be told, so nothing is removed: {why}; mend that, "
            f"or remove {inventory.root / 'sweeps' / unread} to give the sweep up"
        )
    found = sorted(_removable(inventory, requirements, me, sweep), key=lambda one: -one.bytes)
    groups: dict[bool, list[Removal]] = {True: [], False: []}
    for one in found:
        groups[all_users or one.user == me != UNKNOWN].append(one)
    return GcPlan(inventory.root, tuple(groups[True]), tuple(groups[False]), sweep)


def _removable(
    inventory: Inventory, requirements: StoreRequirements, me: str, sweep: str | None
) -> Iterator[Removal]:
    rest = merged(
        p for one in requirements.asked if one.sweep != sweep for p in one.artifacts.items()
    )
    own = merged(
        p for one in requirements.asked if one.sweep == sweep for p in one.artifacts.items()
    )
    why = f"only {sweep} needs it" if sweep else "no sweep needs it"
    for holding in inventory.holdings:
        if sweep and holding.digest not in own:
            continue
        if holding.digest not in rest:
            yield Removal(holding.path, why, holding.bytes, holding.user)
            continue
        places = own[holding.digest] if sweep else holding.shards.keys()
        beyond = (places & holding.shards.keys()) - rest[holding.digest]
        names = tuple(holding.shards[place] for place in sorted(beyond))
        if names:
            count = sum(holding.files[name] for name in names)
            yield Removal(holding.path, why, count, holding.user, names)
    if sweep:
        return
    whole = {holding.digest for holding in inventory.holdings}
    for kept in inventory.unfinished:  # checkpoints that no run will go on from
        if kept.digest in whole:
            why = "of an artifact that is whole"
        if kept.digest in whole or kept.digest not in rest:
            yield Removal(kept.path, why, kept.bytes, _owner(kept.path, me))
    for left in inventory.leftovers:
        if time.time() - left.changed > LEFT_FOR:
            yield Removal(left.path, left.why, left.bytes, _owner(left.path, me))


def _owner(path: Path, me: str) -> str:
    """Whose a file is of which nobody wrote that down: the file system knows."""
    return me if path.lstat().st_uid == os.getuid() else UNKNOWN


def remove(plan: GcPlan) -> GcPlan:
    """Remove what can go. A kill in between leaves nothing that looks whole and is not.

    Returns:
        What went; what could not be removed, of another user say, is among the others.
    """
    groups: dict[bool, list[Removal]] = {True: [], False: []}
    for one in plan.removals:
        groups[_removed(one)].append(one)
    now = time.time()
    for lock in (plan.root / LOCKS).iterdir():  # of killed builders; the caller is alone here
        if lock != plan.root / STORE_LOCK and now - lock.stat().st_mtime > LEFT_FOR:
            with suppress(PermissionError):  # somebody else's
                lock.unlink()
    others = (*plan.others, *(replace(one, why=NOT_REMOVED) for one in groups[False]))
    return replace(plan, removals=tuple(groups[True]), others=others)


def _removed(one: Removal) -> bool:
    if one.path.is_symlink():
        return False
    try:
        if one.files:
            for name in one.files:
                (one.path / name).unlink(missing_ok=True)
        elif one.path.is_dir():
            (one.path / RECORD).unlink(missing_ok=True)  # without it the rest is nothing
            shutil.rmtree(one.path)
        else:
            one.path.unlink(missing_ok=True)
    except OSError:
        return False
    return True


Shards = frozenset[tuple[int, int]]  # (class, block) of a row; of an artifact none


@dataclass(frozen=True)
class SweepRequirements:
    """What one recorded sweep needs: shards by the 12 hex digits that the store finds by."""

    sweep: str  # PROJECT/NAME
    artifacts: Mapping[str, Shards]


@dataclass(frozen=True)
class StoreRequirements:
    """What all recorded sweeps need, and of which that cannot be told."""

    asked: tuple[SweepRequirements, ...]
    unread: Mapping[str, str]  # why, by sweep

    def by(self, digest: str) -> tuple[str, ...]:
        """The sweeps that need an artifact or a row."""
        return tuple(one.sweep for one in self.asked if digest in one.artifacts)


def merged(parts: Iterable[tuple[str, Shards]]) -> dict[str, Shards]:
    """Shards of each row together."""
    found: dict[str, Shards] = {}
    for digest, shards in parts:
        found[digest] = found.get(digest, frozenset()) | shards
    return found

"""What can go from a store: what no recorded sweep needs, and what killed processes left.

Nothing is guessed: where one sweep's needs cannot be told, nothing is removed.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.backends import LOCKS, RECORD
from orchestrator.inventory import UNKNOWN, Holding, Inventory, Loose
from orchestrator.locks import STORE_LOCK
from orchestrator.recorded import Needs, Shards, merged

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
class Spoils:
    """What can go, and what could but is somebody else's."""

    root: Path
    removals: tuple[Removal, ...]
    others: tuple[Removal, ...]
    sweep: str | None = None  # PROJECT/NAME: only what it alone needs

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


def refuse_unread(needs: Needs, root: Path) -> None:
    """Nothing may be removed where a sweep's needs are not known.

    Raises:
        ValueError: says of which, and why.
    """
    for sweep, why in needs.unread.items():
        raise ValueError(
            f"what sweep {sweep} needs cannot be told, so nothing is removed: {why}; mend that, or "
            f"remove {root / 'sweeps' / sweep} to give the sweep up"
        )


def needless(
    inventory: Inventory,
    needs: Needs,
    me: str,
    all_users: bool,
) -> Spoils:
    """What no recorded sweep needs, and leftovers; of `me` alone, or of all users. A row of images
    belongs to the user who began it.
    """
    needed = merged(part for one in needs.asked for part in one.artifacts.items())
    found = [one for holding in inventory.holdings for one in _beyond(holding, needed)]
    found += _unfinished(inventory, needed, me)
    return _spoils(inventory.root, [*found, *_left(inventory, me)], me, all_users)


def needed_by_one(
    inventory: Inventory,
    needs: Needs,
    sweep: str,
    me: str,
    all_users: bool,
) -> Spoils:
    """What this recorded sweep needs and no other."""
    of = merged(p for one in needs.asked if one.sweep == sweep for p in one.artifacts.items())
    rest = merged(p for one in needs.asked if one.sweep != sweep for p in one.artifacts.items())
    found: list[Removal] = []
    for holding in inventory.holdings:
        digest = holding.digest
        if digest in of and digest not in rest:
            found.append(_whole(holding, f"only {sweep} needs it"))
        elif digest in of:
            found += _some(holding, of[digest] - rest[digest], f"only {sweep} needs these")
    return replace(_spoils(inventory.root, found, me, all_users), sweep=sweep)


def remove(spoils: Spoils) -> Spoils:
    """Remove what can go. A kill in between leaves nothing that looks whole and is not.

    Returns:
        What went; what could not be removed, of another user say, is among the others.
    """
    done: dict[bool, list[Removal]] = {True: [], False: []}
    for one in spoils.removals:
        done[_removed(one)].append(one)
    _remove_locks(spoils.root)
    others = (*spoils.others, *(replace(one, why=NOT_REMOVED) for one in done[False]))
    return replace(spoils, removals=tuple(done[True]), others=others)


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


def _remove_locks(root: Path) -> None:
    """Of builders that failed or were killed; nobody waits for them, since nobody else is here."""
    now = time.time()
    for lock in (root / LOCKS).iterdir():
        if lock != root / STORE_LOCK and now - lock.stat().st_mtime > LEFT_FOR:
            with suppress(PermissionError):  # somebody else's
                lock.unlink()


def _spoils(root: Path, found: Collection[Removal], me: str, all_users: bool) -> Spoils:
    groups: dict[bool, list[Removal]] = {True: [], False: []}
    for one in sorted(found, key=lambda one: -one.bytes):
        groups[all_users or (one.user == me and me != UNKNOWN)].append(one)
    return Spoils(root, tuple(groups[True]), tuple(groups[False]))


def _beyond(holding: Holding, needed: Mapping[str, Shards]) -> Iterator[Removal]:
    if holding.digest not in needed:
        yield _whole(holding, "no sweep needs it")
    else:
        beyond = frozenset(holding.shards) - needed[holding.digest]
        yield from _some(holding, beyond, "beyond what any sweep needs")


def _whole(holding: Holding, why: str) -> Removal:
    return Removal(holding.path, why, holding.bytes, holding.user)


def _some(holding: Holding, shards: Shards, why: str) -> Iterator[Removal]:
    names = tuple(holding.shards[place] for place in sorted(shards & holding.shards.keys()))
    if names:
        yield Removal(holding.path, why, sum(holding.files[n] for n in names), holding.user, names)


def _unfinished(inventory: Inventory, needed: Mapping[str, Shards], me: str) -> Iterator[Removal]:
    """Checkpoints that no run will go on from."""
    whole = {holding.digest for holding in inventory.holdings}
    for one in inventory.unfinished:
        if one.digest in whole:
            yield _loose(one, "of an artifact that is whole", me)
        elif one.digest not in needed:
            yield _loose(one, "no sweep needs what it would become", me)


def _left(inventory: Inventory, me: str) -> Iterator[Removal]:
    now = time.time()
    for one in inventory.leftovers:
        if now - one.changed > LEFT_FOR:
            yield Removal(one.path, one.why, one.bytes, _owner(one.uid, me))


def _loose(one: Loose, why: str, me: str) -> Removal:
    return Removal(one.path, why, one.bytes, _owner(one.uid, me))


def _owner(uid: int, me: str) -> str:
    """Whose a file is of which nobody wrote that down: the file system knows."""
    return me if uid == os.getuid() else UNKNOWN

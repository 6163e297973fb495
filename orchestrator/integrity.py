"""Is every file of a store as it was written? Artifacts by their records, shards by their seals.

What was written before there were seals can be opened or not; more cannot be told of it.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from air_core.seal import intact
from orchestrator.backends import RECORD, VERSION
from orchestrator.files import content_digest
from orchestrator.inventory import SHARDS, Holding, Inventory
from orchestrator.ledger import EVENTS, JOURNAL_REMEDY, REMEDY, parse_event
from orchestrator.place import RESOLVED
from orchestrator.remote import RemoteAway
from orchestrator.store import ROW
from orchestrator.verification import DamagedArtifact, parse_record


@dataclass(frozen=True)
class Finding:
    """What became of one file."""

    file: Path
    remove: Path  # what must go if it is damaged, so that the next run makes it again
    why: str = ""  # why it is damaged; empty: it is not, as far as can be told
    unsealed: bool = False  # nothing was written down that would tell
    remedy: str = ""  # what to do instead of removing it and running again


Watch = Callable[[Iterable[Finding], int], Iterable[Finding]]


@dataclass(frozen=True)
class Verdict:
    """What was looked at, and what is wrong."""

    inventory: Inventory
    files: int
    bytes: int
    damaged: tuple[Finding, ...]
    unsealed: int

    def json(self) -> dict[str, Any]:
        root = self.inventory.root
        return {
            "store": self.inventory.name,
            "files": self.files,
            "bytes": self.bytes,
            "damaged": [
                {
                    "file": str(one.file.relative_to(root)),
                    "why": one.why,
                    "remove": str(one.remove.relative_to(root)),
                    "remedy": one.remedy,
                }
                for one in self.damaged
            ],
            "unsealed": self.unsealed,
            "leftovers": [
                {"path": str(one.path.relative_to(root)), "why": one.why, "bytes": one.bytes}
                for one in self.inventory.leftovers
            ],
        }


def verify(inventory: Inventory, watch: Watch = lambda each, total: each) -> Verdict:
    """Read every file of the store once.

    Args:
        watch: passes on what is found, file by file, and may show how far it is.
    """
    looks = [look for holding in inventory.holdings for look in _looks(holding, inventory)]
    if inventory.bucket is None:  # of a bucket the artifacts alone are looked at
        looks += [partial(_checkpoint, one.path) for one in inventory.unfinished]
        looks += _beside(inventory.root)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        found = list(watch(threads.map(lambda look: look(), looks), len(looks)))
    return Verdict(
        inventory,
        len(found),
        sum(holding.bytes for holding in inventory.holdings)
        + sum(one.bytes for one in inventory.unfinished),
        tuple(one for one in found if one.why),
        sum(one.unsealed for one in found),
    )


def _looks(holding: Holding, inventory: Inventory) -> Iterator[Callable[[], Finding]]:
    if holding.stage in SHARDS:
        if ROW in holding.files:
            row = holding.path / ROW
            yield lambda: _record(holding, row, row, inventory)
        for name in holding.shards.values():
            yield partial(_shard, holding.path / name, inventory)
        return
    yield lambda: _record(holding, holding.path / RECORD, holding.path, inventory)
    files = holding.record.get("files")
    for name, digest in files.items() if isinstance(files, dict) else ():
        yield partial(_file, holding.path / holding.stored(name), digest, inventory)


def _beside(root: Path) -> Iterator[Callable[[], Finding]]:
    """The files of a store beside its artifacts, and those of its sweeps."""
    for name, look in BESIDE.items():
        if os.path.lexists(root / name):
            yield partial(look, root / name)
    for folder in sorted((root / "sweeps").glob("*/*")):
        for name, look in OF_A_SWEEP.items():
            if os.path.lexists(folder / name):
                yield partial(look, folder / name)


def _record(holding: Holding, file: Path, remove: Path, inventory: Inventory) -> Finding:
    try:
        data = _read(file, inventory)
        known = parse_record(data, file)
    except RemoteAway:
        raise
    except DamagedArtifact as damaged:
        return Finding(file, remove, damaged.why)
    except OSError as problem:
        return Finding(file, remove, f"cannot be read: {problem.strerror}")
    if not str(known.get("digest")).startswith(holding.digest):
        return Finding(file, remove, "belongs to another folder")
    return Finding(file, remove, unsealed=intact(data) is None)


def _file(file: Path, digest: str, inventory: Inventory) -> Finding:
    try:
        with inventory.open(file) as handle:
            same = content_digest(handle) == digest
    except RemoteAway:
        raise
    except OSError as problem:
        return Finding(file, file.parent, f"cannot be read: {problem.strerror}")
    return Finding(file, file.parent, "" if same else "is not what its record says")


def _shard(file: Path, inventory: Inventory) -> Finding:
    try:
        data = _read(file, inventory)
    except RemoteAway:
        raise
    except OSError as problem:
        return Finding(file, file, f"cannot be read: {problem.strerror}")
    state = intact(data)
    if state is None:
        return Finding(file, file, _unreadable(file, data), unsealed=True)
    return Finding(
        file, file, "" if state else "is not what was written: its checksum does not fit"
    )


def _read(file: Path, inventory: Inventory) -> bytes:
    with inventory.open(file) as handle:
        return handle.read()


def _checkpoint(file: Path) -> Finding:
    try:
        why = _unreadable(file, file.read_bytes())
    except OSError as problem:
        why = f"cannot be read: {problem.strerror}"
    return Finding(file, file, why, unsealed=not why)


def _lines(check: Callable[[bytes], object], remedy: str, file: Path) -> Finding:
    """A file of one JSON text a line; a half line at the end is what a killed writer left."""
    try:
        whole, _, _ = file.read_bytes().rpartition(b"\n")
    except OSError as problem:
        return Finding(file, file, f"cannot be read: {problem.strerror}")
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            check(line)
        except (ValueError, TypeError) as problem:
            return Finding(file, file, f"line {number} is damaged: {problem}", remedy=remedy)
    return Finding(file, file)


def _sealed(remedy: str, file: Path) -> Finding:
    try:
        data = file.read_bytes()
        parse_record(data, file)
    except OSError as problem:
        return Finding(file, file, f"cannot be read: {problem.strerror}", remedy=remedy)
    except DamagedArtifact as damaged:
        return Finding(file, file, damaged.why, remedy=remedy)
    return Finding(file, file, unsealed=intact(data) is None)


def _version(file: Path) -> Finding:
    try:
        found = file.read_text(errors="replace").strip()
    except OSError as problem:
        found = str(problem.strerror)
    why = "" if found == VERSION else f"holds {found[:20]!r}"
    return Finding(file, file, why, remedy=f"replace it by a file that holds {VERSION}")


CACHE_REMEDY = "remove it; it is built anew"
RUN_REMEDY = "run `airsweep run` with the sweep file and its options, which writes it anew"
BESIDE: dict[str, Callable[[Path], Finding]] = {
    "VERSION": _version,
    "digests.json": partial(_sealed, CACHE_REMEDY),
    "history.json": partial(_sealed, CACHE_REMEDY),
}
OF_A_SWEEP: dict[str, Callable[[Path], Finding]] = {
    RESOLVED: partial(_sealed, RUN_REMEDY),
    "outcome.json": partial(_sealed, RUN_REMEDY),
    EVENTS: partial(_lines, parse_event, REMEDY),
    "studies.journal": partial(_lines, json.loads, JOURNAL_REMEDY),
}


def _unreadable(file: Path, data: bytes) -> str:
    """Why a shard from before there were seals cannot be opened; empty if it can."""
    # Here, since a store of sealed shards is verified without them.
    import pyarrow.parquet as pq
    from safetensors.numpy import load

    try:
        if file.suffix == ".parquet":
            pq.read_table(io.BytesIO(data))
        else:
            load(data)
    except Exception as problem:  # whatever these readers raise, the file is none of theirs
        return f"cannot be read: {' '.join(str(problem).split())}"
    return ""

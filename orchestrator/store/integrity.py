"""Is every file of a store as it was written? Artifacts by their records, shards by their seals.

What was written before there were seals can be opened or not; more cannot be told of it.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from air_core.seal import intact
from orchestrator.errors import DamagedArtifact, RemoteAway
from orchestrator.files import content_digest
from orchestrator.store.artifacts import ROW
from orchestrator.store.backends import RECORD, VERSION, FolderBackend
from orchestrator.store.event_log import EVENTS, REMEDY, parse_event
from orchestrator.store.inventory import SHARDS, Holding, Inventory
from orchestrator.store.location import RESOLVED
from orchestrator.store.verification import parse_record


@dataclass(frozen=True)
class Finding:
    """What became of one file."""

    file: Path
    remove: Path  # what must go if it is damaged, so that the next run makes it again
    why: str = ""  # why it is damaged; empty: it is not, as far as can be told
    unsealed: bool = False  # nothing was written down that would tell
    remedy: str = ""  # what to do instead of removing it and running again


Watch = Callable[[Iterable[Finding], int], Iterable[Finding]]
# Reads an opened file; returns whether it has a checksum, and raises ValueError if it is damaged.
Check = Callable[[Path, BinaryIO], bool]


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
    backend = inventory.store.backend
    looks = [look for holding in inventory.holdings for look in _looks(holding, backend)]
    looks += [partial(_look, backend, one.path, one.path, _shard) for one in inventory.unfinished]
    for pattern, (check, remedy) in BESIDE.items():
        for file in backend.beside(pattern):
            looks.append(partial(_look, backend, file, file, check, remedy))
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        found = list(watch(threads.map(lambda look: look(), looks), len(looks)))
    return Verdict(
        inventory,
        len(found),
        sum(one.bytes for one in inventory.holdings)
        + sum(one.bytes for one in inventory.unfinished),
        tuple(one for one in found if one.why),
        sum(one.unsealed for one in found),
    )


def _looks(holding: Holding, backend: FolderBackend) -> Iterator[Callable[[], Finding]]:
    path, record = holding.path, partial(_record, holding.digest)
    if holding.stage in SHARDS:
        if ROW in holding.files:
            yield partial(_look, backend, path / ROW, path / ROW, record)
        for name in holding.shards.values():
            yield partial(_look, backend, path / name, path / name, _shard)
        return
    yield partial(_look, backend, path / RECORD, path, record)
    files = holding.record.get("files")
    for name, digest in files.items() if isinstance(files, dict) else ():
        check = partial(_recorded, digest)
        yield partial(_look, backend, path / holding.stored(name), path, check)


def _look(
    backend: FolderBackend, file: Path, remove: Path, check: Check, remedy: str = ""
) -> Finding:
    try:
        with backend.open(file) as handle:
            return Finding(file, remove, unsealed=not check(file, handle))
    except RemoteAway:
        raise
    except OSError as problem:
        why = f"cannot be read: {problem.strerror}"
    except DamagedArtifact as damaged:
        why = damaged.why
    except ValueError as problem:
        why = str(problem)
    return Finding(file, remove, why, remedy=remedy)


# ---------------------------------------------------------------- checks


def _recorded(digest: str, file: Path, handle: BinaryIO) -> bool:
    if content_digest(handle) != digest:
        raise ValueError("is not what its record says")
    return True


def _record(digest: str, file: Path, handle: BinaryIO) -> bool:
    data = handle.read()
    if not str(parse_record(data, file).get("digest")).startswith(digest):
        raise ValueError("belongs to another folder")
    return intact(data) is not None


def _shard(file: Path, handle: BinaryIO) -> bool:
    data = handle.read()
    sealed = intact(data)
    if sealed is False:
        raise ValueError("is not what was written: its checksum does not fit")
    if sealed is None:
        _open_unsealed(file, data)
    return sealed is not None


def _open_unsealed(file: Path, data: bytes) -> None:
    # Here, since a store of sealed shards is verified without them.
    import pyarrow.parquet as pq
    from safetensors.numpy import load

    try:
        pq.read_table(io.BytesIO(data)) if file.suffix == ".parquet" else load(data)
    except Exception as problem:  # whatever these readers raise, the file is none of theirs
        raise ValueError(f"cannot be read: {' '.join(str(problem).split())}") from None


def _sealed(file: Path, handle: BinaryIO) -> bool:
    data = handle.read()
    parse_record(data, file)
    return intact(data) is not None


def _events(file: Path, handle: BinaryIO) -> bool:
    """An event log; a half line at the end is what a killed driver left."""
    whole, _, _ = handle.read().rpartition(b"\n")
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            parse_event(line)
        except ValueError as problem:
            raise ValueError(f"line {number} is damaged: {problem}") from None
    return True


def _version(file: Path, handle: BinaryIO) -> bool:
    found = handle.read().decode(errors="replace").strip()
    if found != VERSION:
        raise ValueError(f"holds {found[:20]!r}")
    return True


CACHE_REMEDY = "remove it; it is built anew"
RUN_REMEDY = "run `airsweep run` with the sweep file and its options, which writes it anew"
# Files of a store beside its artifacts, and of its sweeps: how to check them, and what to do.
BESIDE: dict[str, tuple[Check, str]] = {
    "VERSION": (_version, f"replace it by a file that holds {VERSION}"),
    "digests.json": (_sealed, CACHE_REMEDY),
    "history.json": (_sealed, CACHE_REMEDY),
    f"sweeps/*/*/{RESOLVED}": (_sealed, RUN_REMEDY),
    "sweeps/*/*/outcome.json": (_sealed, RUN_REMEDY),
    f"sweeps/*/*/{EVENTS}": (_events, REMEDY),
}

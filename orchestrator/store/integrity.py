"""Verify every file of a store: artifacts by their records, shards by their checksums.

JSON files that older versions wrote without a checksum are only parsed and counted; changes of
their content cannot be detected.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from air_core.seal import intact
from orchestrator.errors import BucketUnreachable, DamagedArtifact
from orchestrator.files import content_digest
from orchestrator.store.artifacts import ROW
from orchestrator.store.backends import RECORD, VERSION, FolderBackend
from orchestrator.store.event_log import EVENTS, REMEDY, parse_event
from orchestrator.store.inventory import Holding, Inventory
from orchestrator.store.location import RESOLVED
from orchestrator.store.rows import SHARDS
from orchestrator.store.verification import parse_record


@dataclass(frozen=True)
class FileCheck:
    """Result of checking one file."""

    file: Path
    remove: Path  # remove this if the file is damaged, so that the next run builds it again
    reason: str = ""  # why the file is damaged; empty: no damage found
    unsealed: bool = False  # the file has no checksum
    remedy: str = ""  # what to do, if not to remove the file and run again


Progress = Callable[[Iterable[FileCheck], int], Iterable[FileCheck]]
# Reads an opened file. Returns whether it has a checksum; raises ValueError if it is damaged.
Check = Callable[[Path, BinaryIO], bool]


@dataclass(frozen=True)
class VerificationReport:
    """Number of files and bytes checked, and the damaged files."""

    inventory: Inventory
    files: int
    bytes: int
    damaged: tuple[FileCheck, ...]
    unsealed: int

    def json(self) -> dict[str, Any]:
        store = self.inventory.store
        return {
            "store": store.name,
            "files": self.files,
            "bytes": self.bytes,
            "damaged": [
                {
                    "file": str(check.file.relative_to(store.root)),
                    "why": check.reason,
                    "remove": str(check.remove.relative_to(store.root)),
                    "remedy": check.remedy,
                }
                for check in self.damaged
            ],
            "unsealed": self.unsealed,
            "leftovers": [leftover.json(store.root) for leftover in self.inventory.leftovers],
        }


def verify(
    inventory: Inventory, progress: Progress = lambda checks, total: checks
) -> VerificationReport:
    """Read every file of the store once.

    Args:
        progress: passes the results on, and may display how many files are done.
    """
    backend = inventory.store.backend
    tasks = [task for holding in inventory.holdings for task in _tasks(holding, backend)]
    tasks += [
        partial(_check_file, backend, c.path, c.path, _check_shard) for c in inventory.checkpoints
    ]
    for pattern, (check, remedy) in OTHER_FILES.items():
        for file in backend.other_files(pattern):
            tasks.append(partial(_check_file, backend, file, file, check, remedy))
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        results = list(progress(threads.map(lambda task: task(), tasks), len(tasks)))
    return VerificationReport(
        inventory,
        len(results),
        sum(holding.bytes for holding in inventory.holdings)
        + sum(checkpoint.bytes for checkpoint in inventory.checkpoints),
        tuple(result for result in results if result.reason),
        sum(result.unsealed for result in results),
    )


def _tasks(holding: Holding, backend: FolderBackend) -> Iterator[Callable[[], FileCheck]]:
    path, record = holding.path, partial(_check_record, holding.digest)
    if holding.stage in SHARDS:
        if ROW in holding.files:
            yield partial(_check_file, backend, path / ROW, path / ROW, record)
        for name in holding.shards.values():
            yield partial(_check_file, backend, path / name, path / name, _check_shard)
        return
    yield partial(_check_file, backend, path / RECORD, path, record)
    files = holding.record.get("files")
    for name, digest in files.items() if isinstance(files, dict) else ():
        check = partial(_check_recorded_file, digest)
        yield partial(_check_file, backend, path / holding.stored_name(name), path, check)


def _check_file(
    backend: FolderBackend, file: Path, remove: Path, check: Check, remedy: str = ""
) -> FileCheck:
    try:
        with backend.open(file) as handle:
            return FileCheck(file, remove, unsealed=not check(file, handle))
    except BucketUnreachable:
        raise
    except OSError as problem:
        why = f"cannot be read: {problem.strerror}"
    except DamagedArtifact as damaged:
        why = damaged.reason
    except ValueError as problem:
        why = str(problem)
    return FileCheck(file, remove, why, remedy=remedy)


# ---------------------------------------------------------------- checks


def _check_recorded_file(digest: str, file: Path, handle: BinaryIO) -> bool:
    if content_digest(handle) != digest:
        raise ValueError("does not match its digest in the record")
    return True


def _check_record(digest: str, file: Path, handle: BinaryIO) -> bool:
    data = handle.read()
    if not str(parse_record(data, file).get("digest")).startswith(digest):
        raise ValueError("belongs to another folder")
    return True


def _check_shard(file: Path, handle: BinaryIO) -> bool:
    if not intact(handle.read()):
        raise ValueError("was cut or changed: it has no valid checksum")
    return True


def _check_sealed_file(file: Path, handle: BinaryIO) -> bool:
    data = handle.read()
    parse_record(data, file, needs_checksum=False)
    return intact(data) is not None


def _check_event_log(file: Path, handle: BinaryIO) -> bool:
    """An event log. A killed driver may leave a partial last line, which is no damage."""
    lines, _, _ = handle.read().rpartition(b"\n")
    for number, line in enumerate(lines.splitlines(), 1):
        try:
            parse_event(line)
        except ValueError as problem:
            raise ValueError(f"line {number} is damaged: {problem}") from None
    return True


def _check_version_file(file: Path, handle: BinaryIO) -> bool:
    found = handle.read().decode(errors="replace").strip()
    if found != VERSION:
        raise ValueError(f"contains {found[:20]!r}")
    return True


CACHE_REMEDY = "remove it; airsweep computes it again"
RUN_REMEDY = "run `airsweep run` with the sweep file and its options, which writes it again"
# Files outside the artifacts: how to check them, and what to do if one is damaged.
OTHER_FILES: dict[str, tuple[Check, str]] = {
    "VERSION": (_check_version_file, f"replace it by a file that contains {VERSION}"),
    "digests.json": (_check_sealed_file, CACHE_REMEDY),
    "history.json": (_check_sealed_file, CACHE_REMEDY),
    f"sweeps/*/*/{RESOLVED}": (_check_sealed_file, RUN_REMEDY),
    "sweeps/*/*/outcome.json": (_check_sealed_file, RUN_REMEDY),
    f"sweeps/*/*/{EVENTS}": (_check_event_log, REMEDY),
}

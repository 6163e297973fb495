"""Verify stored files against their records and checksums.

A record carries its own checksum (`air_core/seal.py`) and the digests of the other files of its
artifact. Each process reads a file once: a verified file is identified by size, modification time
and inode, and read again when one of them changes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from air_core.seal import intact
from orchestrator.errors import DamagedArtifact
from orchestrator.files import Stamp, file_digest, file_stamp

T = TypeVar("T")
log = logging.getLogger(__name__)
_verified: dict[tuple[Path, str], Stamp] = {}  # by file and digest


def read_record(file: Path) -> dict[str, Any]:
    """Read `record.json` or `row.json`, as `parse_record`.

    Raises:
        FileNotFoundError: it does not exist.
    """
    return parse_record(file.read_bytes(), file)


def parse_record(data: bytes, file: Path) -> dict[str, Any]:
    """Parse a JSON object written by `sealed_json`, and verify its checksum.

    Raises:
        DamagedArtifact: the content cannot be parsed, was changed or has no checksum.
    """
    try:
        content = json.loads(data)
        reason = "" if isinstance(content, dict) else f"{file.name} is not a JSON object"
    except (ValueError, RecursionError) as problem:
        reason = f"{file.name} is not JSON ({problem})"
    if not reason and not (checked := intact(data)):
        checksum = f"the checksum of {file.name} does not match"
        reason = f"{file.name} has no checksum" if checked is None else checksum
    if reason:
        raise DamagedArtifact(file.parent, reason)
    del content["seal"]
    return dict(content)


def recorded_files(folder: Path, record: dict[str, Any]) -> dict[str, str]:
    """Digests of an artifact's files by name.

    Raises:
        DamagedArtifact: the record does not list files.
    """
    files = record.get("files", {})
    # Anyone who may write to a bucket may have written the record, and a name becomes a path of
    # this machine.
    if not isinstance(files, dict) or any(Path(f).name != f or f in ("", "..") for f in files):
        raise DamagedArtifact(folder, "its record does not list files of this folder")
    return files


def verify_files(folder: Path, files: Mapping[str, str]) -> None:
    """Compare the files of an artifact with the digests in its record.

    Raises:
        DamagedArtifact: a file was changed or is missing.
    """
    for name, digest in files.items():
        file = folder / name
        try:
            stamp = file_stamp(file)
            if _verified.get((file, digest)) == stamp:
                continue
            found = file_digest(file)
        except FileNotFoundError:
            raise DamagedArtifact(folder, f"{name} is missing") from None
        if found != digest:
            raise DamagedArtifact(folder, f"{name} does not match its digest in the record")
        _verified[file, digest] = stamp


def read_sealed(file: Path) -> dict[str, Any]:
    """Read a JSON object written by `sealed_json`.

    Raises:
        ValueError: the file is damaged.
        FileNotFoundError: it does not exist.
    """
    try:
        return read_record(file)
    except DamagedArtifact as damaged:
        raise ValueError(damaged.reason) from None


def read_cache(file: Path, parse: Callable[[dict[str, Any]], T], empty: T) -> T:
    """Read a file that can be computed again. A missing or damaged file gives `empty`.

    Args:
        parse: converts the JSON object.
    """
    try:
        return parse(read_sealed(file))
    except FileNotFoundError:
        return empty
    except (ValueError, TypeError, KeyError, AttributeError) as problem:
        _warn_once(f"{file} is damaged and is computed again: {problem}")
        return empty


@cache
def _warn_once(message: str) -> None:
    log.warning(message)

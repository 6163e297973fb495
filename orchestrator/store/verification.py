"""Verify stored files against their records and checksums.

A record carries its own checksum (`air_core/seal.py`) and the digests of the other files of its
artifact. Each process reads a file once: a verified file is identified by size, modification time
and inode, and read again when one of them changes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
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
    """Read `record.json` or `row.json` and verify its checksum.

    Raises:
        DamagedArtifact: the file cannot be parsed, was changed or has no checksum.
        FileNotFoundError: it does not exist.
    """
    return parse_record(_content(file), file)


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except IsADirectoryError:
        raise DamagedArtifact(file.parent, f"{file.name} is a folder") from None


def parse_record(data: bytes, file: Path, name: str = "") -> dict[str, Any]:
    """Parse the content of a record and verify its checksum.

    Args:
        file: path of the record.
        name: its name in messages; default: the path of its folder.

    Raises:
        DamagedArtifact: the content cannot be parsed, was changed or has no checksum.
    """
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as problem:
        raise DamagedArtifact(file.parent, f"{file.name} is not JSON ({problem})", name) from None
    if not isinstance(record, dict):
        raise DamagedArtifact(file.parent, f"{file.name} is not a JSON object", name)
    checked = intact(data)
    if checked is False:
        raise DamagedArtifact(file.parent, f"the checksum of {file.name} does not match", name)
    if checked is None:
        raise DamagedArtifact(file.parent, f"{file.name} has no checksum", name)
    return record


def verify_files(folder: Path, record: dict[str, Any]) -> None:
    """Compare the files of an artifact with the digests in its record.

    Raises:
        DamagedArtifact: a file was changed or is missing.
    """
    files = record.get("files", {})
    if not isinstance(files, dict):
        raise DamagedArtifact(folder, "its record does not list files")
    for name, digest in files.items():
        file = folder / name
        try:
            stamp = file_stamp(file)
            if _verified.get((file, digest)) == stamp:
                continue
            found = file_digest(file)
        except FileNotFoundError:
            raise DamagedArtifact(folder, f"{name} is missing") from None
        except IsADirectoryError:
            raise DamagedArtifact(folder, f"{name} is a folder") from None
        if found != digest:
            raise DamagedArtifact(folder, f"{name} does not match its digest in the record")
        _verified[file, digest] = stamp


# ---------------------------------------------------------------- other files


def read_sealed(file: Path) -> dict[str, Any]:
    """Read a JSON object written by `sealed_json`.

    Raises:
        ValueError: the file is damaged.
        FileNotFoundError: it does not exist.
    """
    try:
        content = parse_record(_content(file), file)
    except DamagedArtifact as damaged:
        raise ValueError(damaged.reason) from None
    content.pop("seal", None)
    return content


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

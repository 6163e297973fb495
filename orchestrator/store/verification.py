"""Verify stored files against their records and checksums.

A record carries its own checksum (`air_core/tools/seal.py`) and the digests of the other files of
its artifact. Each process reads a file once: a verified file is identified by size, modification
time and inode, and read again when one of them changes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from air_core.tools.seal import intact
from orchestrator.errors import DamagedArtifact
from orchestrator.failures import first_line
from orchestrator.files import Stamp, file_digest, file_stamp

T = TypeVar("T")
log = logging.getLogger(__name__)
_verified: dict[tuple[Path, str], Stamp] = {}  # by file and digest


def read_sealed(data: bytes, name: str) -> dict[str, Any]:
    """Parse a JSON object written by `sealed_json`, and verify its checksum.

    Raises:
        ValueError: the content cannot be parsed, was changed or has no checksum.
    """
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as problem:
        raise ValueError(f"{name} is not JSON ({problem})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{name} is not a JSON object")
    if not (checked := intact(data)):
        checksum = f"the checksum of {name} does not match"
        raise ValueError(f"{name} has no checksum" if checked is None else checksum)
    del content["seal"]
    return content


def read_record(data: bytes, file: Path) -> dict[str, Any]:
    """Parse `record.json` or `row.json`, as `read_sealed`.

    Raises:
        DamagedArtifact: the content was changed.
    """
    try:
        return read_sealed(data, file.name)
    except ValueError as problem:
        raise DamagedArtifact(file.parent, str(problem)) from None


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


def read_written(file: Path, parse: Callable[[dict[str, Any]], T]) -> T:
    """Read a file that each run writes into the folder of its sweep.

    Args:
        parse: converts the JSON object.

    Raises:
        ValueError: the file is damaged or missing.
    """
    try:
        return parse(read_sealed(file.read_bytes(), file.name))
    except (ValueError, TypeError, FileNotFoundError) as problem:
        is_missing = isinstance(problem, FileNotFoundError)
        state = "missing" if is_missing else f"damaged: {first_line(problem)}"
        raise ValueError(
            f"{file} is {state}; run `airsweep run` with the sweep file and its options, which "
            "writes it again"
        ) from None


def read_cache(file: Path, parse: Callable[[dict[str, Any]], T], empty: T) -> T:
    """Read a file that can be computed again. A missing or damaged file gives `empty`.

    Args:
        parse: converts the JSON object.
    """
    try:
        return parse(read_sealed(file.read_bytes(), file.name))
    except FileNotFoundError:
        return empty
    except (ValueError, TypeError, KeyError, AttributeError) as problem:
        _warn_once(f"{file} is damaged and is computed again: {problem}")
        return empty


@cache
def _warn_once(message: str) -> None:
    log.warning(message)

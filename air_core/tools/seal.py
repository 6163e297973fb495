"""Embedded checksums: files of any format that contain the digest of their content.

The digest covers the complete file, with zeros in place of the digest. One rename therefore
publishes content and checksum together, and no crash can separate them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

# With two marks, no single change makes a sealed file look unsealed. JSON does not escape them.
BEFORE, AFTER = b"blake2b-seal(", b")blake2b-seal"
ZEROS = b"0" * 40
BLANK = (BEFORE + ZEROS + AFTER).decode()  # every sealed file contains this once


def sealed(data: bytes) -> bytes:
    """Replace BLANK in a file's content with the digest; the length does not change."""
    assert data.count(BLANK.encode()) == 1, "a file is sealed at one place"
    return data.replace(BLANK.encode(), BEFORE + _digest(data) + AFTER)


def sealed_json(value: Mapping[str, Any]) -> bytes:
    """Plain data as indented JSON with a checksum under the key `seal`."""
    return sealed(json.dumps({**value, "seal": BLANK}, indent=1).encode())


def intact(data: bytes) -> bool | None:
    """Whether a file's content matches its checksum; None if it has no checksum."""
    start, end = data.find(BEFORE), data.find(AFTER)
    if start < 0 and end < 0:
        return None
    start += len(BEFORE)
    if end - start != len(ZEROS):
        return False
    view = memoryview(data)  # avoids a copy of large shards
    return data[start:end] == _digest(view[:start], ZEROS, view[end:])


def _digest(*parts: bytes | memoryview) -> bytes:
    found = hashlib.blake2b(digest_size=len(ZEROS) // 2)
    for part in parts:
        found.update(part)
    return found.hexdigest().encode()

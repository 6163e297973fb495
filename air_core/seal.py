"""A file that carries the digest of its own bytes, whatever its format. Knows no store.

The digest is taken over the file as it is while zeros stand in the digest's place. So one rename
publishes content and checksum together: there is no second file that a crash could part from it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

# Two marks: no single change can hide that a file was sealed. No writer of JSON escapes them.
BEFORE, AFTER = b"blake2b-seal(", b")blake2b-seal"
ZEROS = b"0" * 40
BLANK = (BEFORE + ZEROS + AFTER).decode()  # to be written somewhere into the file, once


def sealed(data: bytes) -> bytes:
    """The same file with its digest in the place of BLANK; its length stays."""
    assert data.count(BLANK.encode()) == 1, "a file is sealed at one place"
    return data.replace(BLANK.encode(), BEFORE + _digest(data) + AFTER)


def sealed_json(value: Mapping[str, Any]) -> bytes:
    """Plain data as JSON for people, sealed under `seal`."""
    return sealed(json.dumps({**value, "seal": BLANK}, indent=1, sort_keys=True).encode())


def intact(data: bytes) -> bool | None:
    """Is a file as it was sealed? None: it was never sealed."""
    start, end = data.find(BEFORE), data.find(AFTER)
    if start < 0 and end < 0:
        return None
    start += len(BEFORE)
    if end - start != len(ZEROS):
        return False
    view = memoryview(data)  # a shard of patch tokens is large enough not to be copied
    return data[start:end] == _digest(view[:start], ZEROS, view[end:])


def _digest(*parts: bytes | memoryview) -> bytes:
    found = hashlib.blake2b(digest_size=len(ZEROS) // 2)
    for part in parts:
        found.update(part)
    return found.hexdigest().encode()

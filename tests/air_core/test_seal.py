"""Embedded checksums detect any changed byte of a file, in any format."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from safetensors.numpy import save

from air_core.tools.seal import BLANK, intact, sealed, sealed_json
from orchestrator.stages.images import _parquet

ARRAYS = {"features": np.arange(6, dtype=np.float32).reshape(2, 3), "ok": np.array([True, False])}
TABLE = pa.table({"index": pa.array([0, 1], pa.int32()), "image": [b"one", b"two"]})


@pytest.fixture(params=["json", "safetensors", "parquet"])
def file(request) -> bytes:
    """A small file with a checksum."""
    if request.param == "json":
        return sealed_json({"user": "a", "spec": {"size": 8}})
    if request.param == "safetensors":
        return sealed(save(ARRAYS, {"seal": BLANK}))
    return sealed(_parquet(TABLE))


def test_any_changed_byte_is_detected(file):
    assert intact(file) is True
    for index in range(len(file)):
        changed = bytearray(file)
        changed[index] ^= 1 << index % 8
        assert intact(bytes(changed)) is False, index


def test_missing_or_additional_bytes_are_detected(file):
    assert intact(file[:-1]) is False
    assert intact(file + b"\0") is False


def test_a_file_without_a_checksum_is_neither_intact_nor_damaged(file):
    assert intact(file.replace(b"blake2b-seal", b"")) is None

"""Embedded checksums detect any changed byte of a file."""

from __future__ import annotations

from air_core.tools.seal import intact, sealed_json

FILE = sealed_json({"user": "a", "spec": {"size": 8}})


def test_any_changed_missing_or_additional_byte_is_detected():
    assert intact(FILE) is True
    for index in range(len(FILE)):
        changed = bytearray(FILE)
        changed[index] ^= 1 << index % 8
        assert intact(bytes(changed)) is False, index
    assert intact(FILE[:-1]) is False
    assert intact(FILE + b"\0") is False


def test_a_file_without_a_checksum_is_neither_intact_nor_damaged():
    assert intact(FILE.replace(b"blake2b-seal", b"")) is None

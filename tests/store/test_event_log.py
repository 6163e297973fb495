"""The sweep's log: whole lines in order, one writer, and no lock that outlives its holder."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator.store import Ledger
from orchestrator.store.event_log import mend_lines


def points(ledger: Ledger) -> list[int]:
    return [event["point"] for event in ledger.events()]


@pytest.fixture
def ledger(tmp_path) -> Ledger:
    """A ledger with two points, whose driver has ended."""
    ledger = Ledger(tmp_path / "sweeps" / "x")
    ledger.lock()
    ledger.append("point_asked", point=0)
    ledger.append("point_asked", point=1)
    ledger.unlock()
    return ledger


def test_events_come_back_in_order(tmp_path):
    ledger = Ledger(tmp_path)
    assert list(ledger.events()) == []
    ledger.lock()
    ledger.append("sweep_started", total=3)
    ledger.append("trial_done", slot="a/0/seed=1", key="k")
    began, ended = Ledger(tmp_path).events()
    assert began.pop("time") <= ended.pop("time")
    assert began == {"event": "sweep_started", "total": 3}
    assert ended == {"event": "trial_done", "slot": "a/0/seed=1", "key": "k"}


def test_what_cannot_be_read_back_is_not_written(ledger):
    with pytest.raises(ValueError, match="float values"):
        ledger.append("round_told", value=float("nan"))
    assert points(ledger) == [0, 1]


@pytest.mark.parametrize("cut", range(1, 20, 6))
def test_half_a_last_line_is_ignored_and_the_next_driver_cuts_it_off(ledger, cut):
    whole = ledger.path.read_bytes()
    ledger.append("point_asked", point=2)
    ledger.path.write_bytes(ledger.path.read_bytes()[:-cut])
    assert points(ledger) == [0, 1]  # also while nobody has mended it
    following = Ledger(ledger.folder)
    following.lock()
    assert ledger.path.read_bytes() == whole
    following.append("point_asked", point=3)
    assert points(ledger) == [0, 1, 3]


@pytest.mark.parametrize("whole", [b"", b"one\n", b"one\ntwo\n"])
@pytest.mark.parametrize("half", [b"", b'{"event'])
def test_only_half_a_line_is_cut_off(tmp_path, whole, half):
    path = tmp_path / "lines"
    path.write_bytes(whole + half)
    mend_lines(path)
    assert path.read_bytes() == whole


def test_who_looks_whether_a_driver_lives_is_not_in_the_way_of_one(ledger):
    assert not ledger.busy()
    lock = ledger.folder / ".driver.lock"
    lock.chmod(0o444)
    with flocked_by_who_looks(lock):
        ledger.lock()
    assert ledger.busy()
    ledger.unlock()
    assert not ledger.busy()


@contextmanager
def flocked_by_who_looks(lock: Path) -> Iterator[None]:
    """For a moment that begins before and ends a little later."""
    handle = os.open(lock, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_SH)
    ends = threading.Timer(0.1, os.close, [handle])
    ends.start()
    yield
    ends.join()


def test_a_damaged_line_is_named_by_file_and_number(ledger):
    sound = ledger.path.read_bytes()
    second = sound.index(b"\n") + 1
    event = range(second, sound.rindex(b', "crc": "'))
    checksum = range(len(sound) - 11, len(sound) - 3)
    for at in (*event, *checksum):
        data = bytearray(sound)
        data[at] ^= 4
        ledger.path.write_bytes(data)
        with pytest.raises(ValueError, match="remove this line") as damaged:
            points(ledger)
        assert f"{ledger.path}:2: " in str(damaged.value)


def test_lines_of_earlier_versions_have_no_checksum_and_are_read(ledger):
    ledger.path.write_text('{"event": "point_asked", "point": 7, "time": 1.5}\n')
    assert points(ledger) == [7]

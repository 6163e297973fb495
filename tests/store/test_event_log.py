"""The sweep's log: whole lines in order, one writer, and no lock that outlives its holder."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator.store import EventLog
from orchestrator.store.event_log import mend_lines


def points(event_log: EventLog) -> list[int]:
    return [event["point"] for event in event_log.events()]


@pytest.fixture
def event_log(tmp_path) -> EventLog:
    """A ledger with two points, whose driver has ended."""
    event_log = EventLog(tmp_path / "sweeps" / "x")
    event_log.lock()
    event_log.append("point_asked", point=0)
    event_log.append("point_asked", point=1)
    event_log.unlock()
    return event_log


def test_events_come_back_in_order(tmp_path):
    event_log = EventLog(tmp_path)
    assert list(event_log.events()) == []
    event_log.lock()
    event_log.append("sweep_started", total=3)
    event_log.append("trial_done", slot="a/0/seed=1", key="k")
    began, ended = EventLog(tmp_path).events()
    assert began.pop("time") <= ended.pop("time")
    assert began == {"event": "sweep_started", "total": 3}
    assert ended == {"event": "trial_done", "slot": "a/0/seed=1", "key": "k"}


def test_what_cannot_be_read_back_is_not_written(event_log):
    with pytest.raises(ValueError, match="float values"):
        event_log.append("round_told", value=float("nan"))
    assert points(event_log) == [0, 1]


@pytest.mark.parametrize("cut", range(1, 20, 6))
def test_half_a_last_line_is_ignored_and_the_next_driver_cuts_it_off(event_log, cut):
    whole = event_log.path.read_bytes()
    event_log.append("point_asked", point=2)
    event_log.path.write_bytes(event_log.path.read_bytes()[:-cut])
    assert points(event_log) == [0, 1]  # also while nobody has mended it
    following = EventLog(event_log.folder)
    following.lock()
    assert event_log.path.read_bytes() == whole
    following.append("point_asked", point=3)
    assert points(event_log) == [0, 1, 3]


@pytest.mark.parametrize("whole", [b"", b"one\n", b"one\ntwo\n"])
@pytest.mark.parametrize("half", [b"", b'{"event'])
def test_only_half_a_line_is_cut_off(tmp_path, whole, half):
    path = tmp_path / "lines"
    path.write_bytes(whole + half)
    mend_lines(path)
    assert path.read_bytes() == whole


def test_who_looks_whether_a_driver_lives_is_not_in_the_way_of_one(event_log):
    assert not event_log.busy()
    lock = event_log.folder / ".driver.lock"
    lock.chmod(0o444)
    with flocked_by_who_looks(lock):
        event_log.lock()
    assert event_log.busy()
    event_log.unlock()
    assert not event_log.busy()


@contextmanager
def flocked_by_who_looks(lock: Path) -> Iterator[None]:
    """For a moment that begins before and ends a little later."""
    handle = os.open(lock, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_SH)
    ends = threading.Timer(0.1, os.close, [handle])
    ends.start()
    yield
    ends.join()


def test_a_damaged_line_is_named_by_file_and_number(event_log):
    sound = event_log.path.read_bytes()
    second = sound.index(b"\n") + 1
    event = range(second, sound.rindex(b', "crc": "'))
    checksum = range(len(sound) - 11, len(sound) - 3)
    for at in (*event, *checksum):
        data = bytearray(sound)
        data[at] ^= 4
        event_log.path.write_bytes(data)
        with pytest.raises(ValueError, match="remove this line") as damaged:
            points(event_log)
        assert f"{event_log.path}:2: " in str(damaged.value)


def test_lines_of_earlier_versions_have_no_checksum_and_are_read(event_log):
    event_log.path.write_text('{"event": "point_asked", "point": 7, "time": 1.5}\n')
    assert points(event_log) == [7]

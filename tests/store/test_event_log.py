"""Event log: complete lines in order, a single writer, and a lock that ends with its holder."""

from __future__ import annotations

import fcntl
import os
import threading

import pytest

from orchestrator.store import EventLog
from tests.helpers.sweeps import TIMEOUT


def points(event_log: EventLog) -> list[int]:
    return [event["point"] for event in event_log.events()]


@pytest.fixture
def event_log(tmp_path) -> EventLog:
    """An event log with two points, whose driver has ended."""
    event_log = EventLog(tmp_path / "sweeps" / "x")
    event_log.lock()
    event_log.append("point_asked", point=0)
    event_log.append("point_asked", point=1)
    event_log.unlock()
    return event_log


def test_events_are_read_in_order(event_log):
    first, second = EventLog(event_log.folder).events()
    assert first.pop("time") <= second.pop("time")
    assert first == {"event": "point_asked", "point": 0}
    with pytest.raises(ValueError, match="float values"):
        event_log.append("artifact_prepared", value=float("nan"))
    assert points(event_log) == [0, 1]


@pytest.mark.parametrize("cut", range(1, 20, 6))
def test_a_partial_last_line_is_ignored_and_removed_by_the_next_driver(event_log, cut):
    complete = event_log.path.read_bytes()
    event_log.append("point_asked", point=2)
    event_log.path.write_bytes(event_log.path.read_bytes()[:-cut])
    assert points(event_log) == [0, 1]  # before a driver removes it
    following = EventLog(event_log.folder)
    following.lock()
    assert event_log.path.read_bytes() == complete
    following.append("point_asked", point=3)
    assert points(event_log) == [0, 1, 3]


def test_a_check_of_the_lock_does_not_stop_a_driver_from_starting(event_log, monkeypatch):
    monkeypatch.setattr("orchestrator.store.event_log.LOCK_TIMEOUT", TIMEOUT)
    assert not event_log.is_locked()
    handle = os.open(event_log.folder / ".driver.lock", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_SH)  # as `is_locked` for a moment
    ends = threading.Timer(0.1, os.close, [handle])
    ends.start()
    with event_log.locked():
        assert event_log.is_locked()
    ends.join()
    assert not event_log.is_locked()


def test_an_error_for_a_damaged_line_has_file_and_line_number(event_log):
    intact = event_log.path.read_bytes()
    second = intact.index(b"\n") + 1
    event = range(second, intact.rindex(b', "crc": "'))
    checksum = range(len(intact) - 11, len(intact) - 3)
    damages = [
        intact[:at] + bytes([intact[at] ^ 4]) + intact[at + 1 :] for at in (*event, *checksum)
    ]
    for data in (*damages, intact[:second] + b'{"event": "x"}\n'):  # the last has no checksum
        event_log.path.write_bytes(data)
        with pytest.raises(ValueError, match="remove this line") as damaged:
            points(event_log)
        assert f"{event_log.path}:2: " in str(damaged.value)

"""Event log of a sweep: an append-only file of JSON lines that only the driver writes.

`status`, `table`, resume and the tracker derive their state from it. In a bucket each event is an
object that is created once, named by its number; `events.jsonl` is the copy of this machine.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from orchestrator.errors import BucketUnreachable, SweepBusy
from orchestrator.files import is_flocked, lock_mode, make_folders, sync
from orchestrator.store._leases import Lease
from orchestrator.store.buckets import run_concurrently
from orchestrator.store.storage import EVENTS, Bucket

# For tests: `event:7` kills the driver after event 7, `trial_done:2` after the second trial_done.
CRASH_AT = "AIRSWEEP_CRASH_AT"
LOCK_TIMEOUT = 0.5  # seconds: `is_locked` of another process holds the lock for a moment


class EventLog:
    """`events.jsonl` in the folder of one sweep. Appending needs `lock()`.

    Args:
        bucket: the storage, if it is a bucket. The folder has the copy of this machine then.
    """

    def __init__(self, folder: Path, bucket: Bucket | None = None) -> None:
        self.folder = folder
        self.path = folder / EVENTS
        self._lock = FileLock(folder / ".driver.lock")
        self._seen = 0  # events that count for CRASH_AT
        self._bucket = bucket
        if bucket is not None:
            self._prefix = bucket.object(folder)
            self._lease = Lease(bucket.client, f"{self._prefix}/driver.lock")
            self._count = 0  # events in the copy, if this is the driver

    def lock(self) -> None:
        """Become the driver of the sweep.

        Raises:
            SweepBusy: the sweep has a driver.
        """
        make_folders(self.folder)
        self._lock = FileLock(self._lock.lock_file, mode=lock_mode(self.folder))
        busy = "another driver runs this sweep ({} is {}); wait for it, or stop it"
        try:
            self._lock.acquire(timeout=LOCK_TIMEOUT)
        except Timeout:
            raise SweepBusy(busy.format(self._lock.lock_file, "held")) from None
        try:
            if self._bucket is None:
                drop_partial_line(self.path)
            elif self._lease.acquire():
                self._count = self.refresh()
            else:
                lease = self._bucket.label(self.folder / "driver.lock")
                raise SweepBusy(busy.format(lease, "renewed"))
        except BaseException:
            self.unlock()
            raise

    def unlock(self) -> None:
        if self._bucket is not None:
            with suppress(BucketUnreachable):  # the lease expires without renewals
                self._lease.release()
        self._lock.release()

    @contextmanager
    def locked(self) -> Iterator[EventLog]:
        """Hold the lock of the sweep; raises as `lock`."""
        self.lock()
        try:
            yield self
        finally:
            self.unlock()

    def is_locked(self) -> bool:
        """Whether a driver runs the sweep."""
        held = is_flocked(Path(self._lock.lock_file))
        return held or (self._bucket is not None and self._lease.is_held())

    def append(self, event: str, **fields: Any) -> float:
        """Write an event. It is on disk, or in the bucket, when this returns.

        Returns:
            Time of the event, in seconds since the epoch, as recorded in it.
        """
        now = round(time.time(), 3)
        line = _line({"event": event, "time": now, **fields})
        if self._bucket is None:
            append_line(self.path, line)
        else:
            self._append_object(self._bucket, line)
        self._crash(event)
        return now

    def _crash(self, event: str) -> None:
        name, _, count = os.environ.get(CRASH_AT, "").partition(":")
        if name in ("event", event):
            self._seen += 1
            if self._seen == int(count):
                os.kill(os.getpid(), signal.SIGKILL)

    def events(self) -> Iterator[dict[str, Any]]:
        """All events in order, without a partial last line, which a killed driver may leave.

        Raises:
            ValueError: a line is damaged.
        """
        if not self.path.exists():
            return
        with open(self.path, "rb") as handle:
            for number, line in enumerate(handle, 1):
                if line.endswith(b"\n"):
                    try:
                        yield parse_event(line)
                    except ValueError as problem:
                        raise ValueError(
                            f"{self.path}:{number}: {problem}; {self._remedy()}"
                        ) from None

    def _remedy(self) -> str:
        if self._bucket is None:
            return "remove this line; the results stay in the store"
        events = f"{self._bucket.client}/{self._prefix}/events"
        return f"remove this file, a copy of {events}; the results stay in the store"

    # ---------------------------------------------------------------- in a bucket

    def refresh(self) -> int:
        """Append the events that this machine lacks to its copy; the number of events then."""
        assert self._bucket is not None
        client, events = self._bucket.client, f"{self._prefix}/events"
        with self._copy_lock():
            drop_partial_line(self.path)
            count = self.path.read_bytes().count(b"\n") if self.path.exists() else 0
            later = [entry.name for entry in client.list_objects(events, after=_name(count))]
            if later != [_name(count + 1 + n) for n in range(len(later))]:
                raise ValueError(
                    f"an event before {client}/{events}/{later[-1]} is missing: the event log is "
                    "damaged; remove the events after the gap"
                )
            content: dict[str, bytes] = {}
            run_concurrently(
                lambda name: content.update({name: client.get(f"{events}/{name}") or b""}), later
            )
            with open(self.path, "ab") as copy:
                copy.writelines(content[name] + b"\n" for name in later)
        return count + len(later)

    def _append_object(self, bucket: Bucket, line: str) -> None:
        """Create the object of an event, and append the event to the copy.

        Raises:
            SweepBusy: an event with this number exists, so another driver runs the sweep.
        """
        with self._copy_lock():  # else a reader could append the event to the copy first
            event = f"{self._prefix}/events/{_name(self._count + 1)}"
            if not bucket.client.put_once(event, line.encode()):
                raise SweepBusy(
                    f"another driver has continued this sweep ({event} exists), so this driver "
                    "stops; no result is lost"
                )
            append_line(self.path, line)
            self._count += 1

    def _copy_lock(self) -> FileLock:
        """Lock of the copy: its driver and readers of this machine append events."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return FileLock(self.folder / ".copy.lock", mode=lock_mode(self.folder))


def _name(number: int) -> str:
    return f"{number:08d}.json"


CHECKSUM = re.compile(rb', "crc": "(.{8})"}$')


def _line(event: dict[str, Any]) -> str:
    """An event as one line of JSON whose last field is the checksum of the rest."""
    bare = json.dumps(event, sort_keys=True, allow_nan=False)
    return f'{bare[:-1]}, "crc": "{zlib.crc32(bare.encode()):08x}"}}'


def parse_event(line: bytes) -> dict[str, Any]:
    """Parse a line of the log.

    Raises:
        ValueError: the line is damaged.
    """
    line = line.strip()
    checksum = CHECKSUM.search(line)
    if checksum is None:
        raise ValueError("it has no checksum")
    line = line[: checksum.start()] + b"}"
    if checksum[1] != b"%08x" % zlib.crc32(line):
        raise ValueError("its checksum does not match")
    event: dict[str, Any] = json.loads(line)
    return event


def append_line(path: Path, line: str) -> None:
    """Append a line to a file and sync it. After an error the file is unchanged.

    Raises:
        OSError: for example, the disk is full.
    """
    data = f"{line}\n".encode()
    with open(path, "ab", buffering=0) as handle:  # a buffer would delay the write and its error
        before = os.fstat(handle.fileno()).st_size
        try:
            while data:
                data = data[handle.write(data) :]
            os.fsync(handle.fileno())
            if before == 0:
                sync(path.parent)
        except OSError:  # without this, the next event would continue a partial line
            handle.truncate(before)
            raise


def drop_partial_line(path: Path) -> None:
    """Remove a partial last line, left by a killed writer. No other process may be writing."""
    if not path.exists():
        return
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        with open(path, "r+b") as handle:
            handle.truncate(end)

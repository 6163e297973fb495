"""What a sweep asked for and what became of it: an append-only log, written by the driver alone.

`status`, `table`, resume and the tracker are folds over it. In a bucket each event is an object
that is put once under its number, and `events.jsonl` this machine's copy (`BucketLedger`).
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from orchestrator.errors import RemoteAway, SweepBusy
from orchestrator.files import is_flocked, lock_mode, make_folders, sync
from orchestrator.store._leases import Lease
from orchestrator.store.backends import BucketBackend, FolderBackend
from orchestrator.store.buckets import side_by_side

# For tests: `event:7` kills the driver at its seventh event, `trial_done:2` at the second of these.
CRASH_AT = "AIRSWEEP_CRASH_AT"
LOOKED_AT = 0.5  # seconds: who asks whether a lock is held has it for a moment


EVENTS = "events.jsonl"


class EventLog:
    """`events.jsonl` in the folder of one sweep. Appending needs `lock()`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / EVENTS
        self._lock = FileLock(folder / ".driver.lock")
        self._seen = 0  # events that count for CRASH_AT

    def lock(self) -> None:
        """Become the only driver.

        Raises:
            SweepBusy: there is one already.
        """
        make_folders(self.folder)
        self._lock = FileLock(self._lock.lock_file, mode=lock_mode(self.folder))
        try:
            self._lock.acquire(timeout=LOOKED_AT)
        except Timeout:
            raise SweepBusy(
                f"another driver runs this sweep ({self._lock.lock_file} is held); "
                "wait for it, or stop it"
            ) from None
        mend_lines(self.path)

    def unlock(self) -> None:
        self._lock.release()

    def refresh(self) -> None:
        """Bring the copy of this machine up to date, where it is one."""

    def busy(self) -> bool:
        """Does a driver hold the sweep's lock?"""
        return is_flocked(Path(self._lock.lock_file))

    def append(self, event: str, **fields: Any) -> float:
        """One event, on disk before this returns.

        Returns:
            When it was, in seconds since the epoch, as the event says too.
        """
        now = round(time.time(), 3)
        self._write(_line({"event": event, "time": now, **fields}))
        self._crash(event)
        return now

    def _write(self, line: str) -> None:
        append_line(self.path, line)

    def _crash(self, event: str) -> None:
        name, _, count = os.environ.get(CRASH_AT, "").partition(":")
        if name in ("event", event):
            self._seen += 1
            if self._seen == int(count):
                os.kill(os.getpid(), signal.SIGKILL)

    def events(self) -> Iterator[dict[str, Any]]:
        """All events in order. A last line that a kill cut off is left out.

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
                        raise ValueError(f"{self.path}:{number}: {problem}; {REMEDY}") from None


# Where the store is in a bucket the file is a copy.
REMEDY = "remove this line; results stay in the store (in a bucket: remove this file, a copy)"
CHECKSUM = re.compile(rb', "crc": "(.{8})"}$')


def _line(event: dict[str, Any]) -> str:
    """An event as one line of JSON whose last field is the checksum of the rest."""
    bare = json.dumps(event, sort_keys=True, allow_nan=False)
    return f'{bare[:-1]}, "crc": "{zlib.crc32(bare.encode()):08x}"}}'


def parse_event(line: bytes) -> dict[str, Any]:
    """The event of a line. Lines without a checksum are of an earlier version.

    Raises:
        ValueError: the line is damaged.
    """
    line = line.strip()
    found = CHECKSUM.search(line)
    if found is not None:
        line = line[: found.start()] + b"}"
        if found[1] != b"%08x" % zlib.crc32(line):
            raise ValueError("its checksum does not fit")
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        raise ValueError("not an event")
    return event


class BucketLedger(EventLog):
    """A ledger of a store in a bucket."""

    def __init__(self, folder: Path, backend: BucketBackend) -> None:
        super().__init__(folder)
        self.backend = backend
        self.place = backend.object(folder)
        self.lease = Lease(backend.remote, f"{self.place}/driver.lock")
        self._count: int | None = None  # events in the copy, while we are the driver

    def lock(self) -> None:
        super().lock()
        try:
            if not self.lease.acquire():
                raise SweepBusy(
                    f"another driver runs this sweep ({self.backend.label(self.folder)}/driver.lock"
                    " is renewed); wait for it, or stop it"
                )
            with self._alone():
                self._count = self._bring()
        except BaseException:
            super().unlock()
            raise

    def unlock(self) -> None:
        with suppress(RemoteAway):  # the lock dies with us
            self._count = None
            self.lease.release()
        super().unlock()

    def refresh(self) -> None:
        with self._alone():
            mend_lines(self.path)
            self._bring()

    def busy(self) -> bool:
        return super().busy() or self.lease.held()

    def _write(self, line: str) -> None:
        """Put an event under its number, and append it to the copy.

        Raises:
            SweepBusy: there is one of that number, so somebody else drives this sweep.
        """
        assert self._count is not None, "only the driver appends"
        with self._alone():  # else a reader would bring it before we have written it
            event = f"{self.place}/{_event(self._count + 1)}"
            if not self.backend.remote.put_once(event, line.encode()):
                raise SweepBusy(
                    f"another driver has gone on with this sweep ({event} exists): this one ends, "
                    "and nothing is lost"
                )
            super()._write(line)
            self._count += 1

    def _alone(self) -> FileLock:
        """Readers of this machine bring events while a driver of it appends."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return FileLock(self.folder / ".copy.lock", mode=lock_mode(self.folder))

    def _bring(self) -> int:
        """Append to the copy the events that it lacks; how many it has then."""
        remote, events = self.backend.remote, f"{self.place}/events"
        count = self.path.read_bytes().count(b"\n") if self.path.exists() else 0
        later = [one.name for one in remote.listed(events, after=_name(count))]
        found: dict[str, bytes | None] = {}
        side_by_side(lambda name: found.update({name: remote.get(f"{events}/{name}")}), later)
        with open(self.path, "ab") as copy:
            for number, name in enumerate(later, count + 1):
                event = found[name]
                if name != _name(number) or event is None:
                    raise ValueError(
                        f"{remote}/{self.place}/{_event(number)} is missing, but {name} is there: "
                        "the ledger is damaged; remove what comes after the gap"
                    )
                copy.write(event + b"\n")
        return count + len(later)


def open_event_log(folder: Path, backend: FolderBackend) -> EventLog:
    """The ledger of the sweep that has this folder of a store."""
    return BucketLedger(folder, backend) if isinstance(backend, BucketBackend) else EventLog(folder)


def _name(number: int) -> str:
    return f"{number:08d}.json"


def _event(number: int) -> str:
    return f"events/{_name(number)}"


def append_line(path: Path, line: str) -> None:
    """One line at the end of a file, on disk before this returns, or an error and nothing of it.

    Raises:
        OSError: there is no room for it, say.
    """
    data = f"{line}\n".encode()
    with open(path, "ab", buffering=0) as handle:  # what a buffer holds would be written later
        before = os.fstat(handle.fileno()).st_size
        try:
            while data:
                data = data[handle.write(data) :]
            os.fsync(handle.fileno())
            if before == 0:
                sync(path.parent)
        except OSError:  # a full disk takes half a line; the next one would be glued to it
            handle.truncate(before)
            raise


def mend_lines(path: Path) -> None:
    """Cut off half a last line that a killed writer left. Only while nobody writes."""
    if not path.exists():
        return
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with open(path, "r+b") as handle:
            handle.truncate(whole)

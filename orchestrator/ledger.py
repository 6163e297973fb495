"""What a sweep asked for and what became of it: an append-only log, written by the driver alone.

`status`, `table`, resume and the tracker are folds over it.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

# For tests: `event:7` kills the driver at its seventh event, `trial_done:2` at the second of these.
CRASH_AT = "AIRSWEEP_CRASH_AT"


class SweepBusy(RuntimeError):
    """Another driver runs this sweep."""


class Ledger:
    """`events.jsonl` of one sweep. Appending needs `lock()`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "events.jsonl"
        self._lock = FileLock(folder / ".driver.lock")
        self._seen = 0  # events that count for CRASH_AT

    def lock(self) -> None:
        """Become the only driver.

        Raises:
            SweepBusy: there is one already.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise SweepBusy(
                f"another driver runs this sweep ({self._lock.lock_file} is held); "
                "wait for it, or stop it"
            ) from None
        mend_lines(self.path)

    def unlock(self) -> None:
        self._lock.release()

    def busy(self) -> bool:
        """Does a driver hold the sweep's lock?"""
        try:
            with FileLock(self._lock.lock_file).acquire(timeout=0):
                return False
        except Timeout:
            return True

    def append(self, event: str, **fields: Any) -> float:
        """One event, on disk before this returns.

        Returns:
            When it was, in seconds since the epoch, as the event says too.
        """
        now = round(time.time(), 3)
        line = json.dumps({"event": event, "time": now, **fields}, sort_keys=True, allow_nan=False)
        append_line(self.path, line)
        self._crash(event)
        return now

    def _crash(self, event: str) -> None:
        name, _, count = os.environ.get(CRASH_AT, "").partition(":")
        if name in ("event", event):
            self._seen += 1
            if self._seen == int(count):
                os.kill(os.getpid(), signal.SIGKILL)

    def events(self) -> Iterator[dict[str, Any]]:
        """All events in order. A last line that a kill cut off is left out."""
        if not self.path.exists():
            return
        with open(self.path, encoding="utf-8") as handle:
            for line in handle:
                if line.endswith("\n"):
                    yield json.loads(line)


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

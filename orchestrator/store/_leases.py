"""Leases: locks that are objects of a bucket."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import psutil

from orchestrator.errors import BucketUnreachable
from orchestrator.store.buckets import POLL, BucketClient, VersionedObject

if TYPE_CHECKING:
    from obstore import UpdateVersion

LOCK_SECONDS = "AIRSWEEP_LOCK_SECONDS"  # a lease that was not renewed for so long has expired


class Lease:
    """A lock that its holder renews periodically. A lease that is not renewed expires.

    A waiting process measures the time since the last renewal with its own clock. After an expiry
    two processes may hold the lease for a moment, so it only avoids duplicate work; correctness
    must not depend on it.
    """

    def __init__(self, client: BucketClient, name: str) -> None:
        self.client, self.name = client, name
        self.timeout = float(os.environ.get(LOCK_SECONDS) or 60)
        self._id = uuid.uuid4().hex
        self._version: UpdateVersion | None = None
        self._renewals = 0
        self._stop = threading.Event()
        self._writing = threading.Lock()  # a renewal and a release exclude each other

    def acquire(self, on_wait: Callable[[float], None] | None = None) -> bool:
        """Take the lease as soon as it is free or expired.

        Args:
            on_wait: called repeatedly with the seconds waited. None: return as soon as the lease
                turns out to have an active holder.

        Returns:
            False: another process holds and renews the lease.
        """
        started = seen_since = time.monotonic()
        seen: UpdateVersion | None = None
        while (version := self._put("create")) is None:
            current = self.client.get_versioned(self.name)
            if current is not None:
                if current.version != seen:
                    if seen is not None and on_wait is None:
                        return False
                    seen, seen_since = current.version, time.monotonic()
                if _is_dead(current) or time.monotonic() - seen_since > self.timeout:
                    version = self._put(current.version)
            if version is not None:
                break
            if on_wait is not None:
                on_wait(time.monotonic() - started)
            time.sleep(POLL)
        self._version = version
        threading.Thread(target=self._renew, args=(self._stop,), daemon=True).start()
        return True

    def is_held(self) -> bool:
        """Whether a process holds the lease, judged by the clock of this machine."""
        current = self.client.get_versioned(self.name)
        return (
            current is not None
            and time.time() - current.modified <= self.timeout
            and not _is_dead(current)
        )

    def release(self) -> None:
        self._stop.set()
        with self._writing:
            version, self._version = self._version, None
            # A bucket cannot delete an object on the condition of its version. Other processes
            # do not take a lease that was just renewed, so renew it first, then delete it.
            if version is not None and self._put(version) is not None:
                self.client.delete(self.name)
        self._stop = threading.Event()

    def _put(self, condition: UpdateVersion | Literal["create"]) -> UpdateVersion | None:
        """Create the lease or replace one version of it. None: another process has it."""
        return self.client.put_if(self.name, self._content(), condition)

    def _content(self) -> bytes:
        self._renewals += 1  # the content, and with it the ETag, of each version is different
        content = {
            "by": self._id,
            "renewed": self._renewals,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "machine": _machine(),
        }
        return json.dumps(content).encode()

    def _renew(self, stop: threading.Event) -> None:
        while not stop.wait(self.timeout / 4):
            with self._writing:
                if self._version is None:
                    return  # released, or taken over after an expiry
                with suppress(BucketUnreachable):  # the next renewal may succeed
                    self._version = self._put(self._version)


def _is_dead(current: VersionedObject) -> bool:
    """Whether the holder is a process of this machine that has ended."""
    try:
        holder = json.loads(current.data)
    except ValueError:
        return False
    return holder["machine"] == _machine() and not psutil.pid_exists(holder["pid"])


@cache
def _machine() -> str:
    """Identifies the scope of process ids: containers may share a host name, but not this."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return uuid.uuid4().hex

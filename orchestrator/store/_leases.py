"""Leases: locks as objects of a bucket."""

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
from typing import TYPE_CHECKING

from orchestrator.errors import RemoteAway
from orchestrator.store.buckets import POLL, Content, Remote

if TYPE_CHECKING:
    from obstore import UpdateVersion

LOCK_SECONDS = "AIRSWEEP_LOCK_SECONDS"  # after which a silent holder counts as dead


class Lease:
    """A lock as an object. Its holder renews it; one that is silent for long counts as dead.

    Silence is measured from the first look at it, by the clock of who looks. Two may come to hold
    it after a long silence, so it saves work and nothing else may depend on it.
    """

    def __init__(self, remote: Remote, name: str) -> None:
        self.remote, self.name = remote, name
        self.patience = float(os.environ.get(LOCK_SECONDS) or 60)  # seconds
        self._me = uuid.uuid4().hex
        self._version: UpdateVersion | None = None
        self._renewals = 0
        self._over = threading.Event()
        self._asking = threading.Lock()  # a renewal and a release do not cross

    def acquire(self, waits: Callable[[float], None] | None = None) -> bool:
        """Take it as soon as nobody holds it, or its holder is dead.

        Args:
            waits: called with the seconds so far, again and again. None: do not wait for a holder
                that lives.

        Returns:
            False: the holder has renewed it.
        """
        started = seen_since = time.monotonic()
        seen: UpdateVersion | None = None
        while (version := self.remote.put_if(self.name, self._content(), "create")) is None:
            found = self.remote.versioned(self.name)
            if found is not None and self._is_own(found):
                version = found.version
            elif found is not None:
                if found.version != seen:
                    if seen is not None and waits is None:
                        return False
                    seen, seen_since = found.version, time.monotonic()
                if _is_dead(found) or time.monotonic() - seen_since > self.patience:
                    version = self._put_over(found.version)
            if version is not None:
                break
            if waits is not None:
                waits(time.monotonic() - started)
            time.sleep(POLL)
        self._version = version
        threading.Thread(target=self._renew, args=(self._over,), daemon=True).start()
        return True

    def held(self) -> bool:
        """Does somebody alive hold it, as far as the clock of this machine can tell?"""
        found = self.remote.versioned(self.name)
        return (
            found is not None
            and time.time() - found.changed <= self.patience
            and not _is_dead(found)
        )

    def release(self) -> None:
        self._over.set()
        with self._asking:
            version, self._version = self._version, None
            # Buckets cannot delete one version. Nobody takes a lease that was just renewed, so
            # what is deleted is ours.
            if version is not None and self._put_over(version) is not None:
                self.remote.delete(self.name)
        self._over = threading.Event()

    def _put_over(self, version: UpdateVersion) -> UpdateVersion | None:
        """Renew it, or take it from the dead; its new version. None: another has it."""
        new = self.remote.put_if(self.name, self._content(), version)
        if new is None:
            found = self.remote.versioned(self.name)
            new = found.version if found is not None and self._is_own(found) else None
        return new

    def _is_own(self, found: Content) -> bool:
        """Did we write it?

        A write may succeed although its answer is lost. obstore then sends it again, and the
        server refuses it because of our own version.
        """
        with suppress(ValueError, KeyError, TypeError):
            return bool(json.loads(found.data)["by"] == self._me)
        return False

    def _content(self) -> bytes:
        self._renewals += 1  # each version has a tag of its own
        said = {"by": self._me, "renewed": self._renewals, "pid": os.getpid()}
        return json.dumps({**said, "host": socket.gethostname(), "machine": _machine()}).encode()

    def _renew(self, over: threading.Event) -> None:
        while not over.wait(self.patience / 4):
            with self._asking:
                if self._version is None:
                    return  # released in this moment, or somebody took us for dead
                with suppress(RemoteAway):  # the next time, perhaps
                    self._version = self._put_over(self._version)


def _is_dead(found: Content) -> bool:
    """Is the holder a process of this machine that has ended?"""
    try:
        who = json.loads(found.data)
    except ValueError:
        return False
    return who["machine"] == _machine() and not _alive(who["pid"])


@cache
def _machine() -> str:
    """Where a process id means the same: containers may share a host's name. Else nowhere."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return uuid.uuid4().hex


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

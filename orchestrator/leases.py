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

from orchestrator.remote import POLL, Content, Remote, RemoteAway

if TYPE_CHECKING:
    from obstore import UpdateVersion

LOCK_SECONDS = "AIRSWEEP_LOCK_SECONDS"  # after which a silent holder counts as dead


class Lease:
    """A lock as an object. Its holder renews it; one that has been silent for long is dead.

    Its age is read off the server's clock alone. Two may come to hold it after a long silence, so
    it saves work and nothing else may depend on it.
    """

    def __init__(self, remote: Remote, name: str) -> None:
        self.remote, self.name = remote, name
        self.patience = float(os.environ.get(LOCK_SECONDS) or 60)  # seconds
        self._me = uuid.uuid4().hex
        self._version: UpdateVersion | None = None
        self._renewals = 0
        self._ahead: float | None = None  # seconds of the server's clock before ours
        self._over = threading.Event()
        self._asking = threading.Lock()  # a renewal and a release do not cross

    def take(self) -> bool:
        """Take it if it is free, or its holder dead."""
        version = self.remote.put_if(self.name, self._content(), "create")
        if version is None and (found := self.remote.versioned(self.name)) is not None:
            if self._is_own(found):
                version = found.version
            elif self._is_dead(found, self._now()):
                version = self._put_over(found.version)
        if version is None:
            return False
        self._version = version
        threading.Thread(target=self._renew, args=(self._over,), daemon=True).start()
        return True

    def wait(self, told: Callable[[float], None] = lambda seconds: None) -> None:
        """Take it as soon as it can be had.

        Args:
            told: seconds so far, again and again.
        """
        started = time.monotonic()
        while not self.take():
            told(time.monotonic() - started)
            time.sleep(POLL)

    def take_from_the_dead(self) -> bool:
        """Take it, where need be after its holder has been silent for long enough to be dead.

        Returns:
            False: the holder has renewed it.
        """
        held = self.remote.versioned(self.name)
        while not self.take():
            now = self.remote.versioned(self.name)
            if held is not None and now is not None and held.version != now.version:
                return False
            held = now
            time.sleep(POLL)
        return True

    def held(self) -> bool:
        """Does somebody alive hold it, as far as the clock of this machine can tell?"""
        found = self.remote.versioned(self.name)
        return found is not None and not self._is_dead(found, time.time())

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

    def _now(self) -> float:
        """By the server's clock, which is asked once: renewals are dated by it."""
        if self._ahead is None:
            self._ahead = self.remote.clock() - time.time()
        return time.time() + self._ahead

    def _is_dead(self, found: Content, now: float) -> bool:
        if now - found.changed > self.patience:
            return True
        try:
            who = json.loads(found.data)
        except ValueError:
            return False
        return who["machine"] == _machine() and not _alive(who["pid"])

    def _renew(self, over: threading.Event) -> None:
        while not over.wait(self.patience / 4):
            with self._asking:
                if self._version is None:
                    return  # released in this moment, or somebody took us for dead
                with suppress(RemoteAway):  # the next time, perhaps
                    self._version = self._put_over(self._version)


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

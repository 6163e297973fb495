"""File locks: one builder per artifact, and users of a store against `cache gc`.

Locks only avoid duplicate work; correctness does not depend on them.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from orchestrator.errors import StoreRefused
from orchestrator.files import hold_flock, is_flocked
from orchestrator.store._leases import Lease
from orchestrator.store.storage import RECORD, Bucket, Folder

LOCKS = "locks"  # folder
OnWait = Callable[[str, str, float], None]  # called with lock name, holder and seconds waited
STORE_LOCK = f"{LOCKS}/store"  # sweeps hold it shared, `cache gc` exclusively
MAX_PAUSE = 0.25  # seconds between two attempts to acquire a lock
UNNAMED = "another process"


class Locks:
    """The locks of one store."""

    def __init__(self, storage: Folder | Bucket) -> None:
        self.storage, self.root = storage, storage.root
        # Called repeatedly while `exclusive` waits.
        self.on_wait: OnWait = lambda name, holder, seconds: None

    @contextmanager
    def exclusive(self, name: str) -> Iterator[None]:
        """Hold the lock `name`. After waiting for it, check whether the work is already done.

        The lock of a dead process is free at once. Without locks in the file system, `exclusive`
        does not wait: two processes may then do the same work, and each result is still published
        by a rename.
        """
        lock = self.root / LOCKS / name
        with ExitStack() as stack:
            with suppress(OSError):
                self._acquire(lock, stack)
                with suppress(OSError):  # for example a full disk
                    sweep = os.environ.get("AIRSWEEP_SWEEP", UNNAMED)
                    lock.write_text(f"{sweep} ({socket.gethostname()}, process {os.getpid()})")
            if isinstance(self.storage, Bucket):
                lease = Lease(self.storage.client, f"{LOCKS}/{name}")
                lease.acquire(lambda seconds: self.on_wait(name, "another machine", seconds))
                stack.callback(lease.release)
                self.storage.refresh_listings()
            yield
            with suppress(OSError):  # waiting processes have the file open and are not disturbed
                lock.unlink()

    def _acquire(self, lock: Path, stack: ExitStack) -> None:
        started, pause = time.monotonic(), 0.01
        while True:
            try:
                stack.enter_context(hold_flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB))
                return
            except BlockingIOError:
                self.on_wait(lock.name, _holder_in(lock), time.monotonic() - started)
                time.sleep(pause)
                pause = min(2 * pause, MAX_PAUSE)

    def holder(self, digest: str) -> str:
        """Sweep, host and process that build an artifact now; empty: none, or not known.

        Args:
            digest: of the artifact's key; its first 12 digits suffice.
        """
        for lock in (self.root / LOCKS).glob(f"{digest}*"):
            with suppress(OSError):
                if is_flocked(lock):  # a killed process leaves the file, but not the lock
                    return _holder_in(lock)
        return ""

    def shared_store(self) -> ExitStack:
        """Prevent `exclusive_store` until the returned stack is closed.

        Raises:
            StoreRefused: `cache gc` holds the store exclusively.
        """
        stack = ExitStack()
        try:
            stack.enter_context(hold_flock(self.root / STORE_LOCK, fcntl.LOCK_SH | fcntl.LOCK_NB))
        except BlockingIOError:
            raise StoreRefused(
                f"`airsweep cache gc` is removing artifacts from {self.root}: wait until it ends"
            ) from None
        except OSError:  # no locks in this file system, so `exclusive_store` is refused too
            pass
        return stack

    @contextmanager
    def exclusive_store(self) -> Iterator[None]:
        """Hold the store while no other process uses it.

        Raises:
            StoreRefused: another process uses the store, or the file system has no locks.
        """
        if isinstance(self.storage, Bucket):
            raise StoreRefused(
                f"{self.storage.name}: airsweep removes nothing from a bucket, because it cannot "
                "lock out running sweeps; `airsweep cache ls` lists what no sweep needs: while no "
                f"sweep runs, remove the {RECORD} of an artifact first, then its other objects, "
                "with the tools of your storage"
            )
        with ExitStack() as stack:
            try:
                stack.enter_context(
                    hold_flock(self.root / STORE_LOCK, fcntl.LOCK_EX | fcntl.LOCK_NB)
                )
            except BlockingIOError:
                raise StoreRefused(
                    f"a sweep runs in {self.root}; wait for it, or stop it"
                ) from None
            except OSError as problem:
                raise StoreRefused(
                    f"{self.root / STORE_LOCK} cannot be locked ({problem.strerror}), so airsweep "
                    "cannot check whether a sweep runs; try on the machine that has the disk"
                ) from None
            yield


def _holder_in(lock: Path) -> str:
    try:
        return lock.read_text() or UNNAMED
    except OSError:
        return UNNAMED

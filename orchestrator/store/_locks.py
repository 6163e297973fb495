"""Who makes what, and who uses a store. A lock saves work; what is right never hangs on it."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from orchestrator.errors import StoreRefused
from orchestrator.files import flocked, is_flocked
from orchestrator.store.backends import LOCKS, FolderBackend, Waits

STORE_LOCK = f"{LOCKS}/store"  # shared by who uses the store, taken whole by who removes from it
LOOK_EVERY = 0.25  # seconds between two looks at a lock that somebody has


def _silent(name: str, holder: str, seconds: float) -> None:
    pass


class Locks:
    """Of one store."""

    def __init__(self, backend: FolderBackend) -> None:
        self.backend, self.root = backend, backend.root
        self.waits: Waits = _silent  # called again and again while `turn` waits

    @contextmanager
    def turn(self, name: str) -> Iterator[None]:
        """Waits until nobody else makes `name`; then look again whether it is there.

        The lock of a dead process is free at once. Where the file system has no locks nobody
        waits: two then do the same work, and each part of it is still renamed into place whole.
        """
        place = self.root / LOCKS / name
        with ExitStack() as held:
            with suppress(OSError):
                self._take(place, held)
                with suppress(OSError):  # no room, say
                    place.write_text(_me())
            held.enter_context(self.backend.turn(name, self.waits))
            yield
            with suppress(OSError):  # who waits has the file open, and will find the work done
                place.unlink()

    def _take(self, place: Path, held: ExitStack) -> None:
        started, pause = time.monotonic(), 0.01
        while True:
            try:
                held.enter_context(flocked(place, fcntl.LOCK_EX | fcntl.LOCK_NB))
                return
            except BlockingIOError:
                self.waits(place.name, _said_by(place), time.monotonic() - started)
                time.sleep(pause)
                pause = min(2 * pause, LOOK_EVERY)

    def holder(self, digest: str) -> str:
        """Who makes an artifact now: sweep, host, process; empty: nobody, or it cannot be told.

        Args:
            digest: of its key; the first 12 digits will do.
        """
        for place in (self.root / LOCKS).glob(f"{digest}*"):
            with suppress(OSError):
                if is_flocked(place):  # else what a killed process has left
                    return _said_by(place)
        return ""

    def use(self) -> ExitStack:
        """Keeps others from having the store to themselves, until it is closed.

        Raises:
            StoreRefused: somebody has, to remove what no sweep needs.
        """
        held = ExitStack()
        try:
            held.enter_context(flocked(self.root / STORE_LOCK, fcntl.LOCK_SH | fcntl.LOCK_NB))
        except BlockingIOError:
            raise StoreRefused(
                f"`airsweep cache gc` removes artifacts from {self.root} now: wait for its end"
            ) from None
        except OSError:  # no locks here: then nobody can have it to himself either
            pass
        return held

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else uses the store meanwhile.

        Raises:
            StoreRefused: somebody does, or it cannot be told.
        """
        self.backend.refuse_removal()
        with ExitStack() as held:
            try:
                held.enter_context(flocked(self.root / STORE_LOCK, fcntl.LOCK_EX | fcntl.LOCK_NB))
            except BlockingIOError:
                raise StoreRefused(
                    f"a sweep runs in {self.root}; wait for it, or stop it"
                ) from None
            except OSError as problem:
                raise StoreRefused(
                    f"{self.root / STORE_LOCK} cannot be locked ({problem.strerror}), so it cannot "
                    "be told whether a sweep runs; try on the machine that holds the folder"
                ) from None
            yield


def _me() -> str:
    sweep = os.environ.get("AIRSWEEP_SWEEP", "somebody")
    return f"{sweep} ({socket.gethostname()}, process {os.getpid()})"


def _said_by(lock: Path) -> str:
    try:
        return lock.read_text() or "somebody"
    except OSError:
        return "somebody"

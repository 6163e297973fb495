"""Who makes what, and who uses a store. A lock saves work; what is right never hangs on it."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from orchestrator.files import flocked, is_flocked
from orchestrator.mirror import Mirror
from orchestrator.remote import Lease

LOCKS = "locks"  # folder
STORE_LOCK = f"{LOCKS}/store"  # shared by who uses the store, taken whole by who removes from it
LOOK_EVERY = 0.25  # seconds between two looks at a lock that somebody has


class StoreRefused(RuntimeError):
    """The store cannot be used: another version made it, or somebody has it to himself now."""


def _silent(name: str, holder: str, seconds: float) -> None:
    pass


class Locks:
    """Of one store."""

    def __init__(self, root: Path, mirror: Mirror | None) -> None:
        self.root, self.mirror = root, mirror
        # Told again and again while `turn` waits: its name, who has it, seconds so far.
        self.waits: Callable[[str, str, float], None] = _silent

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
            if self.mirror is not None:
                lease = Lease(self.mirror.remote, f"{LOCKS}/{name}")
                lease.wait(lambda seconds: self.waits(name, "another machine", seconds))
                held.callback(lease.release)
                self.mirror.look_again()
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
        if self.mirror is not None:  # nobody can have it to himself
            return held
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
        """Nobody else uses the store meanwhile; in a bucket that cannot be told.

        Raises:
            StoreRefused: somebody does, or it cannot be told.
        """
        assert self.mirror is None
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

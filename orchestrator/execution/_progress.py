"""How far work on the cluster is: an actor that workers write to and the driver reads."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import ray
from ray.exceptions import RayError

from orchestrator.execution._allocation import Pool
from orchestrator.failures import Failure
from orchestrator.planning import Requirement

EVERY = 1.0  # seconds between two reads, and between two notes on one piece of work
WAITS_FOR = 5.0  # seconds: a longer wait for another process is shown
QUIET_FOR = 15.0  # seconds: work that ends sooner is not shown
WHOLE = 100


class Watcher(Protocol):
    """Is told what is being prepared and how far trials are."""

    stage: str  # that is being prepared

    def prepared(self, requirement: Requirement, seconds: float, facts: dict[str, Any]) -> None:
        """An artifact, or one shard of a row, is whole."""
        ...

    def failed(self, requirement: Requirement, failure: Failure) -> None:
        """It could not be made."""
        ...

    def retried(self, requirement: Requirement, failure: Failure) -> None:
        """It failed and is tried again."""
        ...

    def drew(self, pool: Pool) -> None:
        """A pool of generators is closed."""
        ...

    def progressed(self, name: str, done: int, total: int) -> None:
        """How far something long is."""
        ...

    def waiting(self, name: str, holder: str, seconds: float) -> None:
        """Another process makes it, or what it is made from; it was waited for so long."""
        ...


class Board:
    """An actor: the latest note on each piece of work, as a method of `Watcher` and arguments."""

    def __init__(self) -> None:
        self.state: dict[str, tuple[str, Any, Any]] = {}

    def write(self, name: str, kind: str, first: Any, second: Any) -> None:
        self.state[name] = (kind, first, second)

    def take(self) -> dict[str, tuple[str, Any, Any]]:
        """Notes since the last time."""
        taken, self.state = self.state, {}
        return taken


class Note:
    """Writes how far one piece of work is. May be called as often as wanted."""

    def __init__(self, board: Any, name: str) -> None:
        self.board, self.name = board, name
        self.last = time.monotonic() + QUIET_FOR - EVERY
        self.written = False
        self.last_wait = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.last > EVERY or (self.written and done == total):
            self.last, self.written = now, True
            self.board.write.remote(self.name, "progress", done, total)

    def share(self, done: float) -> None:
        """The same for a share in [0, 1]."""
        self(int(WHOLE * done), WHOLE)

    def waits(self, lock: str, holder: str, seconds: float) -> None:
        """Another process makes it, or what it is made from."""
        if seconds > WAITS_FOR and time.monotonic() - self.last_wait > EVERY:
            self.last_wait = time.monotonic()
            self.board.write.remote(self.name, "waiting", holder, seconds)


class Progress:
    """The driver's side: one for each run.

    Attributes:
        board: give it to the workers, for their `Note`s.
    """

    def __init__(self, watcher: Watcher) -> None:
        self.board = ray.remote(Board).options(num_cpus=0, max_restarts=-1).remote()
        self._watcher = watcher
        self._asked: Any = None
        self._last = 0.0

    def read(self) -> None:
        """Pass on the notes that came. Returns at once; reads at most once a second."""
        if self._asked is None:
            if time.monotonic() - self._last > EVERY:
                self._last = time.monotonic()
                self._asked = self.board.take.remote()
            return
        if not ray.wait([self._asked], timeout=0)[0]:
            return
        asked, self._asked = self._asked, None
        try:
            notes = ray.get(asked)
        except RayError:  # the actor's machine died: only progress is lost
            return
        pass_on: dict[str, Callable[..., None]] = {
            "progress": self._watcher.progressed,
            "waiting": self._watcher.waiting,
        }
        for name, (kind, *rest) in notes.items():
            pass_on[kind](name, *rest)

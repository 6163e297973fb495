"""Where work on the cluster writes how far it is, for the driver to read."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import ray
from ray.exceptions import RayError

EVERY = 1.0  # seconds between two looks, and between two notes on one piece of work
WAITS_FOR = 5.0  # seconds: who waits longer says for whom
QUIET_FOR = 15.0  # seconds: what is over by then is not worth a line
WHOLE = 100


class Teller(Protocol):
    """Is told what was noted."""

    def progress(self, name: str, done: int, total: int) -> None: ...

    def waiting(self, name: str, holder: str, seconds: float) -> None: ...


class Board:
    """An actor: the latest note on each piece of work, as the name of what to tell and the rest."""

    def __init__(self) -> None:
        self.state: dict[str, tuple[str, Any, Any]] = {}

    def write(self, name: str, kind: str, first: Any, second: Any) -> None:
        self.state[name] = (kind, first, second)

    def take(self) -> dict[str, tuple[str, Any, Any]]:
        """Notes since the last time."""
        taken, self.state = self.state, {}
        return taken


class Note:
    """One piece of work's side of a board. Call it as often as you like."""

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
        """The same where somebody else makes it, or what it is made from."""
        if seconds > WAITS_FOR and time.monotonic() - self.last_wait > EVERY:
            self.last_wait = time.monotonic()
            self.board.write.remote(self.name, "waiting", holder, seconds)


_boards: dict[tuple[str, str], Any] = {}  # one for each job that this process was


def _board() -> Any:
    """The job's one board: a process less to start for each stage. Whoever looks tells for all."""
    context = ray.get_runtime_context()
    job = (context.get_node_id(), context.get_job_id())
    if job not in _boards:
        _boards.clear()
        _boards[job] = ray.remote(Board).options(num_cpus=0, max_restarts=-1).remote()
    return _boards[job]


@contextmanager
def watched(teller: Teller) -> Iterator[Any]:
    """A board whose notes are passed on by a thread until the block is over."""
    board = _board()
    over = threading.Event()

    def look() -> None:
        try:
            notes = ray.get(board.take.remote(), timeout=QUIET_FOR)
        except RayError:  # its machine died: what is lost is how far something was
            return
        tell: dict[str, Callable[..., None]]
        tell = {"progress": teller.progress, "waiting": teller.waiting}
        for name, (kind, *rest) in notes.items():
            tell[kind](name, *rest)

    def watch() -> None:
        while not over.wait(EVERY):
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield board
        over.set()
        thread.join()
        look()
    finally:  # who is being stopped does not wait for the last notes
        over.set()

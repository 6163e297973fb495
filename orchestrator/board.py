"""Where work on the cluster writes how far it is, for the driver to read."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray

EVERY = 1.0  # seconds between two looks, and between two notes on one piece of work
QUIET_FOR = 15.0  # seconds: what is over by then is not worth a line
WHOLE = 100


class Board:
    """An actor: the latest note on each piece of work."""

    def __init__(self) -> None:
        self.state: dict[str, tuple[int, int]] = {}

    def write(self, name: str, done: int, total: int) -> None:
        self.state[name] = (done, total)

    def take(self) -> dict[str, tuple[int, int]]:
        """Notes since the last time."""
        taken, self.state = self.state, {}
        return taken


class Note:
    """One piece of work's side of a board. Call it as often as you like."""

    def __init__(self, board: Any, name: str) -> None:
        self.board, self.name = board, name
        self.last = time.monotonic() + QUIET_FOR - EVERY
        self.written = False

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.last > EVERY or (self.written and done == total):
            self.last, self.written = now, True
            self.board.write.remote(self.name, done, total)

    def share(self, done: float) -> None:
        """The same for a share in [0, 1]."""
        self(int(WHOLE * done), WHOLE)


@contextmanager
def watched(progress: Callable[[str, int, int], None]) -> Iterator[Any]:
    """A board whose notes are passed on by a thread until the block is over."""
    board = ray.remote(Board).options(num_cpus=0).remote()
    over = threading.Event()

    def look() -> None:
        for name, (done, total) in ray.get(board.take.remote()).items():
            progress(name, done, total)

    def watch() -> None:
        while not over.wait(EVERY):
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield board
    finally:
        over.set()
        thread.join()
        look()

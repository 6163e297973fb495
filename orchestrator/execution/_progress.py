"""Progress of work on the cluster: workers report it to an actor, which the driver reads."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

if TYPE_CHECKING:  # `ProgressActor` is a process of its own, which should start fast
    from orchestrator.store.checkpoints import Curves

INTERVAL = 1.0  # seconds between two reads, and between two reports on one piece of work
MIN_RUNTIME = 15.0  # seconds: work that ends sooner is not reported
HEARTBEAT = 20.0  # seconds between two reports of a process that works
CURVES_INTERVAL = 10.0  # seconds between two reports of the curves of a trial


class ProgressActor:
    """Ray actor that keeps the latest report on each piece of work until the driver reads it, and
    the rows that the driver has released, until their stream ends."""

    def __init__(self) -> None:
        self.reports: dict[tuple[str, str], tuple[Any, ...]] = {}  # by name and kind
        self.rows: defaultdict[str, list[Mapping[str, Any]]] = defaultdict(list)  # by stream
        self.ended: set[str] = set()  # streams
        self.changed = asyncio.Condition()
        self.begun: set[str] = set()  # artifacts that a process makes, or has died of

    def write(self, name: str, kind: str, *arguments: Any) -> None:
        self.reports[name, kind] = arguments

    async def release(self, stream: str, row: Mapping[str, Any]) -> None:
        """Add a row to a stream."""
        async with self.changed:
            self.rows[stream].append(row)
            self.changed.notify_all()

    async def end(self, stream: str) -> None:
        """End a stream."""
        async with self.changed:
            self.ended.add(stream)
            self.rows.pop(stream, None)
            self.changed.notify_all()

    async def row(self, stream: str, number: int) -> Mapping[str, Any] | None:
        """Wait until a row of a stream is released, and return it; None: the stream has ended."""
        async with self.changed:
            await self.changed.wait_for(
                lambda: stream in self.ended or number < len(self.rows[stream])
            )
            return None if stream in self.ended else self.rows[stream][number]

    def begin(self, key: str) -> bool:
        """Whether the last process that began an artifact has not finished it, since it died."""
        has_died = key in self.begun
        self.begun.add(key)
        return has_died

    def finish(self, key: str) -> None:
        self.begun.discard(key)

    def take(self) -> dict[tuple[str, str], tuple[Any, ...]]:
        """Return the reports since the last call."""
        taken, self.reports = self.reports, {}
        return taken


class ProgressReporter:
    """Reports the progress of one piece of work. Calls may be frequent: most send nothing."""

    def __init__(self, actor: Any, name: str, unit: str = "") -> None:
        self.actor, self.name, self.unit = actor, name, unit
        self.last = time.monotonic() + MIN_RUNTIME - INTERVAL
        self.has_reported = False
        self.last_wait = 0.0
        self.started = time.time()
        self.last_curves = time.monotonic() + MIN_RUNTIME - CURVES_INTERVAL

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.last > INTERVAL or (self.has_reported and done == total):
            self.last, self.has_reported = now, True
            self.actor.write.remote(self.name, "progress", done, total, self.unit)

    def report_wait(self, lock: str, holder: str, seconds: float) -> None:
        """Report that another process holds the lock of this work, or of an input of it."""
        if time.monotonic() - self.last_wait > INTERVAL:
            self.last_wait = time.monotonic()
            self.actor.write.remote(self.name, "waiting", holder, seconds)

    def report_curves(self, curves: Curves) -> None:
        """Report the curves of a trial, with a value for each finished round."""
        if time.monotonic() - self.last_curves > CURVES_INTERVAL:
            self.last_curves = time.monotonic()
            self.actor.write.remote(self.name, "curves", curves, self.started)


@contextmanager
def report_working(actor: Any) -> Iterator[None]:
    """Report during the block that this process works, also where it makes no progress for long,
    as while it loads a model."""
    ended = threading.Event()

    def report() -> None:
        actor.write.remote("", "working")
        while not ended.wait(HEARTBEAT):
            actor.write.remote("", "working")

    threading.Thread(target=report, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


class ProgressMonitor:
    """Driver's side: starts the actor and reads its reports.

    Attributes:
        actor: workers need it for their `ProgressReporter`s.
    """

    def __init__(self) -> None:
        # On the driver's machine, which has the rows.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor = ray.remote(ProgressActor).options(num_cpus=0, scheduling_strategy=here)
        self.actor = actor.remote()
        self._pending: Any = None  # the call of `take` that has not returned
        self._last = 0.0

    def read(self) -> Mapping[tuple[str, str], tuple[Any, ...]]:
        """New reports by name and kind. Returns at once; reads at most once a second."""
        if self._pending is None:
            if time.monotonic() - self._last > INTERVAL:
                self._last = time.monotonic()
                self._pending = self.actor.take.remote()
            return {}
        if not ray.wait([self._pending], timeout=0)[0]:
            return {}
        pending, self._pending = self._pending, None
        try:
            return ray.get(pending)  # type: ignore[no-any-return]
        except RayError:  # the actor died: its streams fail, and are started again
            return {}

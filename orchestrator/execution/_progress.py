"""Progress of work on the cluster: workers report it to an actor, which the driver reads."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import ray
from ray.exceptions import RayError

from orchestrator.execution._allocation import PoolStatistics
from orchestrator.failures import Failure
from orchestrator.planning import Requirement

INTERVAL = 1.0  # seconds between two reads, and between two reports on one piece of work
MIN_WAIT = 5.0  # seconds: a shorter wait for another process is not reported
MIN_RUNTIME = 15.0  # seconds: work that ends sooner is not reported
FRACTION_STEPS = 100  # steps of a progress bar that shows a fraction


class ProgressListener(Protocol):
    """Receives the events of preparation and the progress of trials."""

    stage: str  # the stage that is being prepared

    def on_prepared(self, requirement: Requirement, seconds: float, facts: dict[str, Any]) -> None:
        """An artifact, or one shard of a row of images, is complete."""
        ...

    def on_failed(self, requirement: Requirement, failure: Failure) -> None:
        """An artifact could not be made, and is not tried again in this run."""
        ...

    def on_retried(self, requirement: Requirement, failure: Failure) -> None:
        """An artifact failed and is tried again."""
        ...

    def on_pool_closed(self, pool: PoolStatistics) -> None:
        """A pool of generators has ended."""
        ...

    def on_progress(self, name: str, done: int, total: int) -> None:
        """A long piece of work has advanced."""
        ...

    def on_waiting(self, name: str, holder: str, seconds: float) -> None:
        """A worker has waited this long for an artifact that another process makes."""
        ...


class ProgressActor:
    """Ray actor that keeps the latest report on each piece of work until the driver reads it."""

    def __init__(self) -> None:
        self.reports: dict[str, tuple[str, Any, Any]] = {}

    def write(self, name: str, kind: str, first: Any, second: Any) -> None:
        self.reports[name] = (kind, first, second)

    def take(self) -> dict[str, tuple[str, Any, Any]]:
        """Return the reports since the last call."""
        taken, self.reports = self.reports, {}
        return taken


class ProgressReporter:
    """Reports the progress of one piece of work. Calls may be frequent: most send nothing."""

    def __init__(self, actor: Any, name: str) -> None:
        self.actor, self.name = actor, name
        self.last = time.monotonic() + MIN_RUNTIME - INTERVAL
        self.has_reported = False
        self.last_wait = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.last > INTERVAL or (self.has_reported and done == total):
            self.last, self.has_reported = now, True
            self.actor.write.remote(self.name, "progress", done, total)

    def report_fraction(self, done: float) -> None:
        """Report progress as a fraction in [0, 1]."""
        self(int(FRACTION_STEPS * done), FRACTION_STEPS)

    def report_wait(self, lock: str, holder: str, seconds: float) -> None:
        """Report that another process holds the lock of this work, or of an input of it."""
        if seconds > MIN_WAIT and time.monotonic() - self.last_wait > INTERVAL:
            self.last_wait = time.monotonic()
            self.actor.write.remote(self.name, "waiting", holder, seconds)


class ProgressMonitor:
    """Driver's side: starts the actor and passes its reports to a listener.

    Attributes:
        actor: workers need it for their `ProgressReporter`s.
    """

    def __init__(self, listener: ProgressListener) -> None:
        self.actor = ray.remote(ProgressActor).options(num_cpus=0, max_restarts=-1).remote()
        self._listener = listener
        self._pending: Any = None  # the call of `take` that has not returned
        self._last = 0.0

    def read(self) -> None:
        """Pass new reports to the listener. Returns at once; reads at most once a second."""
        if self._pending is None:
            if time.monotonic() - self._last > INTERVAL:
                self._last = time.monotonic()
                self._pending = self.actor.take.remote()
            return
        if not ray.wait([self._pending], timeout=0)[0]:
            return
        pending, self._pending = self._pending, None
        try:
            reports = ray.get(pending)
        except RayError:  # the actor's machine died: only progress is lost
            return
        handlers: dict[str, Callable[..., None]] = {
            "progress": self._listener.on_progress,
            "waiting": self._listener.on_waiting,
        }
        for name, (kind, *arguments) in reports.items():
            handlers[kind](name, *arguments)

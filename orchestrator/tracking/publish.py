"""Sends outcomes to MLflow while a sweep runs. One thread writes, so that no training waits.

An MLflow that fails never fails a sweep. It is warned of once; at the end of the sweep all that
MLflow lacks is sent from the event log, and if it fails then, by `airsweep mlflow reconcile`.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.errors import TERMINATED, TrackerAway
from orchestrator.failures import first_line
from orchestrator.planning import Outcome
from orchestrator.redact import without_credentials
from orchestrator.spec import SweepSpec
from orchestrator.store import SweepLocation
from orchestrator.store.artifacts import provenance
from orchestrator.tracking._child_runs import ChildRuns
from orchestrator.tracking.reconcile import status_of, sweep_run_of, sync
from orchestrator.tracking.types import Status, SweepRun, make_tracker
from orchestrator.tracking_uri import kind_of, uri_of

if TYPE_CHECKING:
    from orchestrator.tracking._mlflow import SweepTracker

log = logging.getLogger(__name__)

# Seconds before an MLflow that failed is called again. One that accepts a call and never replies
# holds the thread for half a minute each time.
PAUSE = 300.0


class Publisher:
    """Sends one sweep to MLflow, in the background.

    MLflow is imported for the first outcome, so a run that has none does not import it.

    Args:
        tracking_uri: of the command line; default: the sweep file's.
    """

    def __init__(self, sweep: SweepSpec, location: SweepLocation, tracking_uri: str | None) -> None:
        self.sweep, self.location, self.store = sweep, location, location.store
        self.given_uri = tracking_uri
        self.uri = uri_of(tracking_uri or sweep.tracking_uri, self.store.root)
        self.kind = kind_of(self.uri)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tracker")
        self._tracker: SweepTracker | None = None
        self._waiting: list[Future[bool]] = []
        self._paused_until = 0.0
        self._warned = False

    @cached_property
    def parent(self) -> SweepRun:
        """The sweep's run. The driver has put user and commit into the environment by then."""
        return sweep_run_of(self.sweep, self.location, provenance())

    @cached_property
    def _children(self) -> ChildRuns:
        return ChildRuns(self.sweep, self.parent, self.store)

    @property
    def in_store(self) -> bool:
        """Whether runs go to a file in the store's folder because nothing else was given."""
        given = os.environ.get("MLFLOW_TRACKING_URI")
        return not given and self.uri == uri_of(None, self.store.root)

    def check(self, reach: bool) -> None:
        """Before any work: does MLflow answer, and let us write?

        Args:
            reach: a server has to answer now.

        Raises:
            ValueError: it answers and refuses us.
            TrackerAway: it does not answer.
        """
        if self.kind != "http" or not reach:
            return
        try:
            make_tracker(self.uri, store=self.store.root, project=self.parent.project).check()
        except TrackerAway as away:
            raise TrackerAway(
                f"{away}; start it, give another --tracking-uri, or run with --tracking-uri none "
                f"and fill it later with `{self._remedy()}`"
            ) from away

    def trial(self, outcome: Outcome, at: float | None) -> None:
        """Send an outcome.

        Args:
            at: when the event log noted it; None: before this run, so it is sent with the end.
        """
        if self.kind != "none":
            self._waiting = [one for one in self._waiting if not one.done()]
            self._waiting.append(self._thread.submit(self._trial, outcome, at))

    def catch_up(self) -> None:
        """Wait until all outcomes were sent. Once the event log says that the sweep has ended, no
        later run sends what is left."""
        wait(self._waiting)

    def finish(self, code: int) -> None:
        """Send the end of the sweep, with all that MLflow lacks.

        A driver that is being terminated has seconds: the sweep's run is ended without a note, and
        the next run sends the rest.
        """
        status, hasty = status_of(code), code == TERMINATED
        if self.kind == "none":
            complete = True
        elif hasty:
            cancelled = sum(one.cancel() for one in self._waiting)
            last = self._thread.submit(self._close, status)
            complete = last.result() and not cancelled
        else:
            complete = self._thread.submit(self._sync, status).result()
        self._thread.shutdown()
        if not complete:
            log.warning(
                "%s lacks a part of this sweep; nothing is lost: %s",
                without_credentials(self.uri),
                "the next run sends it" if hasty else f"run `{self._remedy()}` when it answers",
            )

    def _remedy(self) -> str:
        return reconcile_command(self.parent, self.store.name, self.given_uri)

    def _trial(self, outcome: Outcome, at: float | None) -> bool:
        setting = self._children.completed_setting(outcome)
        if at is None:
            return True
        runs = [self._children.trial(outcome, at, provenance()), *([setting] if setting else [])]
        return self._call(lambda tracker: [tracker.send(run) for run in runs])

    def _close(self, status: Status) -> bool:
        # To open MLflow would take too long.
        return self._tracker is not None and self._call(lambda tracker: tracker.finish(status))

    def _sync(self, status: Status) -> bool:
        self._paused_until = 0.0
        return self._call(lambda tracker: sync(self.sweep, self.location, tracker, status))

    def _call(self, work: Callable[[SweepTracker], object]) -> bool:
        """Do something with MLflow; return whether it was done."""
        if time.monotonic() < self._paused_until:
            return False
        try:
            if self._tracker is None:
                location = make_tracker(
                    self.uri, store=self.store.root, project=self.parent.project
                )
                self._tracker = location.open(self.parent)
            work(self._tracker)
        except Exception as problem:  # whatever it is, the sweep's results are worth more
            # A call that failed may have done its work: what is there is looked up again.
            self._tracker = None
            self._paused_until = time.monotonic() + PAUSE
            if not self._warned:
                kind = "" if isinstance(problem, TrackerAway) else f"{type(problem).__name__}: "
                log.warning("%s%s; the sweep goes on without it", kind, first_line(problem))
            self._warned = True
            return False
        return True


def reconcile_command(parent: SweepRun, store: str, uri: str | None) -> str:
    """The command that sends MLflow what it lacks of a sweep."""
    name = parent.sweep if parent.project == "default" else f"{parent.project}/{parent.sweep}"
    location = [] if store == str(Path("runs").absolute()) else ["--store", store]
    tracker = ["--tracking-uri", without_credentials(uri)] if uri else []
    return " ".join(["airsweep mlflow reconcile", name, *location, *tracker])

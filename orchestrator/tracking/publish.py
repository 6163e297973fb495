"""Publishes outcomes to MLflow while a sweep runs, from a background thread.

An error of MLflow never fails a sweep. The publisher warns once, pauses, and at the end of the
sweep sends everything that MLflow lacks from the event log. If that fails too,
`airsweep mlflow reconcile` sends it later.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cached_property
from typing import TYPE_CHECKING

from orchestrator.errors import INTERRUPTED, TERMINATED, TrackerUnreachable
from orchestrator.failures import first_line
from orchestrator.planning import Outcome, Slot
from orchestrator.planning.requests import results_command
from orchestrator.redact import without_credentials
from orchestrator.spec import SweepSpec
from orchestrator.store import SweepLocation
from orchestrator.store.artifacts import provenance
from orchestrator.tracking._child_runs import ChildRuns
from orchestrator.tracking.reconcile import make_tracker, status_of, sweep_run_of, sync
from orchestrator.tracking.types import ChildRun, Status, SweepRun
from orchestrator.tracking_uri import effective_uri, uri_kind

if TYPE_CHECKING:
    from orchestrator.tracking._mlflow import SweepTracker

log = logging.getLogger(__name__)

# Seconds between a failed call and the next one. A server that accepts a request and never replies
# blocks the thread for half a minute per call.
PAUSE = 300.0


class Publisher:
    """Publishes one sweep to MLflow in a background thread: an `OutcomeTracker`.

    The first outcome imports MLflow, which takes seconds, so a run without outcomes does not.

    Args:
        tracking_uri: from the command line. Default: from the sweep file.
    """

    def __init__(self, sweep: SweepSpec, location: SweepLocation, tracking_uri: str | None) -> None:
        self.sweep, self.location, self.store = sweep, location, location.store
        self._given_uri = tracking_uri
        self.uri = effective_uri(tracking_uri or sweep.tracking_uri, self.store.root)
        self.kind = uri_kind(self.uri)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tracker")
        self._tracker: SweepTracker | None = None
        self._pending: list[Future[bool]] = []
        self._running: dict[str, ChildRun] = {}  # by slot, those that wait to be sent
        self._paused_until = 0.0
        self._warned = False

    @cached_property
    def sweep_run(self) -> SweepRun:
        """The sweep run. Read it after the driver has set user and commit in the environment."""
        return sweep_run_of(self.sweep, self.location, provenance())

    @cached_property
    def _children(self) -> ChildRuns:
        return ChildRuns(self.sweep, self.sweep_run, self.store)

    @property
    def in_store(self) -> bool:
        is_default = self.uri == effective_uri(None, self.store.root)
        return is_default and not os.environ.get("MLFLOW_TRACKING_URI")

    def check(self, reach: bool) -> None:
        if self.kind != "http" or not reach:
            return
        try:
            make_tracker(self.uri, store=self.store.root, project=self.sweep_run.project).check()
        except TrackerUnreachable as error:
            raise TrackerUnreachable(
                f"{error}; start it, give another --tracking-uri, or run with --tracking-uri none "
                f"and send the results later with `{self._reconcile_command()}`"
            ) from error

    def trial(self, outcome: Outcome, at: float | None) -> None:
        """Queue an outcome for sending. `finish` sends those that an earlier run logged."""
        if self.kind != "none":
            self._pending = [call for call in self._pending if not call.done()]
            self._pending.append(self._thread.submit(self._send_trial, outcome, at))

    def running(self, slot: Slot, curves: Mapping[str, Sequence[float]], started: float) -> None:
        """Queue the curves of a running trial for sending. They replace queued ones."""
        if self.kind == "none":
            return
        self._running[slot.id] = self._children.running(slot, curves, started, provenance())
        self._pending.append(self._thread.submit(self._send_running, slot.id))

    def catch_up(self) -> None:
        """Wait until the queue is empty.

        Call this before the event log records the end of the sweep: no later run sends the rest of
        an ended sweep.
        """
        wait(self._pending)

    def finish(self, code: int) -> None:
        """End the sweep run, and send everything that MLflow lacks.

        After SIGTERM only seconds remain, so the sweep run is ended without a note, and the next
        run of the sweep sends the rest.
        """
        status, terminated = status_of(code), code == TERMINATED
        is_untouched = self._tracker is None and not self._pending
        if self.kind == "none" or (code == INTERRUPTED and is_untouched):  # opening takes seconds
            complete = True
        elif terminated:
            cancelled = sum(call.cancel() for call in self._pending)
            closed = self._thread.submit(self._close, status).result()
            complete = closed and not cancelled
        else:
            complete = self._thread.submit(self._sync, status).result()
        self._thread.shutdown()
        if not complete:
            log.warning(
                "MLflow at %s lacks part of this sweep; the store has all results: %s",
                without_credentials(self.uri),
                "the next run sends the rest"
                if terminated
                else f"run `{self._reconcile_command()}` when MLflow answers again",
            )

    def _reconcile_command(self) -> str:
        uri = self._given_uri
        options = ["--tracking-uri", without_credentials(uri)] if uri else []
        return results_command("mlflow reconcile", self.location, *options)

    def _send_trial(self, outcome: Outcome, at: float | None) -> bool:
        setting = self._children.completed_setting(outcome)
        if at is None:
            return True
        runs = [self._children.trial(outcome, at, provenance()), *([setting] if setting else [])]
        return self._call(lambda tracker: [tracker.send(run) for run in runs])

    def _send_running(self, slot: str) -> bool:
        run = self._running.pop(slot, None)  # None: sent by an earlier call, with these curves
        return run is None or self._call(lambda tracker: tracker.send(run))

    def _close(self, status: Status) -> bool:
        # Opening MLflow would take too long.
        return self._tracker is not None and self._call(lambda tracker: tracker.finish(status))

    def _sync(self, status: Status) -> bool:
        self._paused_until = 0.0
        return self._call(lambda tracker: sync(self.sweep, self.location, tracker, status))

    def _call(self, work: Callable[[SweepTracker], object]) -> bool:
        """Call MLflow; return whether the call succeeded."""
        if time.monotonic() < self._paused_until:
            return False
        try:
            if self._tracker is None:
                mlflow = make_tracker(
                    self.uri, store=self.store.root, project=self.sweep_run.project
                )
                self._tracker = mlflow.open(self.sweep_run)
            work(self._tracker)
        except Exception as error:  # no error of the tracker may end the sweep
            # A failed call may have written its run, so the next call reads the runs again.
            self._tracker = None
            self._paused_until = time.monotonic() + PAUSE
            if not self._warned:
                kind = "" if isinstance(error, TrackerUnreachable) else f"{type(error).__name__}: "
                log.warning("%s%s; the sweep continues without it", kind, first_line(error))
            self._warned = True
            return False
        return True

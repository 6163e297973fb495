"""Outcomes on their way to the tracker: one thread writes, so that nothing waits for it.

A setting is told with the last of its trials; what is left of settings, with the end.

A tracker that fails never fails a sweep: what it lacks is said at the end, with the command that
tells it.
"""

from __future__ import annotations

import logging
import os
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.children import Children
from orchestrator.dispatch import Outcome
from orchestrator.points import Points
from orchestrator.store import ArtifactStore, maker
from orchestrator.sweep import SweepSpec
from orchestrator.tracking import (
    Status,
    SweepRun,
    Told,
    Tracker,
    TrackerAway,
    kind_of,
    make_tracker,
    uri_of,
    without_credentials,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from orchestrator.parent import Ending

log = logging.getLogger(__name__)


class Publisher:
    """Tells a tracker about one sweep, in the background.

    The tracker is opened by the first thing that is told, so a run that has nothing to say
    imports no tracker.

    Args:
        asked: a tracking uri of the command line, which the sweep file does not know.
    """

    def __init__(
        self, sweep: SweepSpec, parent: SweepRun, store: ArtifactStore, asked: str | None
    ) -> None:
        self.parent, self.store, self.asked = parent, store, asked
        self.uri = asked or sweep.tracking_uri
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tracker")
        self._tracker: Tracker | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="airsweep-")
        self._children = Children(sweep, parent, Path(self._folder.name), store)
        self._points = Points(sweep)
        self._waiting: list[Future[None]] = []
        self._troubled = 0  # outcomes that could not even be brought to the tracker

    @property
    def in_store(self) -> bool:
        """Nobody said where to track, so it is a file in the store's folder."""
        return (
            uri_of(self.uri, self.store.root)
            == uri_of(None, self.store.root)
            != (os.environ.get("MLFLOW_TRACKING_URI"))
        )

    def check(self, reach: bool) -> None:
        """Before any work: is there such a tracker, and does it answer?

        Args:
            reach: a server has to answer now.

        Raises:
            ValueError: no tracker is meant by this uri, or it lets us not in.
            TrackerAway: it does not answer.
        """
        if kind_of(uri_of(self.uri, self.store.root)) != "http" or not reach:
            return
        tracker = make_tracker(self.uri, store=self.store.root, project=self.parent.project)
        try:
            tracker.check()
        except TrackerAway as away:
            raise TrackerAway(
                f"{away}; start it, give another --tracking-uri, or run with --tracking-uri none "
                f"and tell it all later by `{self._remedy()}`"
            ) from away

    def trial(self, outcome: Outcome, at: float | None) -> None:
        """Tell an outcome.

        Args:
            at: when the ledger noted it; None: it did before.
        """
        self._waiting = [one for one in self._waiting if not one.done()]
        self._waiting.append(self._thread.submit(self._trial, outcome, at))

    def catch_up(self) -> None:
        """Wait until all outcomes were told: who is killed once the ledger says that the sweep
        has ended is followed by nobody who would tell them."""
        wait(self._waiting)

    def finish(
        self,
        status: Status,
        ending: Callable[[Path], Ending],
        hasty: bool = False,
    ) -> None:
        """Wait for all that was told, close the parent, and say what is missing.

        Args:
            ending: what there is to say of the whole sweep; is given a folder for its files, which
                is gone afterwards.
            hasty: who is being killed has seconds: the parent is closed without note and files, and
                what still waits is told by the next run.
        """
        if hasty:
            self._troubled += sum(one.cancel() for one in self._waiting)
        last = self._thread.submit(self._finish, status, ending, hasty)
        self._thread.shutdown(wait=True)
        self._folder.cleanup()
        told = last.result()
        missed = told.missed + self._troubled
        if missed or told.sweep == "missed":
            lacks = [f"{missed} outcome{'s' * (missed > 1)}"] if missed else []
            lacks += ["the end of the sweep"] if told.sweep == "missed" else []
            log.warning(
                "%s lacks %s; nothing is lost: %s",
                without_credentials(uri_of(self.uri, self.store.root)),
                " and ".join(lacks),
                "the next run tells it" if hasty else f"run `{self._remedy()}` when it answers",
            )

    def _remedy(self) -> str:
        return reconcile_command(self.parent, self.store.name, self.asked)

    def _open(self) -> Tracker:
        if self._tracker is None:
            tracker = make_tracker(self.uri, store=self.store.root, project=self.parent.project)
            tracker.start(self.parent)
            self._tracker = tracker
        return self._tracker

    def _trial(self, outcome: Outcome, at: float | None) -> None:
        try:
            tracker = self._open()
            tracker.trial(self._children.child(outcome, at, maker()))
            point = self._points.ended(outcome)
            if point is not None:
                tracker.point(point)
        except Exception as problem:  # whatever it is, the sweep's results are worth more
            self._troubled += 1
            self._complain(problem)

    def _finish(self, status: Status, ending: Callable[[Path], Ending], hasty: bool) -> Told:
        if hasty and self._tracker is None:  # to open it would take too long
            return Told(sweep="missed")
        try:
            tracker = self._open()
            if hasty:
                return tracker.finish(status, None, {})
            end = ending(Path(self._folder.name))
            for point in end.points:
                tracker.point(point)
            return tracker.finish(status, end.note, end.files)
        except Exception as problem:
            self._complain(problem)
            return Told(sweep="missed")

    def _complain(self, problem: Exception) -> None:
        level = logging.WARNING if self._troubled <= 1 else logging.DEBUG  # one line is enough
        log.log(level, "tracking fails: %s: %s", type(problem).__name__, _line(problem))


def _line(problem: Exception) -> str:
    return f"{problem}".partition("\n")[0]


def reconcile_command(parent: SweepRun, store: str, uri: str | None) -> str:
    """What to type so that a tracker is told what it has missed."""
    name = parent.sweep if parent.project == "default" else f"{parent.project}/{parent.sweep}"
    place = [] if store == str(Path("runs").absolute()) else ["--store", store]
    tracker = ["--tracking-uri", without_credentials(uri)] if uri else []
    return " ".join(["airsweep mlflow reconcile", name, *place, *tracker])

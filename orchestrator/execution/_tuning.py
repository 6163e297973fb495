"""Points on the cluster: one Ray Tune trial is one job of the dispatcher; actors are reused.

Tune schedules; which point comes next and what became of it is the dispatcher's. Failures of
trials come back as data: an exception would cost the actor and everything that it has loaded.
"""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.search import Searcher

from air_core.backbone.loading import import_open_clip_alone
from air_core.specs import TrialSpec
from orchestrator.cluster.session import note_devices
from orchestrator.errors import OutOfTime
from orchestrator.execution._progress import Note
from orchestrator.execution._scheduler import TrialScheduler
from orchestrator.failures import Failure, classify, of_death
from orchestrator.keys import artifact_key
from orchestrator.spec import Resources
from orchestrator.stages.context import WorkerContext, keep_to_share
from orchestrator.stages.side_by_side import run_trials
from orchestrator.stages.trial import WHOLE, Segments, is_over

MOST = 10_000  # jobs at a time, for Tune; the source hands out as many as there is room for


@dataclass(frozen=True)
class Figures:
    """What running the points cost."""

    wall: float  # seconds
    # Median seconds of a job beyond what its trials took, on an actor that is up; None: none was.
    overhead: float | None


class TrialRunner(tune.Trainable):  # type: ignore[misc]
    """Runs the trials of one job."""

    def setup(
        self,
        config: dict[str, Any],
        worker: WorkerContext,
        board: Any,
        limit: float | None,
        gpu: float,
    ) -> None:
        self.worker, self.board, self.limit = worker, board, limit
        self.job = config
        import_open_clip_alone()
        keep_to_share(gpu)
        note_devices()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.job = new_config
        return True  # anything else would throw the actor away

    def step(self) -> dict[str, Any]:
        started = time.monotonic()
        specs = self.job["trials"]
        worker = self.worker.with_less(self.job["halvings"])
        notes = [Note(self.board, f"trial {slot}") for slot in self.job["slots"]]
        by_lock = dict(zip((artifact_key(s).digest for s in specs), notes, strict=True))
        worker.store.locks.on_wait = lambda lock, *of: by_lock.get(lock, notes[0]).waits(lock, *of)
        found = attempt(
            specs,
            worker,
            lambda place, share: notes[place].share(share),
            self.limit,
            self.job["legs"],
        )
        failures = [
            (artifact_key(spec).digest, failure)
            for spec, failure in zip(specs, found, strict=True)
            if failure is not None
        ]
        return {
            "number": self.job["number"],
            "failures": failures,
            "seconds": time.monotonic() - started,
            "done": True,
        }


def attempt(
    specs: Sequence[TrialSpec],
    worker: WorkerContext,
    share_done: Callable[[int, float], None],
    limit: float | None = None,
    segments: Segments = WHOLE,
) -> list[Failure | None]:
    """Run trials; what went wrong with each is returned, not raised.

    Args:
        limit: seconds that each may take; side by side they have so many together.
        legs: where they stop, if they do.
    """
    started = time.monotonic()

    def told(place: int, share: float) -> None:  # after each step, so that nothing has to be killed
        share_done(place, share)
        if limit is not None and time.monotonic() - started > limit * len(specs):
            raise OutOfTime(f"over {limit:g} s a trial at {share:.0%} of its training")

    outcomes: Sequence[object]
    try:
        outcomes = run_trials(specs, worker.store, worker.device, told, worker.batch, segments)
    except Exception as problem:
        outcomes = [problem] * len(specs)
    return [_failure(one) if isinstance(one, Exception) else None for one in outcomes]


def _failure(problem: Exception) -> Failure:
    where = traceback.extract_tb(problem.__traceback__)[-1]
    place = f"{Path(where.filename).name}:{where.lineno}"
    return Failure(classify(problem), f"{type(problem).__name__}: {problem} ({place})")


class _NotKept:
    """Tune pickles searchers and callbacks into files that we never read: leave nothing there."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Source(_NotKept, Searcher):  # type: ignore[misc]
    """Tune asks here for its next trial."""

    def __init__(self, scheduler: TrialScheduler, slots: Callable[[], int]) -> None:
        # A metric here would let one failed trial end the whole sweep.
        super().__init__(metric=None, mode=None)
        self.scheduler, self.slots = scheduler, slots
        self.jobs: dict[str, int] = {}
        self.handed: dict[int, float] = {}  # when, by job

    def suggest(self, trial_id: str) -> Any:
        if self.scheduler.peek() is None:
            # An idle actor would hold what could prepare the next cells: so this run of Tune ends.
            return None if self.scheduler.under_way else Searcher.FINISHED
        if self.scheduler.under_way >= self.slots():
            return None  # not now
        job = self.scheduler.next()
        assert job is not None
        self.jobs[trial_id] = job.number
        self.handed[job.number] = time.monotonic()
        return {
            "number": job.number,
            "slots": list(job.slots),
            "trials": list(job.trials),
            "halvings": job.halvings,
            "legs": job.segments,
        }

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        pass  # the callback has done it

    def save(self, checkpoint_path: str) -> None:
        pass  # the studies are on disk, in files of ours

    def restore(self, checkpoint_path: str) -> None:
        pass


class _Results(_NotKept, tune.Callback):  # type: ignore[misc]
    """Takes results and deaths in the driver, and lets it do its other work."""

    def __init__(
        self,
        scheduler: TrialScheduler,
        source: _Source,
        overheads: list[float],
        tick: Callable[[], None],
    ) -> None:
        self.scheduler, self.source, self.overheads = scheduler, source, overheads
        self.tick = tick
        self.free: dict[tuple[str, int], float] = {}  # since when, by actor

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self.tick()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        number, now = result["number"], time.monotonic()
        actor = (result["node_ip"], result["pid"])
        if actor in self.free:  # it is up, and may have been waited for
            waited = now - max(self.source.handed[number], self.free[actor])
            self.overheads.append(waited - result["seconds"])
        self.free[actor] = now
        self.scheduler.complete(number, dict(result["failures"]))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        number = self.source.jobs[trial.trial_id]
        job = self.scheduler.running[number]
        said = str(trial.get_error() or "")
        last = next((line for line in reversed(said.splitlines()) if line.strip()), "")
        failure = Failure(of_death(said), f"the process that ran it died: {last.strip()[:200]}")
        # What it had finished before is in the store.
        lost = [
            key
            for key, spec in zip(job.keys, job.trials, strict=True)
            if not is_over(spec, self.scheduler.store, job.segments.until)
        ]
        self.scheduler.complete(number, dict.fromkeys(lost, failure))


def run_points(
    scheduler: TrialScheduler,
    worker: WorkerContext,
    resources: Resources,
    folder: Path,
    slots: Callable[[], int],
    tick: Callable[[], None],
    board: Any,
) -> Figures:
    """Run all points that the dispatcher has to hand out, now or while others run.

    Args:
        folder: for Ray's own files, written and never read.
        slots: how many jobs may run at a time, asked before each.
        tick: called some ten times a second: the driver's other work, such as what more can start.
        board: takes notes of how far long trials are, see `progress`.
    """
    started = time.monotonic()
    overheads: list[float] = []
    source = _Source(scheduler, slots)
    trainable = tune.with_resources(
        tune.with_parameters(
            TrialRunner,
            worker=worker,
            board=board,
            limit=resources.trial.timeout,
            gpu=resources.trial.gpu,
        ),
        {"cpu": resources.trial.cpu, "gpu": resources.trial.gpu, **resources.trial.custom},
    )
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=source,
            num_samples=-1,
            max_concurrent_trials=MOST,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name="points",
            storage_path=str(folder.absolute()),
            verbose=0,
            callbacks=[_Results(scheduler, source, overheads, tick)],
            log_to_file=False,
            failure_config=tune.FailureConfig(max_failures=0),  # the dispatcher tries again
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )
    tuner.fit()
    return Figures(
        wall=time.monotonic() - started,
        overhead=statistics.median(overheads) if overheads else None,
    )

"""Runs points on the cluster: one Ray Tune trial is one job of the trial scheduler.

Tune places jobs on actors and reuses the actors. The trial scheduler decides which job comes next,
and takes the results. Failures of trials are returned as data: an exception would end the actor,
and all that it has loaded would be lost.
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
from orchestrator.cluster.session import record_devices
from orchestrator.errors import OutOfTime
from orchestrator.execution._progress import ProgressReporter
from orchestrator.execution._scheduler import TrialScheduler
from orchestrator.failures import Failure, classify, classify_death
from orchestrator.keys import artifact_key
from orchestrator.spec import Resources
from orchestrator.stages.context import WorkerContext, limit_gpu_memory
from orchestrator.stages.side_by_side import run_trials
from orchestrator.stages.trial import WHOLE_TRIAL, Segments, is_finished

MAX_JOBS = (
    10_000  # at a time, for Tune; `_JobSearcher` limits the jobs to those that fit the cluster
)


@dataclass(frozen=True)
class TuningCost:
    """Cost of running the points."""

    wall: float  # seconds
    # Median seconds that a job takes beyond its trials on an actor that is up; None: unknown.
    overhead: float | None


class TrialRunner(tune.Trainable):  # type: ignore[misc]
    """Actor that runs the trials of one job after another."""

    def setup(
        self,
        config: dict[str, Any],
        worker: WorkerContext,
        progress_actor: Any,
        limit: float | None,
        gpu: float,
    ) -> None:
        self.worker, self.progress_actor, self.limit = worker, progress_actor, limit
        self.job = config
        import_open_clip_alone()
        limit_gpu_memory(gpu)
        record_devices()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.job = new_config
        return True  # an exception would end the actor

    def step(self) -> dict[str, Any]:
        started = time.monotonic()
        specs = self.job["trials"]
        worker = self.worker.with_smaller_batch(self.job["halvings"])
        reporters = [
            ProgressReporter(self.progress_actor, f"trial {slot}") for slot in self.job["slots"]
        ]
        keys = [artifact_key(spec).digest for spec in specs]
        by_lock = dict(zip(keys, reporters, strict=True))

        def report_wait(lock: str, holder: str, seconds: float) -> None:
            by_lock.get(lock, reporters[0]).report_wait(lock, holder, seconds)

        worker.store.locks.on_wait = report_wait
        results = run_and_catch(
            specs,
            worker,
            lambda index, share: reporters[index].report_fraction(share),
            self.limit,
            self.job["segments"],
        )
        failures = [(key, failure) for key, failure in zip(keys, results, strict=True) if failure]
        return {
            "number": self.job["number"],
            "failures": failures,
            "seconds": time.monotonic() - started,
            "done": True,
        }


def run_and_catch(
    specs: Sequence[TrialSpec],
    worker: WorkerContext,
    report: Callable[[int, float], None],
    limit: float | None = None,
    segments: Segments = WHOLE_TRIAL,
) -> list[Failure | None]:
    """Run trials and return the failure of each, None where there is none.

    Args:
        report: receives the index of a trial and the finished share of its training.
        limit: seconds for each trial; trials side by side may use the sum together.
        segments: rungs and stop of the trials.
    """
    started = time.monotonic()

    # Called after each step, so that a trial over its limit ends without killing its process.
    def report_within_limit(index: int, share: float) -> None:
        report(index, share)
        if limit is not None and time.monotonic() - started > limit * len(specs):
            raise OutOfTime(f"over {limit:g} s a trial at {share:.0%} of its training")

    results: Sequence[object]
    try:
        results = run_trials(
            specs, worker.store, worker.device, report_within_limit, worker.batch, segments
        )
    except Exception as problem:
        results = [problem] * len(specs)
    return [_failure(result) if isinstance(result, Exception) else None for result in results]


def _failure(problem: Exception) -> Failure:
    frame = traceback.extract_tb(problem.__traceback__)[-1]
    line = f"{Path(frame.filename).name}:{frame.lineno}"
    return Failure(classify(problem), f"{type(problem).__name__}: {problem} ({line})")


class _Stateless:
    """Tune pickles searchers and callbacks into files that this package never reads: pickle none
    of their state."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _JobSearcher(_Stateless, Searcher):  # type: ignore[misc]
    """Gives Tune the scheduler's next job."""

    def __init__(self, scheduler: TrialScheduler, max_jobs: Callable[[], int]) -> None:
        # With a metric, one failed trial would end the whole sweep.
        super().__init__(metric=None, mode=None)
        self.scheduler, self.max_jobs = scheduler, max_jobs
        self.jobs: dict[str, int] = {}
        self.suggested_at: dict[int, float] = {}  # by job

    def suggest(self, trial_id: str) -> Any:
        running = len(self.scheduler.running)
        if self.scheduler.peek() is None:
            # With no job running, this run of Tune ends: its idle actors would hold resources that
            # can prepare the next cells.
            return None if running else Searcher.FINISHED
        if running >= self.max_jobs():
            return None  # Tune tries again later
        job = self.scheduler.next()
        assert job is not None
        self.jobs[trial_id] = job.number
        self.suggested_at[job.number] = time.monotonic()
        return {
            "number": job.number,
            "slots": list(job.slots),
            "trials": list(job.trials),
            "halvings": job.halvings,
            "segments": job.segments,
        }

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        pass  # `_JobCallback` takes the result

    def save(self, checkpoint_path: str) -> None:
        pass  # studies are stored elsewhere

    def restore(self, checkpoint_path: str) -> None:
        pass


class _JobCallback(_Stateless, tune.Callback):  # type: ignore[misc]
    """Passes results and deaths of actors to the scheduler, and gives the driver its turn."""

    def __init__(
        self,
        scheduler: TrialScheduler,
        searcher: _JobSearcher,
        overheads: list[float],
        tick: Callable[[], None],
    ) -> None:
        self.scheduler, self.searcher, self.overheads = scheduler, searcher, overheads
        self.tick = tick
        self.idle_since: dict[tuple[str, int], float] = {}  # by actor

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self.tick()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        number, now = result["number"], time.monotonic()
        actor = (result["node_ip"], result["pid"])
        if actor in self.idle_since:  # the actor was up before this job
            began = max(self.searcher.suggested_at[number], self.idle_since[actor])
            self.overheads.append(now - began - result["seconds"])
        self.idle_since[actor] = now
        self.scheduler.complete(number, dict(result["failures"]))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        number = self.searcher.jobs[trial.trial_id]
        job = self.scheduler.running[number]
        error = str(trial.get_error() or "")
        last = next((line for line in reversed(error.splitlines()) if line.strip()), "")
        failure = Failure(classify_death(error), f"its worker process died: {last.strip()[:200]}")
        # Trials that had finished before the process died are in the store.
        lost = [
            key
            for key, spec in zip(job.keys, job.trials, strict=True)
            if not is_finished(spec, self.scheduler.store, job.segments.stop_after)
        ]
        self.scheduler.complete(number, dict.fromkeys(lost, failure))


def run_points(
    scheduler: TrialScheduler,
    worker: WorkerContext,
    resources: Resources,
    folder: Path,
    max_jobs: Callable[[], int],
    tick: Callable[[], None],
    progress_actor: Any,
) -> TuningCost:
    """Run the points that the scheduler selects, until none can start and none runs.

    Args:
        folder: for files of Ray, which airsweep does not read.
        max_jobs: returns the number of jobs that may run at a time; called before each job.
        tick: other work of the driver, such as preparation; called about ten times a second.
        progress_actor: receives the progress of long trials, see `_progress`.
    """
    started = time.monotonic()
    overheads: list[float] = []
    searcher = _JobSearcher(scheduler, max_jobs)
    trainable = tune.with_resources(
        tune.with_parameters(
            TrialRunner,
            worker=worker,
            progress_actor=progress_actor,
            limit=resources.trial.timeout,
            gpu=resources.trial.gpu,
        ),
        {"cpu": resources.trial.cpu, "gpu": resources.trial.gpu, **resources.trial.custom},
    )
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            num_samples=-1,
            max_concurrent_trials=MAX_JOBS,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name="points",
            storage_path=str(folder.absolute()),
            verbose=0,
            callbacks=[_JobCallback(scheduler, searcher, overheads, tick)],
            log_to_file=False,
            failure_config=tune.FailureConfig(max_failures=0),  # the scheduler retries
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )
    tuner.fit()
    return TuningCost(
        wall=time.monotonic() - started,
        overhead=statistics.median(overheads) if overheads else None,
    )

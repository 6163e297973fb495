"""Runs points on the cluster: one Ray Tune trial is one job of the trial scheduler.

Tune places jobs on actors and reuses the actors. The trial scheduler decides which job comes next,
and takes the results. Failures of trials are returned as data: an exception would end the actor,
and all that it has loaded would be lost.
"""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ray import tune
from ray.tune.search import Searcher

from orchestrator.cluster.session import prepare_worker
from orchestrator.execution._preparation import POLL_INTERVAL
from orchestrator.execution._progress import ProgressReporter, report_working
from orchestrator.execution._scheduler import Job, TrialScheduler
from orchestrator.failures import Failure, classify, classify_death
from orchestrator.planning import ray_resources
from orchestrator.spec import Resources
from orchestrator.stages.context import WorkerContext, limit_gpu_memory
from orchestrator.store.checkpoints import Curves

# At a time, for Tune; `_JobSearcher` limits the jobs to those that fit the cluster.
MAX_JOBS = 10_000


class TrialRunner(tune.Trainable):  # type: ignore[misc]
    """Actor that runs the trials of one job after another."""

    def setup(
        self,
        config: dict[str, Any],
        worker: WorkerContext,
        progress_actor: Any,
        gpu: float,
    ) -> None:
        self.worker, self.progress_actor = worker, progress_actor
        self.job: Job = config["job"]
        limit_gpu_memory(gpu)
        prepare_worker(worker.variables, worker.plugins)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.job = new_config["job"]
        return True  # an exception would end the actor

    def step(self) -> dict[str, Any]:
        started = time.monotonic()
        job = self.job
        worker = self.worker.with_thrift(job.halvings)
        reporters = [
            ProgressReporter(self.progress_actor, f"trial {slot}", "steps") for slot in job.slots
        ]
        by_lock = dict(zip(job.keys, reporters, strict=True))

        def report_wait(lock: str, holder: str, seconds: float) -> None:
            by_lock.get(lock, reporters[0]).report_wait(lock, holder, seconds)

        worker.store.locks.on_wait = report_wait
        with report_working(self.progress_actor):
            failures = self._failures(worker, reporters)
        return {
            "number": job.number,
            "failures": list(failures.items()),
            "seconds": time.monotonic() - started,
            "done": True,
        }

    def _failures(
        self, worker: WorkerContext, reporters: Sequence[ProgressReporter]
    ) -> Mapping[str, Failure]:
        """Run the trials of the job; the failures by key."""
        from orchestrator.stages.trial_run import run_trials

        job = self.job

        def report(index: int, done: int, total: int) -> None:
            reporters[index](done, total)

        def report_curves(index: int, curves: Curves) -> None:
            reporters[index].report_curves(curves)

        results: Sequence[object]
        try:
            results = run_trials(job.trials, worker, report, report_curves)
        except Exception as problem:
            results = [problem] * len(job.trials)
        found = zip(job.keys, results, strict=True)
        return {key: _failure(result) for key, result in found if isinstance(result, Exception)}


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

    def __init__(
        self, scheduler: TrialScheduler, max_jobs: Callable[[], int], tick: Callable[[], None]
    ) -> None:
        # With a metric, one failed trial would end the whole sweep.
        super().__init__(metric=None, mode=None)
        self.scheduler, self.max_jobs, self.tick = scheduler, max_jobs, tick
        self.jobs: dict[str, int] = {}
        self.suggested_at: dict[int, float] = {}  # by job

    def suggest(self, trial_id: str) -> Any:
        running = len(self.scheduler.running)
        if self.scheduler.peek() is None:
            # With no job running, this run of Tune ends: its idle actors would hold resources that
            # can prepare the next cells.
            return None if running else Searcher.FINISHED
        while running >= self.max_jobs():
            if running:
                return None  # Tune tries again later
            self.tick()  # until a job runs, Tune would call this method once a second
            time.sleep(POLL_INTERVAL)
        job = self.scheduler.next()
        assert job is not None
        self.jobs[trial_id] = job.number
        self.suggested_at[job.number] = time.monotonic()
        return {"job": job}

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
            if not self.scheduler.store.has(spec)
        ]
        self.scheduler.complete(number, dict.fromkeys(lost, failure))


def run_points(
    scheduler: TrialScheduler,
    worker: WorkerContext,
    resources: Resources,
    max_jobs: Callable[[], int],
    tick: Callable[[], None],
    progress_actor: Any,
) -> float | None:
    """Run the points that the scheduler selects, until none can start and none runs.

    Args:
        max_jobs: returns the number of jobs that may run at a time; called before each job.
        tick: other work of the driver, such as preparation; called about ten times a second.
        progress_actor: receives the progress of long trials, see `_progress`.

    Returns:
        Median seconds that a job takes beyond its trials on an actor that is up; None: unknown.
    """
    overheads: list[float] = []
    searcher = _JobSearcher(scheduler, max_jobs, tick)
    trainable = tune.with_resources(
        tune.with_parameters(
            TrialRunner,
            worker=worker,
            progress_actor=progress_actor,
            gpu=resources.trial.gpu,
        ),
        ray_resources(resources.trial),
    )
    # Nothing reads Tune's own files, which describe this call and its jobs of several trials.
    with TemporaryDirectory(prefix="airsweep-tune-", ignore_cleanup_errors=True) as folder:
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
                storage_path=folder,
                verbose=0,
                callbacks=[_JobCallback(scheduler, searcher, overheads, tick)],
                log_to_file=False,
                failure_config=tune.FailureConfig(max_failures=0),  # the scheduler retries
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        )
        tuner.fit()
    return statistics.median(overheads) if overheads else None

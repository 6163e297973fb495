"""Points on the cluster: one Ray Tune trial is one point, its actors are reused.

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

from air_core.specs import TrialSpec
from orchestrator.board import Note, watched
from orchestrator.dispatch import Dispatcher, Failure
from orchestrator.keys import artifact_key
from orchestrator.replicas import run_trials
from orchestrator.store import MissingArtifact
from orchestrator.sweep import Resources
from orchestrator.workshop import Workshop

# The first that fits names the failure class; anything else is the user's.
FAILURE_CLASSES: tuple[tuple[type[BaseException], str], ...] = (
    (MissingArtifact, "data"),
    (FloatingPointError, "nan"),
    (MemoryError, "oom"),
    (OSError, "infra"),
)


@dataclass(frozen=True)
class Figures:
    """What running the points cost."""

    wall: float  # seconds
    # Median seconds of a point beyond what its trials took, once actors are up; None: none was.
    overhead: float | None


class TrialRunner(tune.Trainable):  # type: ignore[misc]
    """Runs the trials of one point."""

    def setup(self, config: dict[str, Any], shop: Workshop, board: Any) -> None:
        self.shop, self.board = shop, board
        self.job = config

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.job = new_config
        return True  # anything else would throw the actor away

    def step(self) -> dict[str, Any]:
        started = time.monotonic()
        specs = self.job["trials"]
        notes = [Note(self.board, f"trial {slot}") for slot in self.job["slots"]]
        found = attempt(specs, self.shop, lambda place, share: notes[place].share(share))
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
    specs: Sequence[TrialSpec], shop: Workshop, share_done: Callable[[int, float], None]
) -> list[Failure | None]:
    """Run trials; what went wrong with each is returned, not raised."""
    outcomes: Sequence[object]
    try:
        outcomes = run_trials(specs, shop.store, shop.device, share_done)
    except Exception as problem:
        outcomes = [problem] * len(specs)
    return [_failure(one) if isinstance(one, Exception) else None for one in outcomes]


def _failure(problem: Exception) -> Failure:
    name = next((c for kind, c in FAILURE_CLASSES if isinstance(problem, kind)), "user")
    if "out of memory" in str(problem).lower():
        name = "oom"
    where = traceback.extract_tb(problem.__traceback__)[-1]
    place = f"{Path(where.filename).name}:{where.lineno}"
    return Failure(name, f"{type(problem).__name__}: {problem} ({place})")


class _NotKept:
    """Tune pickles searchers and callbacks into files that we never read: leave nothing there."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Source(_NotKept, Searcher):  # type: ignore[misc]
    """Tune asks here for its next trial."""

    def __init__(self, dispatcher: Dispatcher, handed: dict[int, float]) -> None:
        # A metric here would let one failed trial end the whole sweep.
        super().__init__(metric=None, mode=None)
        self.dispatcher, self.handed = dispatcher, handed
        self.jobs: dict[str, int] = {}

    def suggest(self, trial_id: str) -> Any:
        job = self.dispatcher.next()
        if job is not None:
            self.jobs[trial_id] = job.number
            self.handed[job.number] = time.monotonic()
            return {
                "number": job.number,
                "slots": list(job.slots),
                "trials": list(job.trials),
            }
        if self.dispatcher.finished:
            return Searcher.FINISHED
        assert self.dispatcher.running, "nothing runs and nothing can be handed out"
        return None  # not now

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        pass  # the callback has done it

    def save(self, checkpoint_path: str) -> None:
        pass  # the studies are on disk, in files of ours

    def restore(self, checkpoint_path: str) -> None:
        pass


class _Results(_NotKept, tune.Callback):  # type: ignore[misc]
    """Takes results and deaths in the driver."""

    def __init__(self, dispatcher: Dispatcher, source: _Source, overheads: list[float]) -> None:
        self.dispatcher, self.source, self.overheads = dispatcher, source, overheads

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        number = result["number"]
        waited = time.monotonic() - self.source.handed[number]
        self.overheads.append(waited - result["seconds"])
        self.dispatcher.complete(number, dict(result["failures"]))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        number = self.source.jobs[trial.trial_id]
        job = self.dispatcher.running[number]
        failure = Failure("infra", "the process that ran it died; see Ray's logs")
        self.dispatcher.complete(number, dict.fromkeys(job.keys, failure))


def run_points(
    dispatcher: Dispatcher,
    shop: Workshop,
    resources: Resources,
    folder: Path,
    slots: int,
    progress: Callable[[str, int, int], None],
) -> Figures:
    """Run all points that the dispatcher has to hand out.

    Args:
        folder: for Ray's own files, written and never read.
        slots: trials at a time.
        progress: told how far long trials are: name, done, total.
    """
    started = time.monotonic()
    handed: dict[int, float] = {}
    overheads: list[float] = []
    source = _Source(dispatcher, handed)
    with watched(progress) as board:
        trainable = tune.with_resources(
            tune.with_parameters(TrialRunner, shop=shop, board=board),
            {"cpu": resources.trial.cpu, "gpu": resources.trial.gpu},
        )
        _fit(trainable, source, dispatcher, overheads, folder, slots)
    # The first point of each actor pays for its start and imports.
    warm = overheads[slots:]
    return Figures(
        wall=time.monotonic() - started,
        overhead=statistics.median(warm) if warm else None,
    )


def _fit(
    trainable: Any,
    source: _Source,
    dispatcher: Dispatcher,
    overheads: list[float],
    folder: Path,
    slots: int,
) -> None:
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=source,
            num_samples=-1,
            max_concurrent_trials=slots,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name="points",
            storage_path=str(folder.absolute()),
            verbose=0,
            callbacks=[_Results(dispatcher, source, overheads)],
            log_to_file=False,
            failure_config=tune.FailureConfig(max_failures=1),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )
    tuner.fit()

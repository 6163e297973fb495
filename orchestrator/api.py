"""airsweep from Python: the commands as functions, with results as pandas DataFrames.

    import airsweep

    done = airsweep.run("quickstart", sets={"seeds": [1]})
    airsweep.table(done)

What a command refuses is an exception with the same sentence: ValueError for what is wrong with a
file, an option or a name, RuntimeError for what is refused before it starts. Nothing here ends the
process. Importing this costs nothing; torch, Ray and pandas are imported where they are needed.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pandas import DataFrame

    from orchestrator.planning import Plan, SweepRequest
    from orchestrator.spec import SweepSpec
    from orchestrator.store import SweepLocation

__all__ = [
    "Outcome",
    "Planned",
    "curves",
    "init",
    "load",
    "plan",
    "prepare",
    "results",
    "retry",
    "run",
    "schema",
    "status",
    "table",
    "validate",
]

STORE = "runs"  # where nobody says another one

Options = Mapping[str, Any] | Iterable[str]  # {"iterations": 3}, or ["iterations=3"]


# ---------------------------------------------------------------- what is asked


def load(
    spec: str | Path | SweepRequest, *, sets: Options = (), only: Options = (), smoke: bool = False
) -> SweepRequest:
    """A sweep file, read and checked; every function below takes the file or what this gives.

    Args:
        spec: a sweep file, or its bare name.
        sets: values to replace, as `--set`.
        only: of axes of the grid the values to keep, as `--only`: {"method": ["air", "cpl"]}.
        smoke: one point, seed and iteration a cell, 8 images, in a store of its own.

    Raises:
        ValueError: the first thing that is wrong, with file, line and column.
    """
    from orchestrator.planning import SweepRequest, read_request
    from orchestrator.planning.requests import choices_of, options

    if not isinstance(spec, SweepRequest):
        return read_request(spec, options(sets), choices_of(only), smoke)
    if sets or only or smoke:
        raise ValueError(f"{spec.spec.name} was loaded already; give sets, only and smoke to load")
    return spec


def validate(
    spec: str | Path | SweepRequest, *, sets: Options = (), only: Options = ()
) -> tuple[str, ...]:
    """What is allowed in a sweep file but may surprise, one sentence each. Raises as `load`."""
    from orchestrator.spec import notes_of

    return notes_of(load(spec, sets=sets, only=only).spec)


@dataclass(frozen=True, repr=False)
class Planned:
    """What would run. Printed, it is the screen of `airsweep plan`."""

    plan: Plan
    location: SweepLocation

    def json(self) -> dict[str, Any]:
        """What `airsweep plan --json` prints."""
        from orchestrator.planning import changed_inputs, earlier_results

        plan, location = self.plan, self.location
        earlier = earlier_results(plan, location)
        return {
            **plan.json(location.store),
            "reused_from": self._sources(),
            "changed_inputs": changed_inputs(earlier),
            "stale": [
                {"stage": part, "artifacts": count}
                for (part, what), count in earlier.items()
                if what == "code"
            ],
        }

    def screen(self, explain: bool = False) -> str:
        """explain: with every setting and where it comes from."""
        from orchestrator.reporting import plan_screen

        return plan_screen(self.plan, self.location, explain, self._sources())

    def _sources(self) -> dict[str, int]:
        from orchestrator.planning.recorded import computed_by

        if not self.plan.reused:
            return {}
        store = self.location.store
        there = [slot.key.digest for slot in self.plan.slots if store.has(slot.spec)]
        return dict(computed_by(store, there, self.location))

    def __repr__(self) -> str:
        return self.screen()


def plan(
    spec: str | Path | SweepRequest,
    *,
    store: str | Path | None = None,
    data_root: str | Path | None = None,
    sets: Options = (),
    only: Options = (),
    smoke: bool = False,
) -> Planned:
    """What would run, what is there, how long it would take; starts nothing.

    Args:
        store: of all results; default: AIRSWEEP_STORE, else `runs`.
        data_root: folder of real datasets; default: AIRSWEEP_DATA.
    """
    from orchestrator.planning import plan_of

    asked = load(spec, sets=sets, only=only, smoke=smoke)
    location = location_for(asked, store, data_root)
    return Planned(plan_of(asked.spec, location), location)


# ---------------------------------------------------------------- what is done


@dataclass(frozen=True, repr=False)
class Outcome:
    """How a run ended. Printed, it is the screen at the end of `airsweep run`.

    exit_code: 0 all done, 1 some trials failed, 4 the budget is spent (docs/troubleshooting.md).
    """

    exit_code: int
    sweep: SweepSpec
    location: SweepLocation

    @property
    def name(self) -> str:
        """PROJECT/NAME."""
        return f"{self.location.project}/{self.location.name}"

    @property
    def store(self) -> str | Path:
        return self.location.store.name

    def __repr__(self) -> str:
        from orchestrator.reporting import summary_screen

        return summary_screen(self.sweep, self.location)


def prepare(
    spec: str | Path | SweepRequest,
    *,
    store: str | Path | None = None,
    data_root: str | Path | None = None,
    sets: Options = (),
    only: Options = (),
    smoke: bool = False,
    quiet: bool = False,
) -> Outcome:
    """Make features, LoRA and images of a sweep, and run no trial. As `run`."""
    asked = load(spec, sets=sets, only=only, smoke=smoke)
    return _run(asked, store, data_root, quiet, prepare_only=True)


def run(
    spec: str | Path | SweepRequest,
    *,
    store: str | Path | None = None,
    data_root: str | Path | None = None,
    tracking_uri: str | None = None,
    sets: Options = (),
    only: Options = (),
    smoke: bool = False,
    quiet: bool = False,
) -> Outcome:
    """Run a sweep, or go on with one that was interrupted; what is done is skipped.

    A trial that failed is no exception: see `exit_code` and `results`. A line on stderr says what
    happens, none with `quiet`. Ctrl-C is a KeyboardInterrupt when all is closed.

    Args:
        tracking_uri: MLflow; default: MLFLOW_TRACKING_URI, else a file in the store.

    Raises:
        ValueError: what is wrong with the file, an option or what it names.
        RuntimeError: refused before it started, or there was no room to go on.
    """
    asked = load(spec, sets=sets, only=only, smoke=smoke)
    return _run(asked, store, data_root, quiet, tracking_uri=tracking_uri)


def retry(
    name: str | Outcome,
    failure_class: str,
    *,
    store: str | Path | None = None,
    data_root: str | Path | None = None,
    tracking_uri: str | None = None,
    quiet: bool = False,
) -> Outcome:
    """Resume a sweep, retrying only one class of failures: oom, nan, timeout, ..."""
    from orchestrator.store import read_resolved

    sweep, location = recorded_sweep(name, store, data_root)
    how: dict[str, Any] = {"tracking_uri": tracking_uri, "retry": failure_class}
    with _as_before():
        return _whole(execute(sweep, location, read_resolved(location), quiet, **how))


def _run(
    asked: SweepRequest,
    store: str | Path | None,
    data_root: str | Path | None,
    quiet: bool,
    **how: Any,
) -> Outcome:
    location = location_for(asked, store, data_root)
    with _as_before():
        return _whole(execute(asked.spec, location, asked.origin, quiet, **how))


def execute(
    sweep: SweepSpec,
    location: SweepLocation,
    origin: dict[str, Any],
    quiet: bool,
    tracking_uri: str | None = None,
    **how: Any,
) -> Outcome:
    """`driver.run_sweep` with a screen and MLflow, for commands too."""
    from orchestrator.execution import make_screen, run_sweep
    from orchestrator.tracking import Publisher

    publisher = Publisher(sweep, location, tracking_uri)
    code = run_sweep(sweep, location, make_screen(quiet), publisher, origin=origin, **how)
    return Outcome(code, sweep, location)


def _whole(outcome: Outcome) -> Outcome:
    """Who was stopped goes on stopping, now that ledger and tracker are closed."""
    from orchestrator.errors import INTERRUPTED, TERMINATED

    if outcome.exit_code == INTERRUPTED:
        raise KeyboardInterrupt
    if outcome.exit_code == TERMINATED:
        raise SystemExit(TERMINATED)
    return outcome


@contextmanager
def _as_before() -> Iterator[None]:
    """A run leaves its process as it was: environment, the handler of SIGTERM, stdout."""
    environment, kept = dict(os.environ), os.dup(1)
    here = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    # Ray's daemons print to file descriptor 1 whatever they are told; stdout is the caller's.
    sys.stdout.flush()
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
        if here and handler is not None:
            signal.signal(signal.SIGTERM, handler)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)


# ---------------------------------------------------------------- what came out


def status(name: str | Outcome, *, store: str | Path | None = None) -> dict[str, Any]:
    """How a sweep stands, from its ledger: what `airsweep status --json` prints.

    Raises:
        ValueError: the store has no such sweep.
    """
    from orchestrator.reporting.screens import status as standing

    return standing(location_named(name, store))


def results(
    name: str | Outcome, *, store: str | Path | None = None, data_root: str | Path | None = None
) -> DataFrame:
    """One line for each trial: what the sweep varies, seeds, state, metrics (results.py).

    Args:
        name: of a sweep that was run, or PROJECT/NAME, or what `run` gave.

    Raises:
        ValueError: the store has no such sweep.
    """
    from orchestrator.planning import plan_of
    from orchestrator.reporting.results import trials_frame

    sweep, location = recorded_sweep(name, store, data_root)
    return trials_frame(plan_of(sweep, location), location.store, location.event_log())


def curves(
    name: str | Outcome, *, store: str | Path | None = None, data_root: str | Path | None = None
) -> DataFrame:
    """One line for each value of each curve: trial, metric, iteration, value. As `results`."""
    from orchestrator.planning import plan_of
    from orchestrator.reporting.results import curves_frame

    sweep, location = recorded_sweep(name, store, data_root)
    return curves_frame(plan_of(sweep, location), location.store)


def table(
    name: str | Outcome, *, store: str | Path | None = None, data_root: str | Path | None = None
) -> DataFrame:
    """The rows of `airsweep table`: mean, std and interval of each setting over its runs."""
    from orchestrator.planning import plan_of
    from orchestrator.reporting import results_of
    from orchestrator.reporting.tables import rows_frame

    sweep, location = recorded_sweep(name, store, data_root)
    found = results_of(plan_of(sweep, location), location.store)
    return rows_frame(found.rows).infer_objects()


def recorded_sweep(
    name: str | Outcome, store: str | Path | None, data_root: str | Path | None
) -> tuple[SweepSpec, SweepLocation]:
    """A sweep as it was last run, with the values that were set then. Raises as `status`."""
    from orchestrator.planning.recorded import read_sweep

    location = location_named(name, store)
    return read_sweep(location, _folder(data_root) or location.data_root)


def location_named(name: str | Outcome, store: str | Path | None) -> SweepLocation:
    """The place of a sweep that was run before. Raises as `status`."""
    from orchestrator.planning import requests

    return (
        name.location if isinstance(name, Outcome) else requests.location_named(name, _store(store))
    )


def location_for(
    sweep: SweepRequest, store: str | Path | None, data_root: str | Path | None
) -> SweepLocation:
    """Where a sweep goes; a smoke run into a store of its own."""
    from orchestrator.planning import requests

    return requests.location_for(sweep, _store(store), _folder(data_root))


# ---------------------------------------------------------------- sweep files


def schema() -> dict[str, Any]:
    """The JSON schema of a sweep file."""
    from orchestrator.spec import sweep_schema

    return sweep_schema()


def init(name: str, images: str | Path | None = None, folder: str | Path = ".") -> Path:
    """Write a commented sweep file, NAME.yaml, for a folder of one's own images.

    Args:
        images: holds one folder a class; None: the digits.
        folder: where it goes.

    Raises:
        ValueError: the file is there already, or the folder is no dataset.
    """
    from orchestrator.spec.starter import write_starter

    return write_starter(name, images, Path(folder)).file


def _store(store: str | Path | None) -> str | Path:
    return store or os.environ.get("AIRSWEEP_STORE") or STORE


def _folder(data_root: str | Path | None) -> Path | None:
    named = data_root or os.environ.get("AIRSWEEP_DATA")
    return Path(named) if named else None

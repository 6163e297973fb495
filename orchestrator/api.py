"""Python API: airsweep's commands as functions, with results as pandas DataFrames.

    import airsweep

    outcome = airsweep.run("quickstart", sets={"seeds": [1]})
    airsweep.table(outcome)

Errors are exceptions with the same message as the command's: ValueError for a wrong file, option or
name; RuntimeError if a run is refused to start. No function ends the process. Importing this module
is cheap; torch, Ray and pandas are imported when a function needs them.
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

STORE = "runs"  # default store

Options = Mapping[str, Any] | Iterable[str]  # {"iterations": 3}, or ["iterations=3"]


# ---------------------------------------------------------------- loading and planning


def load(
    spec: str | Path | SweepRequest, *, sets: Options = (), only: Options = (), smoke: bool = False
) -> SweepRequest:
    """Read and check a sweep file. The functions below accept the file or the returned request.

    Args:
        spec: sweep file, or the bare name of a sweep in ./sweeps or shipped with airsweep.
        sets: replacements for values of the file, like `--set`: {"train.steps": 100}.
        only: values of grid axes to keep, like `--only`: {"method": ["air", "cpl"]}.
        smoke: reduce every cell to one point, seed and iteration with 8 images, in a separate
            store, `<store>-smoke`.

    Raises:
        ValueError: the file or an option is wrong; the message names file, line and column.
    """
    from orchestrator.planning import SweepRequest, read_request
    from orchestrator.planning.requests import only_options, set_options

    if not isinstance(spec, SweepRequest):
        return read_request(spec, set_options(sets), only_options(only), smoke)
    if sets or only or smoke:
        raise ValueError(
            f"{spec.spec.name} is already loaded; pass sets, only and smoke to `load` instead"
        )
    return spec


def validate(
    spec: str | Path | SweepRequest, *, sets: Options = (), only: Options = ()
) -> tuple[str, ...]:
    """Return notes on settings of a sweep file that are valid but may surprise.

    Raises:
        ValueError: as for `load`.
    """
    from orchestrator.spec import notes_of

    return notes_of(load(spec, sets=sets, only=only).spec)


@dataclass(frozen=True, repr=False)
class Planned:
    """Plan of a sweep and location of its results. Its repr is the screen of `airsweep plan`."""

    plan: Plan
    location: SweepLocation

    def json(self) -> dict[str, Any]:
        """The JSON of `airsweep plan --json`."""
        from orchestrator.planning import changed_inputs, earlier_results

        plan, location = self.plan, self.location
        earlier = earlier_results(plan, location)
        return {
            **plan.json(location.store),
            "reused_from": self._sources(),
            "changed_inputs": changed_inputs(earlier),
            "stale": [
                {"stage": stage, "artifacts": count}
                for (stage, cause), count in earlier.items()
                if cause == "code"
            ],
        }

    def screen(self, explain: bool = False) -> str:
        """Text of `airsweep plan`.

        Args:
            explain: show every setting and its origin.
        """
        from orchestrator.reporting import plan_screen

        return plan_screen(self.plan, self.location, explain, self._sources())

    def _sources(self) -> dict[str, int]:
        """Number of reused trials, by the sweep that computed them."""
        from orchestrator.planning.recorded import count_by_sweep

        if not self.plan.reused:
            return {}
        store = self.location.store
        stored = [slot.key.digest for slot in self.plan.slots if store.has(slot.spec)]
        return dict(count_by_sweep(store, stored, self.location))

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
    """Plan a sweep without running anything: missing work, existing results, expected duration.

    Args:
        spec: as for `load`.
        store: store of all results. Default: AIRSWEEP_STORE, else `runs`.
        data_root: folder of real datasets. Default: AIRSWEEP_DATA.
        sets, only, smoke: as for `load`.
    """
    from orchestrator.planning import plan_of

    request = load(spec, sets=sets, only=only, smoke=smoke)
    location = location_for(request, store, data_root)
    return Planned(plan_of(request.spec, location), location)


# ---------------------------------------------------------------- running


@dataclass(frozen=True, repr=False)
class Outcome:
    """Result of a run. Its repr is the final screen of `airsweep run`.

    Attributes:
        exit_code: 0 if all trials are done, 1 if some failed, 4 if the budget is spent
            (docs/troubleshooting.md).
        sweep: the sweep that was run.
        location: location of its results.
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
    """Compute the features, LoRA weights and images that a sweep needs, but run no trial.

    Arguments and exceptions are those of `run`.
    """
    request = load(spec, sets=sets, only=only, smoke=smoke)
    return _run(request, store, data_root, quiet, prepare_only=True)


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
    """Run a sweep, or resume it: finished trials are skipped.

    A failed trial raises no exception; see `Outcome.exit_code` and `results`. Ctrl-C raises
    KeyboardInterrupt after the event log and the tracker are closed.

    Args:
        spec: as for `load`.
        store, data_root: as for `plan`.
        tracking_uri: MLflow server, or "none". Default: MLFLOW_TRACKING_URI, else a file in the
            store.
        sets, only, smoke: as for `load`.
        quiet: print errors only; by default stderr shows the progress.

    Raises:
        ValueError: the file, an option, or a dataset or model that they name is wrong.
        RuntimeError: the run was refused to start, or the disk of the store is full.
    """
    request = load(spec, sets=sets, only=only, smoke=smoke)
    return _run(request, store, data_root, quiet, tracking_uri=tracking_uri)


def retry(
    name: str | Outcome,
    failure_class: str,
    *,
    store: str | Path | None = None,
    data_root: str | Path | None = None,
    tracking_uri: str | None = None,
    quiet: bool = False,
) -> Outcome:
    """Resume a sweep, retrying only one class of failures.

    Args:
        name: name of a recorded sweep, PROJECT/NAME, or an Outcome.
        failure_class: oom, nan, timeout, infra, data, disk or user.
        store, data_root, tracking_uri, quiet: as for `run`.
    """
    from orchestrator.store import read_resolved

    sweep, location = recorded_sweep(name, store, data_root)
    options: dict[str, Any] = {"tracking_uri": tracking_uri, "retry": failure_class}
    with _restored_process():
        return _raise_if_stopped(
            execute(sweep, location, read_resolved(location), quiet, **options)
        )


def _run(
    request: SweepRequest,
    store: str | Path | None,
    data_root: str | Path | None,
    quiet: bool,
    **options: Any,
) -> Outcome:
    location = location_for(request, store, data_root)
    with _restored_process():
        return _raise_if_stopped(execute(request.spec, location, request.origin, quiet, **options))


def execute(
    sweep: SweepSpec,
    location: SweepLocation,
    origin: dict[str, Any],
    quiet: bool,
    tracking_uri: str | None = None,
    **options: Any,
) -> Outcome:
    """Call `run_sweep` with a screen and an MLflow publisher; the commands use this as well."""
    from orchestrator.execution import make_screen, run_sweep
    from orchestrator.tracking import Publisher

    publisher = Publisher(sweep, location, tracking_uri)
    code = run_sweep(sweep, location, make_screen(quiet), publisher, origin=origin, **options)
    return Outcome(code, sweep, location)


def _raise_if_stopped(outcome: Outcome) -> Outcome:
    """Raise KeyboardInterrupt or SystemExit if a signal stopped the run.

    `run_sweep` returns after a signal because it closes the event log and the tracker first.
    """
    from orchestrator.errors import INTERRUPTED, TERMINATED

    if outcome.exit_code == INTERRUPTED:
        raise KeyboardInterrupt
    if outcome.exit_code == TERMINATED:
        raise SystemExit(TERMINATED)
    return outcome


@contextmanager
def _restored_process() -> Iterator[None]:
    """Restore the environment, the SIGTERM handler and stdout after a run."""
    environment, stdout = dict(os.environ), os.dup(1)
    is_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    # Ray's daemons write to file descriptor 1 directly. Redirect it: stdout is for the caller.
    sys.stdout.flush()
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(stdout, 1)
        os.close(stdout)
        if is_main_thread and handler is not None:
            signal.signal(signal.SIGTERM, handler)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)


# ---------------------------------------------------------------- results


def status(name: str | Outcome, *, store: str | Path | None = None) -> dict[str, Any]:
    """Return the progress of a sweep, read from its event log: the JSON of `airsweep status`.

    Args:
        name, store: as for `results`.

    Raises:
        ValueError: the store has no such sweep.
    """
    from orchestrator.reporting import screens

    return screens.status_report(location_named(name, store))


def results(
    name: str | Outcome, *, store: str | Path | None = None, data_root: str | Path | None = None
) -> DataFrame:
    """Return one row per trial: varied settings, seeds, state and metrics.

    Args:
        name: name of a recorded sweep, PROJECT/NAME, or the Outcome that `run` returned.
        store, data_root: as for `plan`; `store` is ignored if `name` is an Outcome.

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
    """Return the learning curves, one row per value: trial, metric, iteration, value.

    Arguments and exceptions are those of `results`.
    """
    from orchestrator.planning import plan_of
    from orchestrator.reporting.results import curves_frame

    sweep, location = recorded_sweep(name, store, data_root)
    return curves_frame(plan_of(sweep, location), location.store)


def table(
    name: str | Outcome, *, store: str | Path | None = None, data_root: str | Path | None = None
) -> DataFrame:
    """Return the rows of `airsweep table`: mean, std and interval of each setting over its seeds.

    Arguments and exceptions are those of `results`.
    """
    from orchestrator.planning import plan_of
    from orchestrator.reporting import results_of
    from orchestrator.reporting.tables import rows_frame

    sweep, location = recorded_sweep(name, store, data_root)
    return rows_frame(results_of(plan_of(sweep, location), location.store)).infer_objects()


def recorded_sweep(
    name: str | Outcome, store: str | Path | None, data_root: str | Path | None
) -> tuple[SweepSpec, SweepLocation]:
    """Return a recorded sweep as it was last run, including `--set` values, and its location.

    Raises:
        ValueError: the store has no such sweep.
    """
    from orchestrator.planning.recorded import read_sweep

    location = location_named(name, store)
    return read_sweep(location, _folder(data_root) or location.data_root)


def location_named(name: str | Outcome, store: str | Path | None) -> SweepLocation:
    """Return the location of a recorded sweep.

    Raises:
        ValueError: the store has no such sweep.
    """
    from orchestrator.planning import requests

    if isinstance(name, Outcome):
        return name.location
    return requests.location_named(name, _store(store))


def location_for(
    sweep: SweepRequest, store: str | Path | None, data_root: str | Path | None
) -> SweepLocation:
    """Return the location of a sweep; a smoke run has a separate store."""
    from orchestrator.planning import requests

    return requests.location_for(sweep, _store(store), _folder(data_root))


# ---------------------------------------------------------------- sweep files


def schema() -> dict[str, Any]:
    """Return the JSON schema of sweep files."""
    from orchestrator.spec import sweep_schema

    return sweep_schema()


def init(name: str, images: str | Path | None = None, folder: str | Path = ".") -> Path:
    """Write a commented sweep file, NAME.yaml, for your own images or the digits dataset.

    Args:
        name: name of the new sweep.
        images: folder of your images with one folder per class. None: the digits dataset.
        folder: folder of the new file.

    Returns:
        Path of the file.

    Raises:
        ValueError: the file exists, or `images` is not a dataset.
    """
    from orchestrator.spec.starter import write_starter

    return write_starter(name, images, Path(folder)).file


def _store(store: str | Path | None) -> str | Path:
    return store or os.environ.get("AIRSWEEP_STORE") or STORE


def _folder(data_root: str | Path | None) -> Path | None:
    named = data_root or os.environ.get("AIRSWEEP_DATA")
    return Path(named) if named else None

"""Options and helpers that several commands share."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, TypeVar

import typer

from orchestrator.api import STORE as STORE  # typer reads defaults at import
from orchestrator.api import location_for as location_for
from orchestrator.api import location_named as location_named
from orchestrator.api import recorded_sweep as recorded_sweep
from orchestrator.formatting import show

if TYPE_CHECKING:
    from orchestrator.planning import Plan, SweepRequest
    from orchestrator.reporting import Results
    from orchestrator.spec import SweepSpec
    from orchestrator.store import SweepLocation

T = TypeVar("T")

SPEC_HELP = "Sweep file, or the bare name of a sweep in ./sweeps or shipped with airsweep."
SpecArgument = Annotated[str, typer.Argument(metavar="SPEC", help=SPEC_HELP)]
NameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="Name of a recorded sweep: NAME or PROJECT/NAME.")
]
StoreOption = Annotated[
    str,
    typer.Option(
        "--store",
        envvar="AIRSWEEP_STORE",
        metavar="STORE",
        help="Store of all results: a folder, file:///folder or s3://bucket/prefix.",
    ),
]
DataOption = Annotated[
    Path | None,
    typer.Option(
        "--data-root", envvar="AIRSWEEP_DATA", metavar="DIR", help="Folder of real datasets."
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="New value for a setting; repeatable."),
]
OnlyOption = Annotated[
    list[str] | None,
    typer.Option("--only", metavar="KEY=VALUE", help="Values of a grid axis to keep; repeatable."),
]
SmokeOption = Annotated[
    bool,
    typer.Option(
        "--smoke",
        help="Reduce every cell to one point, seed and iteration with 8 images, in <store>-smoke.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="Print errors only.")]
TrackingOption = Annotated[
    str | None,
    typer.Option(
        "--tracking-uri",
        metavar="URI",
        help="MLflow server, or none. Default: MLFLOW_TRACKING_URI, else a file in the store.",
    ),
]


def load(
    spec: str, sets: list[str] | None, only: list[str] | None, smoke: bool = False
) -> SweepRequest:
    """Read and check a sweep file with the options of a command."""
    from orchestrator.planning import read_request

    return read_request(spec, sets or (), only or (), smoke)


@dataclass(frozen=True)
class SweepResults:
    """A recorded sweep and its results so far."""

    sweep: SweepSpec
    location: SweepLocation
    plan: Plan
    results: Results


def read_results(name: str, store: str, data_root: Path | None) -> SweepResults:
    """Read the results of a recorded sweep.

    Raises:
        ValueError: the store has no such sweep.
    """
    from orchestrator.planning import plan_of
    from orchestrator.reporting import results

    sweep, location = recorded_sweep(name, store, data_root)
    plan = plan_of(sweep, location)
    return SweepResults(sweep, location, plan, results.results_of(plan, location.store))


def no_results_message(name: str, found: SweepResults) -> str:
    return (
        f"none of the {found.plan.total} trials of {name} has finished; "
        f"`airsweep run {found.sweep.source or name}` resumes the sweep"
    )


def fail(message: str, code: int = 2) -> NoReturn:
    show(f"airsweep: {message}", file=sys.stderr)
    sys.exit(code)


# Removed commands and options, each with its replacement.
REMOVED = {
    "data stage": "unpack the archives with tar or unzip, then run `airsweep data check`",
    "models stage": "fetch or copy the model with hf or cp, then run `airsweep models check`",
    "--probe": "`airsweep run SPEC --smoke` measures a little of the work",
    "--accept-code": "every code version has separate artifacts; if yours gives the same results "
    "as another one, add it to orchestrator/store/code_versions.json (see docs/storage.md)",
}


def refuse_removed(words: list[str]) -> None:
    """Exit with 2 if the command line names a removed command or option."""
    for name in (" ".join(words[:2]), *(word.partition("=")[0] for word in words)):
        if name in REMOVED:
            fail(f"`{name}` was removed: {REMOVED[name]}")


def exit_code_of(problem: Exception) -> int:
    """Exit code of an exception: 2 for bad input, 3 if the run was refused to start, else 1."""
    from orchestrator.errors import (
        BAD_INPUT,
        FAILED,
        REFUSED,
        BucketUnreachable,
        Refused,
        StoreRefused,
        StudiesUnreachable,
        SweepBusy,
        TrackerUnreachable,
    )

    refused = (
        Refused
        | SweepBusy
        | StoreRefused
        | TrackerUnreachable
        | BucketUnreachable
        | StudiesUnreachable
    )
    if isinstance(problem, refused):
        return REFUSED
    return BAD_INPUT if isinstance(problem, ValueError) else FAILED


def with_progress_bar(description: str, items: Iterable[T], total: int) -> Iterable[T]:
    """Yield the items; show a progress bar on stderr if it is a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    quiet = not console.is_terminal
    return track(items, description, total, console=console, transient=True, disable=quiet)

"""What commands share: options, and from names to sweeps."""

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

SpecArgument = Annotated[str, typer.Argument(metavar="SPEC", help="a sweep file, or its bare name")]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="a sweep, or PROJECT/NAME")]
StoreOption = Annotated[
    str,
    typer.Option(
        "--store",
        envvar="AIRSWEEP_STORE",
        metavar="PLACE",
        help="of all results: a folder, file:///folder or s3://bucket/prefix",
    ),
]
DataOption = Annotated[
    Path | None,
    typer.Option("--data-root", envvar="AIRSWEEP_DATA", help="folder of real datasets"),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="replace a value of the file; may repeat"),
]
OnlyOption = Annotated[
    list[str] | None,
    typer.Option("--only", metavar="KEY=VALUE", help="keep these cells of the grid; may repeat"),
]
SmokeOption = Annotated[
    bool,
    typer.Option(
        "--smoke", help="one point, seed and iteration a cell, 8 images, in <store>-smoke"
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="for scripts")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="errors only")]
TrackingOption = Annotated[
    str | None,
    typer.Option(
        "--tracking-uri", help="MLflow; default: MLFLOW_TRACKING_URI, else a file in the store"
    ),
]


def load(
    spec: str, sets: list[str] | None, only: list[str] | None, smoke: bool = False
) -> SweepRequest:
    """A sweep from its file, and how it was asked for."""
    from orchestrator.planning import read_request

    return read_request(spec, sets or (), only or (), smoke)


@dataclass(frozen=True)
class Outcome:
    """A recorded sweep, and what came out so far."""

    sweep: SweepSpec
    location: SweepLocation
    plan: Plan
    results: Results


def results_of(name: str, store: str, data_root: Path | None) -> Outcome:
    """A sweep's rows.

    Raises:
        ValueError: there is no such sweep.
    """
    from orchestrator.planning import plan_of
    from orchestrator.reporting import results

    sweep, location = recorded_sweep(name, store, data_root)
    plan = plan_of(sweep, location)
    return Outcome(sweep, location, plan, results.results_of(plan, location.store))


def no_trial(name: str, found: Outcome) -> str:
    return (
        f"{name} has no finished trial yet, of {found.plan.total}; "
        f"`airsweep run {found.sweep.source or name}` goes on"
    )


def fail(message: str, code: int = 2) -> NoReturn:
    show(f"airsweep: {message}", file=sys.stderr)
    sys.exit(code)


# Commands and options of earlier versions, and what to use instead.
REMOVED = {
    "data stage": "unpack the archives with tar or unzip, then run `airsweep data check`",
    "models stage": "fetch or copy the model with hf or cp, then run `airsweep models check`",
    "--probe": "`airsweep run SPEC --smoke` measures a little of the work",
    "--accept-code": "code of another version makes artifacts of its own; if it gives the same "
    "results, add its version to orchestrator/store/code_versions.json, as docs/storage.md says",
}


def refuse_removed(words: list[str]) -> None:
    """End with 2 where the words of a command name something that was removed."""
    for name in (" ".join(words[:2]), *(word.partition("=")[0] for word in words)):
        if name in REMOVED:
            fail(f"`{name}` was removed: {REMOVED[name]}")


def code_of(problem: Exception) -> int:
    """2 for what a user can get wrong, 3 for what was refused before it started, else 1."""
    from orchestrator.errors import (
        BAD_INPUT,
        FAILED,
        REFUSED,
        Refused,
        RemoteAway,
        StoreRefused,
        StudiesAway,
        SweepBusy,
        TrackerAway,
    )

    refused = Refused | SweepBusy | StoreRefused | TrackerAway | RemoteAway | StudiesAway
    if isinstance(problem, refused):
        return REFUSED
    return BAD_INPUT if isinstance(problem, ValueError) else FAILED


def watched(words: str, each: Iterable[T], total: int) -> Iterable[T]:
    """Passes on what is done, with a bar on a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    quiet = not console.is_terminal
    return track(each, words, total, console=console, transient=True, disable=quiet)

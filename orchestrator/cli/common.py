"""Options and helpers that several commands share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, TypeVar

import typer

from orchestrator import errors
from orchestrator.api import STORE as STORE  # typer reads defaults at import
from orchestrator.api import location_named as location_named
from orchestrator.api import recorded_sweep as recorded_sweep
from orchestrator.formatting import show

if TYPE_CHECKING:
    from orchestrator.planning.ledger import Ledger
    from orchestrator.store import SweepLocation

T = TypeVar("T")

# Groups of commands in `airsweep --help`.
START, RUN, LOOK, USE, LOOK_AFTER = "Start", "Run", "Look", "Use", "Look after"

_SPEC_HELP = "Sweep file, or the bare name of one below ./sweeps, in . or shipped with airsweep."
SpecArgument = Annotated[str, typer.Argument(metavar="SPEC", help=_SPEC_HELP)]
_NAME = typer.Argument(metavar="NAME", help="Recorded sweep: NAME, PROJECT/NAME or its sweep file.")
NameArgument = Annotated[str, _NAME]
OptionalNameArgument = Annotated[str | None, _NAME]
StoreOption = Annotated[
    str,
    typer.Option(
        "--store",
        envvar="AIRSWEEP_STORE",
        metavar="STORE",
        help="Store of all results: a folder or s3://bucket/prefix.",
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
        help="Reduce every cell to one seed and iteration with 8 images, and a search to two "
        "points, in <store>-smoke.",
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


def note_options(ledger: Ledger, location: SweepLocation) -> None:
    """Note on stderr the options of the last run, to which results belong, and later changes."""
    from orchestrator.planning.recorded import changed_folders

    if ledger.about.options:
        show(f"note: {ledger.about.options}", file=sys.stderr)
    for sentence in changed_folders(ledger, location):
        show(f"note: {sentence}", file=sys.stderr)


def fail(message: str, code: int = 2) -> NoReturn:
    show(f"airsweep: {message}", file=sys.stderr)
    sys.exit(code)


REFUSALS = (
    errors.Refused,
    errors.SweepBusy,
    errors.StoreRefused,
    errors.TrackerUnreachable,
    errors.BucketUnreachable,
)


def exit_code_of(problem: Exception) -> int:
    """Exit code of an exception: 2 for bad input, 3 if the run was refused to start, else 1."""
    if isinstance(problem, REFUSALS):
        return errors.REFUSED
    return errors.BAD_INPUT if isinstance(problem, ValueError) else errors.FAILED


@contextmanager
def progress_bar(description: str, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on stderr if it is a terminal, unless `quiet`; yields a function of the
    number of finished items and of all."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    disabled = quiet or not console.is_terminal
    # What the command prints meanwhile goes to stdout unchanged.
    with Progress(
        console=console, transient=True, redirect_stdout=False, disable=disabled
    ) as progress:
        task = progress.add_task(description, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def with_progress_bar(
    description: str, items: Iterable[T], total: int, quiet: bool = False
) -> Iterator[T]:
    """Yield the items, with a `progress_bar`."""
    with progress_bar(description, quiet) as report:
        report(0, total)
        for done, item in enumerate(items, start=1):
            yield item
            report(done, total)

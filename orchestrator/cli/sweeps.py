"""Commands that write or take a sweep file, or go on with a sweep."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from orchestrator.cli.common import (
    STORE,
    DataOption,
    JsonOption,
    NameArgument,
    OnlyOption,
    QuietOption,
    SetOption,
    SmokeOption,
    SpecArgument,
    StoreOption,
    TrackingOption,
    load,
    location_for,
    recorded_sweep,
)
from orchestrator.formatting import show

if TYPE_CHECKING:
    from orchestrator.spec import SweepSpec
    from orchestrator.store import SweepLocation

app = typer.Typer()


@app.command()
def init(
    name: Annotated[str, typer.Argument(metavar="NAME", help="of the sweep; NAME.yaml is written")],
    images: Annotated[
        Path | None,
        typer.Option("--images", metavar="DIR", help="your images, one folder a class"),
    ] = None,
) -> None:
    """Write a commented sweep file to start from, for your own images.

    airsweep init mine --images my_images

    airsweep init mine
    """
    from orchestrator.spec.starter import write_starter

    starter = write_starter(name, images, Path())
    show(starter.summary)
    show(f"{starter.file}: written; next: airsweep plan {starter.file}")


@app.command()
def schema() -> None:
    """Print the JSON schema of sweep files, for an editor.

    airsweep schema > airsweep.schema.json
    """
    from orchestrator.spec import sweep_schema

    show(json.dumps(sweep_schema(), indent=1))


@app.command()
def validate(spec: SpecArgument, sets: SetOption = None, only: OnlyOption = None) -> None:
    """Read and check a sweep file; starts nothing.

    airsweep validate sweeps/quickstart.yaml

    airsweep validate quickstart --set iterations=5
    """
    from orchestrator import api
    from orchestrator.formatting import counted
    from orchestrator.spec import cells_of

    asked = load(spec, sets, only)
    for note in api.validate(asked):
        show(f"note: {note}", file=sys.stderr)
    show(f"{asked.spec.source}: {counted(len(cells_of(asked.spec)), 'cell')}, fine")


@app.command()
def plan(
    spec: SpecArgument,
    store: StoreOption = STORE,
    data_root: DataOption = None,
    sets: SetOption = None,
    only: OnlyOption = None,
    smoke: SmokeOption = False,
    as_json: JsonOption = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="every setting and where it comes from")
    ] = False,
) -> None:
    """What would run, what is there, how long; starts nothing.

    airsweep plan quickstart

    airsweep plan sweeps/quickstart.yaml --json
    """
    from orchestrator import api

    asked = load(spec, sets, only, smoke)
    found = api.plan(asked, store=store, data_root=data_root)
    show(json.dumps(found.json(), indent=1) if as_json else found.screen(explain))


@app.command()
def prepare(
    spec: SpecArgument,
    store: StoreOption = STORE,
    data_root: DataOption = None,
    sets: SetOption = None,
    only: OnlyOption = None,
    smoke: SmokeOption = False,
    quiet: QuietOption = False,
) -> None:
    """Make features, LoRA and images of a sweep, and run no trial.

    airsweep prepare quickstart

    airsweep prepare sweeps/quickstart.yaml --only method=air
    """
    asked = load(spec, sets, only, smoke)
    location = location_for(asked, store, data_root)
    _execute(asked.spec, location, asked.origin, quiet, prepare_only=True)


@app.command()
def run(
    spec: SpecArgument,
    store: StoreOption = STORE,
    data_root: DataOption = None,
    tracking_uri: TrackingOption = None,
    sets: SetOption = None,
    only: OnlyOption = None,
    smoke: SmokeOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run a sweep, or go on with it; what is done is skipped.

    airsweep run quickstart

    airsweep run sweeps/quickstart.yaml --only method=air --set seeds=[1]
    """
    asked = load(spec, sets, only, smoke)
    location = location_for(asked, store, data_root)
    _execute(asked.spec, location, asked.origin, quiet, tracking_uri=tracking_uri)


@app.command()
def retry(
    name: NameArgument,
    failure_class: Annotated[
        str,
        typer.Option("--class", metavar="CLASS", help="oom, nan, timeout, infra, data, disk, user"),
    ],
    store: StoreOption = STORE,
    data_root: DataOption = None,
    tracking_uri: TrackingOption = None,
    quiet: QuietOption = False,
) -> None:
    """Resume a sweep, retrying only one class of failures.

    airsweep retry quickstart --class oom

    airsweep retry team/paper_main --class infra --store /shared/runs
    """
    from orchestrator.store import read_resolved

    sweep, location = recorded_sweep(name, store, data_root)
    how: dict[str, Any] = {"tracking_uri": tracking_uri, "retry": failure_class}
    _execute(sweep, location, read_resolved(location), quiet, **how)


def _execute(
    sweep: SweepSpec,
    location: SweepLocation,
    origin: dict[str, Any],
    quiet: bool,
    prepare_only: bool = False,
    **how: Any,
) -> NoReturn:
    from orchestrator import api

    # Ray's daemons print to file descriptor 1 whatever they are told; stdout is for data.
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    outcome = api.execute(sweep, location, origin, quiet, prepare_only=prepare_only, **how)
    if not quiet and not prepare_only:
        show(outcome, file=stdout)
    stdout.flush()
    sys.exit(outcome.exit_code)

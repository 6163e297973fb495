"""Commands that take a sweep file, or go on with a sweep."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from orchestrator.commands.common import (
    STORE,
    AcceptOption,
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
    asked,
    fail,
    load,
    plan_of,
    recorded_sweep,
)

if TYPE_CHECKING:
    from orchestrator.place import Place
    from orchestrator.plan import Plan
    from orchestrator.sweep import SweepSpec

app = typer.Typer()


@app.command()
def validate(spec: SpecArgument, sets: SetOption = None, only: OnlyOption = None) -> None:
    """Read and check a sweep file; starts nothing.

    airsweep validate sweeps/quickstart.yaml

    airsweep validate quickstart --set iterations=5
    """
    from orchestrator.sweep import cells_of, notes_of

    sweep = load(spec, sets, only)
    for note in notes_of(sweep):
        print(f"note: {note}", file=sys.stderr)
    print(f"{sweep.source}: {len(cells_of(sweep))} cells, fine")


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
    probe: Annotated[
        bool,
        typer.Option("--probe", help="measure a little of what was never measured in this store"),
    ] = False,
) -> None:
    """What would run, what is there, how long it would take; starts nothing.

    airsweep plan quickstart

    airsweep plan sweeps/quickstart.yaml --json

    airsweep plan quickstart --probe
    """
    from orchestrator import screens
    from orchestrator.recorded import computed_by

    sweep, place, _ = asked(spec, store, data_root, sets, only, smoke)
    planned = plan_of(sweep, place)
    if probe:
        _probe(planned, place)
        planned = plan_of(sweep, place)  # with what is known now
    sources: dict[str, int] = {}
    if planned.reused:
        there = [slot.key.digest for slot in planned.slots if place.store.has(slot.spec)]
        sources = dict(computed_by(place.store, there, place))
    if as_json:
        shown = {**planned.json(place.store), "reused_from": sources}
        print(json.dumps(shown, indent=1))
    else:
        print(screens.plan_screen(planned, place, explain, sources))


def _probe(planned: Plan, place: Place) -> None:
    from orchestrator.probe import probe_work
    from orchestrator.workshop import Workshop

    resources = planned.sweep.resources
    shop = Workshop(place.store, place.data_root, batch=resources.encoder.batch)
    probe_work(planned.work, shop, resources, lambda line: print(f"probe: {line}", file=sys.stderr))


@app.command()
def prepare(
    spec: SpecArgument,
    store: StoreOption = STORE,
    data_root: DataOption = None,
    sets: SetOption = None,
    only: OnlyOption = None,
    smoke: SmokeOption = False,
    quiet: QuietOption = False,
    accept_code: AcceptOption = None,
) -> None:
    """Make features, LoRA and images of a sweep, and run no trial.

    airsweep prepare quickstart

    airsweep prepare sweeps/quickstart.yaml --only method=air
    """
    found = asked(spec, store, data_root, sets, only, smoke)
    _execute(*found, quiet, prepare_only=True, accept_code=_stages(accept_code))


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
    accept_code: AcceptOption = None,
) -> None:
    """Run a sweep, or go on with one that was interrupted; what is done is skipped.

    airsweep run quickstart

    ray job submit --address $ADDR --working-dir . -- python -m orchestrator run
    sweeps/quickstart.yaml --store /shared/runs
    """
    found = asked(spec, store, data_root, sets, only, smoke)
    _execute(*found, quiet, tracking_uri=tracking_uri, accept_code=_stages(accept_code))


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
    """Go on with a sweep, and of what failed try one class only.

    airsweep retry quickstart --class oom

    airsweep retry team/paper_main --class infra --store /shared/runs
    """
    sweep, place = recorded_sweep(name, store, data_root)
    origin = json.loads((place.folder / "resolved.json").read_text())
    _execute(sweep, place, origin, quiet, tracking_uri=tracking_uri, retry=failure_class)


def _execute(
    sweep: SweepSpec,
    place: Place,
    origin: dict[str, Any],
    quiet: bool,
    prepare_only: bool = False,
    **how: Any,
) -> NoReturn:
    from orchestrator import driver, screens
    from orchestrator.screen import make_screen

    # Ray's daemons print to file descriptor 1 whatever they are told; stdout is for data.
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    code = driver.run_sweep(
        sweep, place, make_screen(quiet), origin=origin, prepare_only=prepare_only, **how
    )
    if not quiet and not prepare_only:
        print(screens.summary_screen(sweep, place), file=stdout)
    stdout.flush()
    sys.exit(code)


def _stages(asked: list[str] | None) -> list[str]:
    from orchestrator.keys import STAGES

    for stage in asked or []:
        if stage not in STAGES:
            fail(f"--accept-code {stage!r} is no stage; allowed: {', '.join(STAGES)}")
    return asked or []

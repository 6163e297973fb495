"""Commands that write, check, plan and run sweep files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from orchestrator import api
from orchestrator.cli.common import (
    RUN,
    START,
    STORE,
    DataOption,
    JsonOption,
    OnlyOption,
    QuietOption,
    SetOption,
    SmokeOption,
    SpecArgument,
    StoreOption,
    TrackingOption,
    fail,
)
from orchestrator.environment import redirect_descriptor
from orchestrator.formatting import aligned, show

app = typer.Typer()
plugin_app = typer.Typer(no_args_is_help=True, help="Check plugins.")


@app.command(rich_help_panel=START)
def init(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Name of the new sweep; the file is NAME.yaml.")
    ],
    images: Annotated[
        Path | None,
        typer.Option(
            "--images",
            metavar="DIR",
            help="Your images: in any folders with --classes, else one folder per class. Default: "
            "the digits dataset.",
        ),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(
            "--classes",
            metavar="NAMES",
            help="Classes of unlabelled images: names with commas between them, or a file with "
            "lines `name` or `name = how to say it`. Written to DIR/classes.txt.",
        ),
    ] = None,
) -> None:
    """Write a commented sweep file to start from.

    airsweep init mine --images photos --classes cat,dog,ship

    airsweep init mine --images my_images

    airsweep init mine
    """
    from orchestrator.planning.resources import this_machine
    from orchestrator.spec.starter import write_starter

    starter = write_starter(name, images, Path(), classes, this_machine()["GPU"] > 0)
    show(starter.summary)
    if starter.skipped:
        show("skipped: " + "\n  ".join(starter.skipped))
    show(f"wrote {starter.file}; next:")
    steps = [(f"airsweep plan {starter.file}", "what would run, and how long it takes")]
    if starter.unlabelled:
        steps = [(f"airsweep sample {starter.file}", "draws images to label: do it first"), *steps]
    show("\n".join(f"  {line}" for line in aligned(steps)))


@app.command(rich_help_panel=START)
def components(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A component, or a key of a sweep file.")
    ] = None,
) -> None:
    """List the components: what the keys of a sweep file can name, such as pseudo_labels.kind.

    With the NAME of a component also the settings that it reads and the module that defines it.

    airsweep components

    airsweep components threshold
    """
    from orchestrator.spec.components import component_lines

    show("\n".join(component_lines(name)))


@plugin_app.command("check")
def check_plugin(
    name: Annotated[str, typer.Argument(metavar="PLUGIN", help="A .py file.")],
) -> None:
    """Run the code of a plugin, and check that its components keep the contracts of their keys.

    airsweep plugin check mine.py
    """
    from orchestrator.planning.contracts import check_contract
    from orchestrator.plugins import components_of, place_of, read_plugin, use_plugins
    from orchestrator.spec.components import component_lines

    plugin = read_plugin(name, Path())
    use_plugins([plugin])
    for registry, component in components_of(plugin):
        try:
            check_contract(registry.key, component.name)
        except Exception as problem:
            fail(f"{place_of(plugin, problem)}: {registry.key} {component.name!r}: {problem}")
        show("\n".join(component_lines(component.name)))
    show(f"{name}: its components keep their contracts; digest {plugin.digest}")


@app.command(rich_help_panel=RUN)
def plan(
    spec: SpecArgument,
    store: StoreOption = STORE,
    data_root: DataOption = None,
    sets: SetOption = None,
    only: OnlyOption = None,
    smoke: SmokeOption = False,
    as_json: JsonOption = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show settings that differ from the method's preset.")
    ] = False,
    check: Annotated[
        bool,
        typer.Option("--check", help="Check the machines; exit with 2 or 3 if it would not start."),
    ] = False,
    tracking_uri: TrackingOption = None,
) -> None:
    """Show what a sweep would run, without running anything.

    Lists trials to run, existing results and the expected duration.

    airsweep plan quickstart

    airsweep plan sweeps/quickstart.yaml --check --json
    """
    request = api.load(spec, sets=sets or (), only=only or (), smoke=smoke)
    planned = api.plan(request, store=store, data_root=data_root)
    show(json.dumps(planned.json(), indent=1) if as_json else planned.screen(explain))
    if check:
        planned.check(tracking_uri)


@app.command(rich_help_panel=RUN)
def run(
    spec: SpecArgument,
    store: StoreOption = STORE,
    data_root: DataOption = None,
    tracking_uri: TrackingOption = None,
    sets: SetOption = None,
    only: OnlyOption = None,
    smoke: SmokeOption = False,
    prepare: Annotated[
        bool,
        typer.Option("--prepare", help="Make features, LoRA weights and images; run no trial."),
    ] = False,
    quiet: QuietOption = False,
) -> None:
    """Run a sweep, or resume it: finished trials are skipped.

    airsweep run quickstart

    airsweep run sweeps/quickstart.yaml --only method=air --set seeds=[1]
    """
    from orchestrator.planning.requests import location_for

    request = api.load(spec, sets=sets or (), only=only or (), smoke=smoke)
    location = location_for(request, store, data_root)
    with redirect_descriptor(1, 2):  # stdout is for data
        outcome = api.execute(
            request.spec, location, request.origin, quiet, tracking_uri, prepare=prepare
        )
    if not quiet and not prepare:
        show(outcome)
    sys.exit(outcome.exit_code)

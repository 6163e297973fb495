"""Commands that show recorded sweeps: their state, results and MLflow runs."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from orchestrator import api
from orchestrator.cli.common import (
    LOOK,
    STORE,
    JsonOption,
    NameArgument,
    OptionalNameArgument,
    StoreOption,
    fail,
    location_named,
    note_options,
    recorded_sweep,
)
from orchestrator.formatting import (
    aligned,
    format_interval,
    format_percent,
    format_time,
    format_value,
    show,
)
from orchestrator.tracking_uri import DATABASE

if TYPE_CHECKING:
    from collections.abc import Iterable

app = typer.Typer()


@app.command("list", rich_help_panel=LOOK)
def list_sweeps(store: StoreOption = STORE, as_json: JsonOption = False) -> None:
    """List the sweeps of a store: state, finished trials and best classifier.

    airsweep list

    airsweep list --store /shared/runs --json
    """
    sweeps = api.sweeps(store=store)
    if as_json:
        show(json.dumps(sweeps, indent=1))
    elif sweeps:
        options = [f"{each['sweep']}: {each['options']}" for each in sweeps if each["options"]]
        show("\n".join([*aligned([LISTED, *map(_listed, sweeps)]), *options]))
        for sentence in (each for sweep in sweeps for each in sweep["changed"]):
            show(f"note: {sentence}", file=sys.stderr)
    else:
        show(f"no sweep has run in {store}", file=sys.stderr)


LISTED = ("sweep", "state", "trials", "last event", "best classifier", "accuracy", "95 %")


def _listed(sweep: dict[str, Any]) -> tuple[str, ...]:
    best = sweep["best"]
    numbers = ["", "", ""]
    if len(best) == 1:
        row = best[0]
        interval = "" if row["mean"] is None else format_interval(row["low"], row["high"])
        interval += ", not better than chance" if row["at_chance"] else ""
        name = f"{row['classifier']} of {row['method']}"
        numbers = [name, format_percent(row["mean"]), interval]
    elif best:
        numbers[0] = f"{len(best)} tasks"
    trials = f"{sweep['finished']} of {sweep['total']}"
    last = "" if sweep["last_event"] is None else format_time(sweep["last_event"])
    return (sweep["sweep"], sweep["state"], trials, last, *numbers)


@app.command(rich_help_panel=LOOK)
def status(
    name: OptionalNameArgument = None, store: StoreOption = STORE, as_json: JsonOption = False
) -> None:
    """Show the progress of a sweep: trials by state, failures, and time. Without NAME: all sweeps.

    airsweep status quickstart

    airsweep status quickstart --json
    """
    from orchestrator.reporting import screens

    if name is None:
        list_sweeps(store, as_json)
        return
    status = screens.status_report(location_named(name, store))
    show(json.dumps(status, indent=1) if as_json else screens.status_screen(status))


@app.command(rich_help_panel=LOOK)
def logs(name: NameArgument, store: StoreOption = STORE, as_json: JsonOption = False) -> None:
    """Print the event log of a sweep: what ran when, and why it failed.

    airsweep logs quickstart

    airsweep logs quickstart --json
    """
    events = api.logs(name, store=store)
    if as_json:
        for event in events:
            show(json.dumps(event))
        return
    for event in _joined_blocks(events):
        show(_event_line(event))


def _joined_blocks(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The events, those of an artifact's blocks in one run as one event at the time of the last."""
    run, joined = 0, dict[Any, dict[str, Any]]()
    for number, event in enumerate(events):
        run += event["event"] == "sweep_started"
        if event["event"] != "artifact_prepared":
            joined[number] = event
            continue
        before = joined.pop((run, event["key"]), {"seconds": 0.0, "blocks": 0})
        seconds, count = before["seconds"] + event["seconds"], before["blocks"] + 1
        joined[run, event["key"]] = {**event, "seconds": seconds, "blocks": count}
    return [*joined.values()]


def _event_line(event: dict[str, Any]) -> str:
    words = [format_time(event["time"]), f"{event['event']:<17}"]
    if "slot" in event:
        words += [event["slot"], event.get("key", "")[:12]]
    else:
        single = [event[field] for field in ("key", "cell") if event.get(field)]
        words += [", ".join([*single, *event.get("slots", ()), *event.get("cells", ())])]
    if "failure_class" in event:
        words.append(f"{event['failure_class']}: {event['message']}")
    if event.get("blocks", 1) > 1:
        words.append(f"blocks {event['blocks']}")
    words += [f"{name} {format_value(event[name])}" for name in SHOWN_FIELDS if name in event]
    return "  ".join(filter(None, words)).rstrip()


SHOWN_FIELDS = ("to_run", "total", "user", "commit", "seconds", "exit_code")


@app.command(rich_help_panel=LOOK)
def table(
    name: NameArgument,
    store: StoreOption = STORE,
    form: Annotated[
        Literal["md", "csv", "json"],
        typer.Option("--format", metavar="FORMAT", help="Output format: md, csv or json."),
    ] = "md",
    columns: Annotated[
        Literal["fit", "all"],
        typer.Option(
            metavar="COLUMNS",
            help="Columns in Markdown: fit, those that fit 100 characters; or all. Other formats "
            "have all.",
        ),
    ] = "fit",
) -> None:
    """Print results: mean, spread, confidence interval and significance.

    airsweep table quickstart

    airsweep table quickstart --format json
    """
    from orchestrator.planning.history import results_text
    from orchestrator.reporting import results_of, tables
    from orchestrator.reporting.summary import failed_lines

    ledger, location = recorded_sweep(name, store)
    found = results_of(ledger, location.store)
    note_options(ledger, location)
    if left := ledger.to_run:
        have = results_text(ledger.results)
        show(f"note: {left} of {ledger.total} trials left to run; {have}", file=sys.stderr)
        for line in failed_lines(ledger):
            show(f"note: failed: {line}", file=sys.stderr)
    show(tables.table(found, form, columns))


@app.command(rich_help_panel=LOOK)
def report(
    name: NameArgument,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="HTML file to write [NAME.html]."),
    ] = None,
    store: StoreOption = STORE,
) -> None:
    """Write a report of a sweep, as one self-contained HTML file.

    airsweep report quickstart

    airsweep report vision/digits_main -o digits.html --store /shared/runs
    """
    ledger, location = recorded_sweep(name, store)
    output = output or Path(f"{location.name}.html")
    file = api.report(name, output, store=store)
    note_options(ledger, location)
    show(f"{output}  {file.stat().st_size / 1e6:.1f} MB", file=sys.stderr)


@app.command(rich_help_panel=LOOK)
def ui(
    store: StoreOption = STORE,
    port: Annotated[
        int, typer.Option(metavar="PORT", min=1, max=65535, help="Port to listen on.")
    ] = 5000,
) -> None:
    """Serve the store's MLflow runs as a web page, and print the address of the table of runs.

    Runs that MLflow lacks are sent first.

    Only this machine can open the page; from another, use `ssh -L 5000:127.0.0.1:5000 MACHINE`.

    airsweep ui

    airsweep ui --port 5001
    """
    from orchestrator.store import open_store
    from orchestrator.tracking import Publisher
    from orchestrator.tracking.database import (
        LOOPBACK,
        SERVER_ENVIRONMENT,
        check_database,
        run_tables,
        serve_command,
    )

    opened = open_store(store)
    root, names = opened.root, ["/".join(parts) for parts in opened.sweeps()]
    database = root / DATABASE
    try:
        if database.exists():
            check_database(database)
    except OSError as problem:
        fail(f"{problem}; move the file, and `airsweep ui` writes all runs again")
    try:
        socket.create_server((LOOPBACK, port)).close()
    except OSError as problem:
        reason = str(problem.strerror).partition(" (")[0]
        fail(f"the server cannot listen on port {port}: {reason}; choose another --port")
    for name in names:
        try:
            ledger, location = recorded_sweep(name, store)
            Publisher(ledger.about, location, f"sqlite:///{database}").export()
        except Exception as problem:  # show the other sweeps
            show(f"airsweep: {name}: {problem}", file=sys.stderr)
    if not database.exists():
        fail(f"{store} has no recorded sweep; run a sweep first, or give another --store")
    server = f"http://{LOOPBACK}:{port}"
    pages = [f"{server}/{page}" for page in run_tables(database)] or [server]
    for page in pages:
        show(page, file=sys.stderr)
    show("Ctrl-C stops the server", file=sys.stderr)
    argv = serve_command(root, port)
    os.execvpe(argv[0], argv, {**os.environ, **SERVER_ENVIRONMENT})

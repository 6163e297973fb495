"""Commands that say how a sweep stands and what came out."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.commands.common import (
    STORE,
    DataOption,
    JsonOption,
    NameArgument,
    StoreOption,
    fail,
    place_named,
    plan_of,
    recorded_sweep,
)

if TYPE_CHECKING:
    pass

app = typer.Typer()


@app.command()
def status(name: NameArgument, store: StoreOption = STORE, as_json: JsonOption = False) -> None:
    """How a sweep stands, from its ledger.

    airsweep status quickstart

    airsweep status quickstart --json
    """
    from orchestrator import screens

    place = place_named(name, store)
    found = screens.status(place)
    print(json.dumps(found, indent=1) if as_json else screens.status_screen(found))


@app.command()
def table(
    name: NameArgument,
    store: StoreOption = STORE,
    data_root: DataOption = None,
    form: Annotated[str, typer.Option("--format", help="md, csv, json or latex")] = "md",
) -> None:
    """Results as a table: mean, spread and interval of each row.

    airsweep table quickstart

    airsweep table quickstart --format json
    """
    from orchestrator import report, tables

    if form not in ("md", "csv", "json", "latex"):
        fail(f"--format {form!r} is not known; allowed: md, csv, json, latex")
    from orchestrator.results import entries_of, pruned_points

    sweep, place = recorded_sweep(name, store, data_root)
    planned = plan_of(sweep, place)
    for old in planned.stale(place.store):
        print(f"note: {old}", file=sys.stderr)
    entries = entries_of(planned, place.store)
    objective = sweep.search.objective if sweep.search else None
    rows = report.rows(entries, objective, pruned_points(planned))
    print(tables.table(rows, form, entries=entries))  # type: ignore[arg-type]

"""Commands that say how a sweep stands and what came out."""

from __future__ import annotations

import json
import sys
import time
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
    from collections.abc import Callable

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


@app.command()
def audit(
    name: NameArgument,
    store: StoreOption = STORE,
    data_root: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Are the synthetic images any good? Blank, doubled, of the wrong class, copies of test images.

    airsweep audit quickstart

    airsweep audit quickstart --json
    """
    from orchestrator.audit_screen import audit_screen, card_for_scripts
    from orchestrator.audits import audit_cards

    sweep, place = recorded_sweep(name, store, data_root)
    cards = audit_cards(sweep, place, _looking)
    if as_json:
        print(json.dumps([card_for_scripts(card) for card in cards], indent=1))
        return
    print("\n\n".join(audit_screen(card, name, place.folder) for card in cards))


def _looking(row: str) -> Callable[[int, int], None]:
    """Says how far a long look at a row of images is."""
    started = last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - started > 3 and (now - last > 5 or done == total):
            last = now
            print(f"{row}: {done:,} of {total:,} images looked at", file=sys.stderr)

    return report

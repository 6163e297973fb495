"""Commands that say how a sweep stands and what came out."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.common import (
    STORE,
    DataOption,
    JsonOption,
    NameArgument,
    StoreOption,
    fail,
    location_named,
    no_trial,
    recorded_sweep,
    results_of,
)
from orchestrator.formatting import show

if TYPE_CHECKING:
    from collections.abc import Callable

app = typer.Typer()


@app.command()
def status(name: NameArgument, store: StoreOption = STORE, as_json: JsonOption = False) -> None:
    """How a sweep stands, from its ledger.

    airsweep status quickstart

    airsweep status quickstart --json
    """
    from orchestrator.reporting import screens

    place = location_named(name, store)
    found = screens.status(place)
    show(json.dumps(found, indent=1) if as_json else screens.status_screen(found))


@app.command()
def table(
    name: NameArgument,
    store: StoreOption = STORE,
    data_root: DataOption = None,
    form: Annotated[str, typer.Option("--format", help="md, csv, json or latex")] = "md",
    down: Annotated[
        str | None,
        typer.Option(
            "--rows",
            metavar="KEY[,KEY]",
            help="lines of a table with one number a cell: dataset, paradigm, modality, method, or "
            "a setting that the sweep varies",
        ),
    ] = None,
    across: Annotated[
        str | None, typer.Option("--cols", metavar="KEY[,KEY]", help="its columns; the same keys")
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="its number: accuracy, fused, pseudo-labels, seen, unseen, ..."
        ),
    ] = None,
) -> None:
    """Results as a table: mean, spread, interval, significance.

    airsweep table quickstart

    airsweep table quickstart --format json

    airsweep table quickstart --format latex --rows method --cols dataset
    """
    from orchestrator.reporting import tables

    if form not in tables.FORMATS:
        fail(f"--format {form!r} is not known; allowed: {', '.join(tables.FORMATS)}")
    found = results_of(name, store, data_root)
    if down is None and across is None and metric is None:
        show(tables.table(found.results, form))
        return
    if not found.results.rows:
        raise ValueError(no_trial(name, found))
    keys = {"down": listed(down), "across": listed(across)}
    arranged = tables.pivot(found.results, **keys, metric=metric or tables.ACCURACY)
    show(tables.pivot_text(arranged, form))


def listed(option: str | None) -> list[str] | None:
    return None if option is None else [word.strip() for word in option.split(",") if word.strip()]


@app.command()
def report(
    name: NameArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="the file to write")],
    store: StoreOption = STORE,
    data_root: DataOption = None,
) -> None:
    """What came out of a sweep, as one HTML file.

    airsweep report quickstart -o report.html

    airsweep report vision/digits_main -o digits.html --store /shared/runs
    """
    from orchestrator.files import write_whole
    from orchestrator.reporting.html_report import page
    from orchestrator.reporting.report_data import report_data_of

    if output.is_dir() or not output.absolute().parent.is_dir():
        fail(f"-o {output}: give a file in a folder that is there, such as report.html")
    sweep, place = recorded_sweep(name, store, data_root)
    found = report_data_of(sweep, place)
    text = page(found)
    write_whole(output, text)
    show(f"{output}  {len(text.encode()) / 1e6:.1f} MB", file=sys.stderr)


@app.command()
def audit(
    name: NameArgument,
    store: StoreOption = STORE,
    data_root: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Are the synthetic images any good?

    Blank, doubled, of the wrong class, copies of test images; how near they are to real ones.

    airsweep audit quickstart

    airsweep audit quickstart --json
    """
    from orchestrator.planning.audit_card import audit_screen, card_for_scripts
    from orchestrator.stages.audits import audit_cards

    sweep, place = recorded_sweep(name, store, data_root)
    cards = audit_cards(sweep, place, _looking)
    if as_json:
        show(json.dumps([card_for_scripts(card) for card in cards], indent=1))
        return
    show("\n\n".join(audit_screen(card, name, place.folder) for card in cards))


def _looking(row: str) -> Callable[[int, int], None]:
    """Says how far a long look at a row of images is."""
    from orchestrator.execution import Screen

    lines, started = Screen(), time.monotonic()

    def report(done: int, total: int) -> None:
        if time.monotonic() - started > 3:  # most take less
            lines.progress(f"looking at {row}", done, total)

    return report

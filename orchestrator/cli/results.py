"""Commands that show the status, results and audits of a recorded sweep."""

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
    no_results_message,
    read_results,
    recorded_sweep,
)
from orchestrator.formatting import show

if TYPE_CHECKING:
    from collections.abc import Callable

app = typer.Typer()


@app.command()
def status(name: NameArgument, store: StoreOption = STORE, as_json: JsonOption = False) -> None:
    """Show the progress of a sweep: trials by state, failures, and time.

    airsweep status quickstart

    airsweep status quickstart --json
    """
    from orchestrator.reporting import screens

    status = screens.status_report(location_named(name, store))
    show(json.dumps(status, indent=1) if as_json else screens.status_screen(status))


@app.command()
def table(
    name: NameArgument,
    store: StoreOption = STORE,
    data_root: DataOption = None,
    form: Annotated[
        str,
        typer.Option("--format", metavar="FORMAT", help="Output format: md, csv, json or latex."),
    ] = "md",
    row_keys: Annotated[
        str | None,
        typer.Option(
            "--rows",
            metavar="KEY[,KEY]",
            help="Rows of a pivot table: dataset, paradigm, modality, method, or a setting that "
            "the sweep varies.",
        ),
    ] = None,
    column_keys: Annotated[
        str | None,
        typer.Option(
            "--cols", metavar="KEY[,KEY]", help="Columns of the pivot table; same keys as --rows."
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Metric of the pivot table: accuracy, fused, pseudo-labels, seen, unseen, ... "
            "Default: accuracy.",
        ),
    ] = None,
) -> None:
    """Print results: mean, spread, confidence interval and significance.

    airsweep table quickstart

    airsweep table quickstart --format json

    airsweep table quickstart --format latex --rows method --cols dataset
    """
    from orchestrator.reporting import tables

    if form not in tables.FORMATS:
        fail(f"unknown --format {form!r}; allowed: {', '.join(tables.FORMATS)}")
    recorded = read_results(name, store, data_root)
    if row_keys is None and column_keys is None and metric is None:
        show(tables.table(recorded.results, form))
        return
    if not recorded.results.rows:
        raise ValueError(no_results_message(name, recorded))
    keys = {"down": _split(row_keys), "across": _split(column_keys)}
    pivot = tables.pivot(recorded.results, **keys, metric=metric or tables.ACCURACY)
    show(tables.pivot_text(pivot, form))


def _split(option: str | None) -> list[str] | None:
    return None if option is None else [word.strip() for word in option.split(",") if word.strip()]


@app.command()
def report(
    name: NameArgument,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE", help="HTML file to write.")
    ],
    store: StoreOption = STORE,
    data_root: DataOption = None,
) -> None:
    """Write a report of a sweep, as one self-contained HTML file.

    airsweep report quickstart -o report.html

    airsweep report vision/digits_main -o digits.html --store /shared/runs
    """
    from orchestrator.files import write_atomic
    from orchestrator.reporting.html_report import page
    from orchestrator.reporting.report_data import report_data_of

    if output.is_dir() or not output.absolute().parent.is_dir():
        fail(f"-o {output}: give a file name in an existing folder, such as report.html")
    sweep, location = recorded_sweep(name, store, data_root)
    text = page(report_data_of(sweep, location))
    write_atomic(output, text)
    show(f"{output}  {len(text.encode()) / 1e6:.1f} MB", file=sys.stderr)


@app.command()
def audit(
    name: NameArgument,
    store: StoreOption = STORE,
    data_root: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check what synthetic images and denoising evidence know, before or after the trials.

    Compares the classifiers of text, images and evidence on the pool, without its labels. Counts
    blank images, duplicates, images of a wrong class and copies of test images, and measures the
    distance to real images.

    airsweep audit quickstart

    airsweep audit quickstart --json
    """
    from orchestrator.planning.cards import card_as_dict, card_screen
    from orchestrator.stages.audits import audit_cards

    sweep, location = recorded_sweep(name, store, data_root)
    cards = audit_cards(sweep, location, _audit_progress)
    if as_json:
        show(json.dumps([card_as_dict(card) for card in cards], indent=1))
        return
    show("\n\n".join(card_screen(card, name, location.folder) for card in cards))


def _audit_progress(row: str) -> Callable[[int, int], None]:
    """A callback that reports the progress of an audit, unless the audit is over within 3 s."""
    from orchestrator.execution import Screen

    screen, started = Screen(), time.monotonic()

    def report_progress(done: int, total: int) -> None:
        if time.monotonic() - started > 3:
            screen.show_progress(f"auditing {row}", done, total)

    return report_progress

"""The command that sums up device hours and storage."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from orchestrator.cli.common import STORE, JsonOption, StoreOption
from orchestrator.formatting import show

app = typer.Typer()


@app.command("usage")
def show_usage(
    store: StoreOption = STORE,
    by: Annotated[
        str,
        typer.Option("--by", metavar="KEY", help="Grouping: user, project, sweep or stage."),
    ] = "user",
    since: Annotated[
        str | None,
        typer.Option("--since", metavar="DATE", help="Oldest date of the artifacts to count."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the device hours and bytes behind the artifacts of a store.

    airsweep usage

    airsweep usage --by project --since 2026-03-01 --json

    Each artifact counts once, for the user who made it. Work without an artifact does not count.
    """
    from orchestrator.planning import usage
    from orchestrator.store import open_store

    totals = usage.usage(open_store(store), by, since)
    show(json.dumps(totals, indent=1) if as_json else usage.usage_screen(totals))

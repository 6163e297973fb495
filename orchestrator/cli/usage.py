"""The command that says who used what."""

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
    by: Annotated[str, typer.Option("--by", help="user, project, sweep or stage")] = "user",
    since: Annotated[
        str | None, typer.Option("--since", metavar="DATE", help="only what was made since then")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Device hours and bytes of all that lies in a store, by who made it.

    airsweep usage

    airsweep usage --by project --since 2026-03-01 --json

    Each artifact counts once, for who made it. Work that left nothing is not counted.
    """
    from orchestrator.planning import usage
    from orchestrator.store import open_store

    found = usage.usage(open_store(store), by, since)
    show(json.dumps(found, indent=1) if as_json else usage.usage_screen(found))

"""The command that says who used what."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from orchestrator.commands.common import STORE, JsonOption, StoreOption
from orchestrator.output import show

app = typer.Typer()


@app.command()
def usage(
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
    from orchestrator.inventory import take_inventory
    from orchestrator.makers import makers_of
    from orchestrator.store import open_store
    from orchestrator.usage import check_by, since_of, usage_screen
    from orchestrator.usage import usage as used

    asked, start = check_by(by), since_of(since)
    opened = open_store(store)
    found = used(take_inventory(opened), makers_of(opened), asked, start)
    show(json.dumps(found, indent=1) if as_json else usage_screen(found))

"""Commands that list and clean up a store."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from orchestrator.cli.common import (
    STORE,
    DataOption,
    JsonOption,
    StoreOption,
    fail,
    location_named,
)
from orchestrator.formatting import show

app = typer.Typer(no_args_is_help=True, help="List and clean up a store.")


@app.command("ls")
def cache_ls(
    store: StoreOption = STORE, data_root: DataOption = None, as_json: JsonOption = False
) -> None:
    """List artifacts with their size, owner, and the sweeps that need them.

    airsweep cache ls

    airsweep cache ls --store /shared/runs --json
    """
    from orchestrator.cli._cache_screen import listing, listing_screen
    from orchestrator.planning.recorded import all_requirements
    from orchestrator.store import open_store
    from orchestrator.store.gc import take_inventory

    opened = open_store(store)
    contents = listing(take_inventory(opened), all_requirements(opened, data_root))
    show(json.dumps(contents, indent=1) if as_json else listing_screen(contents))


@app.command("gc")
def cache_gc(
    store: StoreOption = STORE,
    data_root: DataOption = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Remove the artifacts instead of listing them.")
    ] = False,
    sweep: Annotated[
        str | None,
        typer.Option(
            "--sweep", metavar="NAME", help="Only artifacts that just this recorded sweep needs."
        ),
    ] = None,
    all_users: Annotated[
        bool, typer.Option("--all-users", help="Include artifacts of other and unknown users.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """List your artifacts that no recorded sweep needs; with --yes, remove them.

    airsweep cache gc

    airsweep cache gc --sweep old_question --yes
    """
    from orchestrator.cli._cache_screen import gc_screen
    from orchestrator.planning.recorded import all_requirements, refuse_running
    from orchestrator.store import open_store, user_name
    from orchestrator.store.gc import NOT_REMOVED, plan_gc, remove, take_inventory

    opened = open_store(store)
    location = location_named(sweep, store) if sweep else None
    refuse_running(opened)
    with opened.locks.exclusive_store():  # no sweep may start before the removal is complete
        full_name = location.full_name if location else None
        requirements = all_requirements(opened, data_root)
        gc_plan = plan_gc(take_inventory(opened), requirements, user_name(), all_users, full_name)
        if yes:
            gc_plan = remove(gc_plan)
    show(json.dumps(gc_plan.json(yes), indent=1) if as_json else gc_screen(gc_plan, yes))
    if any(removal.why == NOT_REMOVED for removal in gc_plan.others):
        fail(f"some artifacts {NOT_REMOVED}; --json lists them", 1)

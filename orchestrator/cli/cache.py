"""Commands about a store of artifacts."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from orchestrator.cli.common import (
    STORE,
    DataOption,
    JsonOption,
    StoreOption,
    fail,
    location_named,
    watched,
)
from orchestrator.formatting import show

app = typer.Typer(no_args_is_help=True, help="Look after a store of artifacts.")


@app.command("ls")
def cache_ls(
    store: StoreOption = STORE, data_root: DataOption = None, as_json: JsonOption = False
) -> None:
    """What lies in a store, whose it is, and which of it recorded sweeps need.

    airsweep cache ls

    airsweep cache ls --store /shared/runs --json
    """
    from orchestrator.cli._cache_screen import listing, listing_screen
    from orchestrator.planning.recorded import all_requirements
    from orchestrator.store import open_store
    from orchestrator.store.inventory import take_inventory

    opened = open_store(store)
    found = listing(take_inventory(opened), all_requirements(opened, data_root))
    show(json.dumps(found, indent=1) if as_json else listing_screen(found))


@app.command("verify")
def cache_verify(store: StoreOption = STORE, as_json: JsonOption = False) -> None:
    """Read every file of a store and compare it with what was written.

    Ends with 0 when nothing is damaged, else with 1.

    airsweep cache verify

    airsweep cache verify --store /shared/runs --json
    """
    from orchestrator.cli._cache_screen import verdict_screen
    from orchestrator.store import open_store
    from orchestrator.store.integrity import verify
    from orchestrator.store.inventory import take_inventory

    inventory = take_inventory(open_store(store))
    verdict = verify(inventory, lambda each, total: watched("reading files", each, total))
    show(json.dumps(verdict.json(), indent=1) if as_json else verdict_screen(verdict))
    sys.exit(1 if verdict.damaged else 0)


@app.command("gc")
def cache_gc(
    store: StoreOption = STORE,
    data_root: DataOption = None,
    yes: Annotated[bool, typer.Option("--yes", help="remove; without it they are listed")] = False,
    sweep: Annotated[
        str | None,
        typer.Option("--sweep", metavar="NAME", help="what this recorded sweep alone needs"),
    ] = None,
    all_users: Annotated[
        bool, typer.Option("--all-users", help="also what others made, or nobody knows who")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """List what no recorded sweep needs, and with --yes remove it; only what you made yourself.

    airsweep cache gc

    airsweep cache gc --sweep old_question --yes
    """
    from orchestrator.cli._cache_screen import gc_screen
    from orchestrator.planning.recorded import all_requirements, refuse_running
    from orchestrator.store import open_store, whoami
    from orchestrator.store.gc import NOT_REMOVED, plan_gc, remove
    from orchestrator.store.inventory import take_inventory

    opened = open_store(store)
    place = location_named(sweep, store) if sweep else None
    refuse_running(opened)
    with opened.locks.exclusive_store():  # until all is removed no sweep may start
        of = f"{place.project}/{place.name}" if place else None
        requirements = all_requirements(opened, data_root)
        found = plan_gc(take_inventory(opened), requirements, whoami(), all_users, of)
        if yes:
            found = remove(found)
    show(json.dumps(found.json(yes), indent=1) if as_json else gc_screen(found, yes))
    if any(one.why == NOT_REMOVED for one in found.others):
        fail(f"some of it {NOT_REMOVED}; --json names it", 1)

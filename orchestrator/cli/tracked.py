"""The command that serves the MLflow runs of a store."""

from __future__ import annotations

import os
import socket
import sys
from typing import Annotated

import typer

from orchestrator.cli.common import (
    LOOK,
    STORE,
    StoreOption,
    fail,
    recorded_sweep,
)
from orchestrator.formatting import show
from orchestrator.tracking_uri import DATABASE

app = typer.Typer()


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

"""Commands that use MLflow: its web page, and reconciling it with the store."""

from __future__ import annotations

import os
import socket
import sys
import time
from contextlib import suppress
from typing import Annotated

import typer

from orchestrator.cli.common import (
    LOOK,
    STORE,
    DataOption,
    StoreOption,
    TrackingOption,
    exit_code_of,
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
    browser: Annotated[
        bool, typer.Option(help="Open the page in a browser, if this machine has a desktop.")
    ] = True,
) -> None:
    """Serve the store's MLflow runs as a web page, and open the table of runs.

    Only this machine can open the page; from another, use `ssh -L 5000:127.0.0.1:5000 MACHINE`.

    airsweep ui

    airsweep ui --port 5001
    """
    from orchestrator.store import open_store
    from orchestrator.tracking.database import (
        LOOPBACK,
        SERVER_ENVIRONMENT,
        check_database,
        run_tables,
        serve_command,
    )

    root = open_store(store).root
    database = root / DATABASE
    if not database.exists():
        fail(f"{database} does not exist: no run was tracked in this store yet")
    try:
        check_database(database)
    except OSError as problem:
        fail(
            f"{problem}; move the file, and `airsweep mlflow reconcile NAME` writes the runs of a "
            "sweep again"
        )
    try:
        socket.create_server((LOOPBACK, port)).close()
    except OSError as problem:
        reason = str(problem.strerror).partition(" (")[0]
        fail(f"the server cannot listen on port {port}: {reason}; choose another --port")
    server = f"http://{LOOPBACK}:{port}"
    pages = [f"{server}/{page}" for page in run_tables(database)] or [server]
    for page in pages:
        show(page, file=sys.stderr)
    show("Ctrl-C stops the server", file=sys.stderr)
    if browser and any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY"))):
        _open_when_served(server, pages[0])
    argv = serve_command(root, port)
    os.execvpe(argv[0], argv, {**os.environ, **SERVER_ENVIRONMENT})


def _open_when_served(server: str, page: str) -> None:
    """Open a page in the browser as soon as the server answers, in a process of its own."""
    import urllib.request
    import webbrowser

    if os.fork():
        return
    for _ in range(120):  # seconds
        time.sleep(1.0)
        with suppress(OSError), urllib.request.urlopen(f"{server}/health", timeout=5):
            webbrowser.open(page)
            break
    os._exit(0)


mlflow_app = typer.Typer(no_args_is_help=True, help="Keep MLflow consistent with the store.")


@mlflow_app.command("reconcile")
def mlflow_reconcile(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="Sweep, or PROJECT/NAME. Default: every sweep."),
    ] = None,
    store: StoreOption = STORE,
    data_root: DataOption = None,
    tracking_uri: TrackingOption = None,
) -> None:
    """Upload to MLflow what it lacks of recorded sweeps, for instance after an outage.

    airsweep mlflow reconcile quickstart

    airsweep mlflow reconcile --tracking-uri http://mlflow:5000
    """
    from orchestrator.store import open_store
    from orchestrator.tracking import reconcile

    recorded = ["/".join(parts) for parts in open_store(store).backend.sweeps()]
    names = [name] if name else recorded
    if not names:
        fail(f"{store} has no recorded sweep; run a sweep first, or give another --store")
    problems = []
    for sweep_name in names:
        try:
            result = reconcile(*recorded_sweep(sweep_name, store, data_root), tracking_uri)
        except Exception as problem:
            if name:
                raise
            problems.append(problem)  # continue with the other sweeps
            show(f"airsweep: {sweep_name}: {problem}", file=sys.stderr)
            continue
        show(result.line())
        show(f"  {result.url}", file=sys.stderr)
    if problems:
        sys.exit(max(exit_code_of(problem) for problem in problems))

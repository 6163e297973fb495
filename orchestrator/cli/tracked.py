"""Commands about what MLflow holds."""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated

import typer

from orchestrator.cli.common import (
    STORE,
    DataOption,
    JsonOption,
    StoreOption,
    TrackingOption,
    code_of,
    fail,
    recorded_sweep,
)
from orchestrator.formatting import show

app = typer.Typer()


@app.command()
def ui(
    store: StoreOption = STORE,
    host: Annotated[str, typer.Option(help="where to listen")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="where to listen")] = 5000,
    auth: Annotated[
        bool,
        typer.Option("--auth", help="users with passwords; settings: MLFLOW_AUTH_CONFIG_PATH"),
    ] = False,
    allowed_hosts: Annotated[
        str | None, typer.Option(help="names by which it may be reached, with commas")
    ] = None,
) -> None:
    """Browse the store's MLflow runs, from this machine alone unless --auth is given.

    airsweep ui

    airsweep ui --port 5001
    """
    from orchestrator.store import open_store
    from orchestrator.tracking.exposure import check_exposure
    from orchestrator.tracking.types import SERVER_ENVIRONMENT, serve_command

    check_exposure(host, auth, allowed_hosts)
    root = open_store(store).root
    if not (root / "mlflow.db").exists():
        fail(f"{root / 'mlflow.db'} is not there: nothing was tracked in this store yet")
    argv = serve_command(root, host, port, auth, allowed_hosts)
    show(f"http://{host}:{port}  (Ctrl-C ends it)", file=sys.stderr)
    os.execvpe(argv[0], argv, {**os.environ, **SERVER_ENVIRONMENT})


@app.command()
def repro(
    run_id: Annotated[
        str, typer.Argument(metavar="RUN_ID", help="a trial's run in MLflow, or the start of it")
    ],
    store: StoreOption = STORE,
    data_root: DataOption = None,
    tracking_uri: TrackingOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compute a tracked trial again and compare it, image for image.

    Ends with 0 when it is the same or within tolerance, with 5 when it differs.

    airsweep repro 3f2a9c1d

    airsweep repro 3f2a9c1d --tracking-uri http://mlflow:5000 --json
    """
    from orchestrator.errors import DONE, GATE
    from orchestrator.planning import Resolver
    from orchestrator.store import open_store
    from orchestrator.tracking.reproduce import repro as again

    there = open_store(store).read_only()
    found = again(
        run_id,
        there,
        Resolver(there.root / "digests.json", data_root),
        tracking_uri,
        lambda line: show(line, file=sys.stderr),
    )
    show(json.dumps(found.json(), indent=1) if as_json else "\n".join(found.lines()))
    sys.exit(DONE if found.same else GATE)


@app.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="a run id, a trial key, or a slot")],
    b: Annotated[str, typer.Argument(metavar="B", help="another one")],
    store: StoreOption = STORE,
    tracking_uri: TrackingOption = None,
    as_json: JsonOption = False,
) -> None:
    """Why two trials differ: settings, inputs, code, metrics.

    airsweep diff 3f2a9c1d 8b01e7aa

    airsweep diff 3f2a9c1d 8b01e7aa --json
    """
    from orchestrator.store import open_store
    from orchestrator.tracking import find_trial
    from orchestrator.tracking.reproduce import differences

    there = open_store(store).read_only()
    found = differences(*(find_trial(one, there, tracking_uri) for one in (a, b)))
    show(json.dumps(found.json(), indent=1) if as_json else "\n".join(found.lines()))


mlflow_app = typer.Typer(no_args_is_help=True, help="Keep MLflow in step with the store.")


@mlflow_app.command("reconcile")
def mlflow_reconcile(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="a sweep, or PROJECT/NAME; without: all")
    ] = None,
    store: StoreOption = STORE,
    data_root: DataOption = None,
    tracking_uri: TrackingOption = None,
    as_json: JsonOption = False,
) -> None:
    """Tell MLflow what it has missed of sweeps: it was away, or tracking was off.

    airsweep mlflow reconcile quickstart

    airsweep mlflow reconcile --tracking-uri http://mlflow:5000
    """
    from orchestrator.store import open_store
    from orchestrator.store.location import recorded_names
    from orchestrator.tracking import reconcile

    names = [name] if name else ["/".join(one) for one in recorded_names(open_store(store))]
    if not names:
        fail(f"no sweep was recorded in {store}; run one first, or give --store")
    found, problems = [], []
    for one in names:
        try:
            found.append(reconcile(*recorded_sweep(one, store, data_root), tracking_uri))
        except Exception as problem:
            if name:
                raise
            problems.append(problem)  # the others can be told all the same
            show(f"airsweep: {one}: {problem}", file=sys.stderr)
    if as_json:
        show(json.dumps([one.json() for one in found], indent=1))
    else:
        for told in found:
            show(told.line())
            show(f"  {told.url}", file=sys.stderr)
    if problems:
        sys.exit(max(code_of(problem) for problem in problems))

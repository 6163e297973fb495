"""Commands that use MLflow: its web page, reproducing and comparing trials, reconciling."""

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
    exit_code_of,
    fail,
    recorded_sweep,
)
from orchestrator.formatting import show

app = typer.Typer()


@app.command()
def ui(
    store: StoreOption = STORE,
    host: Annotated[str, typer.Option(metavar="HOST", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="PORT", help="Port to listen on.")] = 5000,
    auth: Annotated[
        bool,
        typer.Option("--auth", help="Require a login, as MLFLOW_AUTH_CONFIG_PATH configures."),
    ] = False,
    allowed_hosts: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[,NAME]", help="Host names under which browsers may open the page."
        ),
    ] = None,
) -> None:
    """Serve the store's MLflow runs as a web page.

    Only this machine can open the page, unless --auth is given.

    airsweep ui

    airsweep ui --port 5001
    """
    from orchestrator.store import open_store
    from orchestrator.tracking.exposure import check_exposure
    from orchestrator.tracking.types import SERVER_ENVIRONMENT, serve_command

    check_exposure(host, auth, allowed_hosts)
    root = open_store(store).root
    if not (root / "mlflow.db").exists():
        fail(f"{root / 'mlflow.db'} does not exist: no run was tracked in this store yet")
    argv = serve_command(root, host, port, auth, allowed_hosts)
    show(f"http://{host}:{port}  (Ctrl-C stops the server)", file=sys.stderr)
    os.execvpe(argv[0], argv, {**os.environ, **SERVER_ENVIRONMENT})


@app.command()
def repro(
    run_id: Annotated[
        str, typer.Argument(metavar="RUN_ID", help="MLflow run id of a trial, or its beginning.")
    ],
    store: StoreOption = STORE,
    data_root: DataOption = None,
    tracking_uri: TrackingOption = None,
    as_json: JsonOption = False,
) -> None:
    """Repeat a tracked trial and compare the results.

    Compares metrics, and predictions image by image.

    Exits with 0 if the results are the same or within tolerance, with 5 if they differ.

    airsweep repro 3f2a9c1d

    airsweep repro 3f2a9c1d --tracking-uri http://mlflow:5000 --json
    """
    from orchestrator.errors import DONE, GATE
    from orchestrator.planning import Resolver
    from orchestrator.store import open_store
    from orchestrator.tracking.reproduce import repro as repeat_trial

    opened = open_store(store).read_only()
    result = repeat_trial(
        run_id,
        opened,
        Resolver(opened.root / "digests.json", data_root),
        tracking_uri,
        lambda line: show(line, file=sys.stderr),
    )
    show(json.dumps(result.json(), indent=1) if as_json else "\n".join(result.lines()))
    sys.exit(DONE if result.same else GATE)


@app.command()
def diff(
    a: Annotated[
        str, typer.Argument(metavar="A", help="First trial: MLflow run id, trial key or slot.")
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="Second trial.")],
    store: StoreOption = STORE,
    tracking_uri: TrackingOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show how two trials differ: settings, inputs, code and metrics.

    airsweep diff 3f2a9c1d 8b01e7aa

    airsweep diff 3f2a9c1d 8b01e7aa --json
    """
    from orchestrator.store import open_store
    from orchestrator.tracking import find_trial
    from orchestrator.tracking.reproduce import differences

    opened = open_store(store).read_only()
    result = differences(*(find_trial(trial, opened, tracking_uri) for trial in (a, b)))
    show(json.dumps(result.json(), indent=1) if as_json else "\n".join(result.lines()))


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
    as_json: JsonOption = False,
) -> None:
    """Upload to MLflow what it lacks of recorded sweeps, for instance after an outage.

    airsweep mlflow reconcile quickstart

    airsweep mlflow reconcile --tracking-uri http://mlflow:5000
    """
    from orchestrator.store import open_store
    from orchestrator.store.location import recorded_names
    from orchestrator.tracking import reconcile

    names = [name] if name else ["/".join(parts) for parts in recorded_names(open_store(store))]
    if not names:
        fail(f"{store} has no recorded sweep; run a sweep first, or give another --store")
    results, problems = [], []
    for sweep_name in names:
        try:
            results.append(reconcile(*recorded_sweep(sweep_name, store, data_root), tracking_uri))
        except Exception as problem:
            if name:
                raise
            problems.append(problem)  # continue with the other sweeps
            show(f"airsweep: {sweep_name}: {problem}", file=sys.stderr)
    if as_json:
        show(json.dumps([result.json() for result in results], indent=1))
    else:
        for result in results:
            show(result.line())
            show(f"  {result.url}", file=sys.stderr)
    if problems:
        sys.exit(max(exit_code_of(problem) for problem in problems))

"""The command that looks at this machine, or at a cluster, and starts nothing."""

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
    OnlyOption,
    SetOption,
    StoreOption,
    TrackingOption,
    load,
)
from orchestrator.formatting import show

app = typer.Typer()


@app.command()
def doctor(
    spec: Annotated[
        str | None,
        typer.Argument(metavar="SPEC", help="a sweep file, or its bare name", show_default=False),
    ] = None,
    store: StoreOption = STORE,
    data_root: DataOption = None,
    tracking_uri: TrackingOption = None,
    sets: SetOption = None,
    only: OnlyOption = None,
    cluster: Annotated[
        bool, typer.Option("--cluster", help="look at each machine of a cluster")
    ] = False,
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            metavar="ADDRESS",
            help="http://head:8265, to which a job is sent, or head:6379; default: RAY_ADDRESS",
        ),
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="open no connection")] = False,
    as_json: JsonOption = False,
) -> None:
    """Look whether this machine or a cluster is fit for sweeps; runs none.

    Ends with 0 when all is well, else with 3 and what to do.

    airsweep doctor quickstart

    airsweep doctor quickstart --cluster --address http://head:8265 --store /shared/runs
    """
    from orchestrator.cli import _doctor_checks as doctor_checks
    from orchestrator.environment import environment
    from orchestrator.errors import REFUSED

    at = address or os.environ.get("RAY_ADDRESS")
    if cluster and not at:
        raise ValueError("which cluster? give --address http://<head>:8265, or set RAY_ADDRESS")
    if address and not cluster:
        raise ValueError("--address: allowed with --cluster")
    if cluster and offline:
        raise ValueError("--offline: a cluster cannot be looked at without a connection")
    sweep = load(spec, sets, only) if spec else None
    request = doctor_checks.Request(sweep, store, data_root, tracking_uri, offline)
    if not cluster:
        found = doctor_checks.check_machine(request).json()
    elif "://" in str(at):
        known = {"--store": store, "--data-root": data_root, "--tracking-uri": tracking_uri}
        options = [word for name, value in known.items() if value for word in (name, str(value))]
        found = doctor_checks.report_of_job(str(at), sweep, options)
    else:
        from orchestrator.cluster.session import redirected

        with environment({"RAY_ADDRESS": str(at)}), redirected(1, 2):  # stdout is for data
            found = doctor_checks.check_cluster(request).json()
    show(json.dumps(found, indent=1) if as_json else doctor_checks.screen(found))
    sys.exit(0 if found["ok"] else REFUSED)

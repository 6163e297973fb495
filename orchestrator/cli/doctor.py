"""The command that checks this machine or a cluster before a sweep."""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated

import typer

from orchestrator.cli.common import (
    SPEC_HELP,
    STORE,
    DataOption,
    JsonOption,
    OnlyOption,
    SetOption,
    StoreOption,
    TrackingOption,
    load,
)
from orchestrator.environment import environment, redirect_descriptor
from orchestrator.errors import REFUSED
from orchestrator.formatting import show

app = typer.Typer()


@app.command()
def doctor(
    spec: Annotated[
        str | None,
        typer.Argument(metavar="SPEC", help=SPEC_HELP, show_default=False),
    ] = None,
    store: StoreOption = STORE,
    data_root: DataOption = None,
    tracking_uri: TrackingOption = None,
    sets: SetOption = None,
    only: OnlyOption = None,
    cluster: Annotated[
        bool, typer.Option("--cluster", help="Check every machine of a cluster.")
    ] = False,
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            metavar="ADDRESS",
            help="Dashboard of the cluster, http://head:8265, to check by a job, or its head, "
            "head:6379, to join. Default: RAY_ADDRESS.",
        ),
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Open no network connection.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Check whether this machine or a cluster can run sweeps.

    Runs no sweep. Exits with 0 if every check passes, else with 3, and shows a remedy for each
    problem.

    airsweep doctor quickstart

    airsweep doctor quickstart --cluster --address http://head:8265 --store /shared/runs
    """
    from orchestrator.cli import _doctor_checks as doctor_checks

    cluster_address = address or os.environ.get("RAY_ADDRESS")
    if cluster and not cluster_address:
        raise ValueError("--cluster needs --address http://<head>:8265, or RAY_ADDRESS")
    if address and not cluster:
        raise ValueError("--address is allowed only with --cluster")
    if cluster and offline:
        raise ValueError("--offline is not allowed with --cluster, which needs a connection")
    sweep = load(spec, sets, only) if spec else None
    request = doctor_checks.DoctorRequest(sweep, store, data_root, tracking_uri, offline)
    if not cluster:
        report = doctor_checks.check_machine(request).json()
    elif "://" in str(cluster_address):
        known = {"--store": store, "--data-root": data_root, "--tracking-uri": tracking_uri}
        options = [word for name, value in known.items() if value for word in (name, str(value))]
        report = doctor_checks.check_cluster_by_job(str(cluster_address), sweep, options)
    else:
        # Parts of Ray write to file descriptor 1; stdout is for data.
        with environment({"RAY_ADDRESS": str(cluster_address)}), redirect_descriptor(1, 2):
            report = doctor_checks.check_cluster(request).json()
    show(json.dumps(report, indent=1) if as_json else doctor_checks.screen(report))
    sys.exit(0 if report["ok"] else REFUSED)

"""Commands that plan a sweep, and run it here or as a job of a Ray cluster."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from orchestrator import api
from orchestrator.cli.common import (
    RUN,
    STORE,
    DataOption,
    JsonOption,
    OnlyOption,
    QuietOption,
    SetOption,
    SmokeOption,
    SpecArgument,
    StoreOption,
    TrackingOption,
)
from orchestrator.environment import redirect_descriptor
from orchestrator.errors import INTERRUPTED, Refused
from orchestrator.formatting import show

app = typer.Typer()


@app.command(rich_help_panel=RUN)
def plan(
    spec: SpecArgument,
    store: StoreOption = STORE,
    data_root: DataOption = None,
    sets: SetOption = None,
    only: OnlyOption = None,
    smoke: SmokeOption = False,
    as_json: JsonOption = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show settings that differ from the method's preset.")
    ] = False,
    check: Annotated[
        bool,
        typer.Option("--check", help="Check the machines; exit with 2 or 3 if it would not start."),
    ] = False,
    tracking_uri: TrackingOption = None,
) -> None:
    """Show what a sweep would run, without running anything.

    Lists trials to run, existing results and the expected duration.

    airsweep plan quickstart

    airsweep plan sweeps/quickstart.yaml --check --json
    """
    request = api.load(spec, sets=sets or (), only=only or (), smoke=smoke)
    planned = api.plan(request, store=store, data_root=data_root)
    show(json.dumps(planned.json(), indent=1) if as_json else planned.screen(explain))
    if check:
        planned.check(tracking_uri)


@app.command(rich_help_panel=RUN)
def run(
    spec: SpecArgument,
    store: StoreOption = STORE,
    data_root: DataOption = None,
    tracking_uri: TrackingOption = None,
    sets: SetOption = None,
    only: OnlyOption = None,
    smoke: SmokeOption = False,
    prepare: Annotated[
        bool,
        typer.Option("--prepare", help="Make features, LoRA weights and images; run no trial."),
    ] = False,
    quiet: QuietOption = False,
) -> None:
    """Run a sweep, or resume it: finished trials are skipped.

    airsweep run quickstart

    airsweep run sweeps/quickstart.yaml --only method=air --set seeds=[1]
    """
    from orchestrator.planning.requests import location_for

    request = api.load(spec, sets=sets or (), only=only or (), smoke=smoke)
    location = location_for(request, store, data_root)
    with redirect_descriptor(1, 2):  # stdout is for data
        outcome = api.execute(
            request.spec, location, request.origin, quiet, tracking_uri, prepare=prepare
        )
    if not quiet and not prepare:
        show(outcome)
    sys.exit(outcome.exit_code)


@app.command(rich_help_panel=RUN)
def submit(
    spec: SpecArgument,
    address: Annotated[
        str,
        typer.Option(
            "--address",
            envvar=["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"],
            metavar="URL",
            help="Dashboard of the cluster, http://<head>:8265.",
            show_default=False,
        ),
    ] = "",
    store: StoreOption = STORE,
    data_root: DataOption = None,
    tracking_uri: TrackingOption = None,
    sets: SetOption = None,
    only: OnlyOption = None,
    smoke: SmokeOption = False,
    env: Annotated[
        list[str] | None,
        typer.Option(
            "--env",
            metavar="NAME[=VALUE]",
            help="Environment variable of the job, not a secret; repeatable.",
        ),
    ] = None,
    python: Annotated[
        str,
        typer.Option("--python", metavar="PATH", help="Python interpreter on the cluster."),
    ] = "python",
    check: Annotated[
        bool, typer.Option("--check", help="Check the machines with `plan --check`, run nothing.")
    ] = False,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="Print the id of the job and do not wait for its end.")
    ] = False,
) -> None:
    """Run or resume a sweep on a Ray cluster by `ray job submit`, and wait for its end.

    The exit code is that of the sweep. Ctrl-C stops following the log; the job keeps running.

    airsweep submit quickstart --address http://head:8265 --store /shared/runs

    airsweep submit paper_main --address http://head:8265 --store s3://bucket/runs --no-wait
    """
    from orchestrator.cluster import job_package, jobs

    request = api.load(spec, sets=sets or (), only=only or (), smoke=smoke)
    options = job_package.job_options(request, store, data_root, tracking_uri)
    variables = job_package.job_variables(request, env or [])
    client = jobs.connect(address)
    job = jobs.Job.new(f"{variables['AIRSWEEP_PROJECT']}/{request.spec.name}", client.get_address())

    def report(text: str) -> None:
        show(f"airsweep: {job.id}: {text}", file=sys.stderr, flush=True)

    with TemporaryDirectory(prefix="airsweep-job-") as folder:
        packed_spec = job_package.pack(request, Path(folder))
        words = ["plan", "--check"] if check else ["run"]
        command = [python, "-m", "orchestrator", *words, packed_spec, *options]
        submission = jobs.start_submission(job, Path(folder), variables, command, no_wait)
        try:
            if not no_wait:
                sys.exit(jobs.wait_for_end(client, job, submission, report))
            if submission.wait():
                raise Refused("no job was started; Ray's message above says why")
        except KeyboardInterrupt:
            report(f"keeps running, if it was submitted; {job.commands}")
            sys.exit(INTERRUPTED)
        finally:
            submission.terminate()
            submission.wait()
    report(f"submitted; {job.commands}")
    show(job.id)

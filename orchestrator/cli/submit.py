"""Command that submits a sweep as a job of a Ray cluster."""

from __future__ import annotations

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
    OnlyOption,
    SetOption,
    SmokeOption,
    SpecArgument,
    StoreOption,
    TrackingOption,
)
from orchestrator.errors import INTERRUPTED, Refused
from orchestrator.formatting import show

app = typer.Typer()


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

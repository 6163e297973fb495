"""Commands that submit, list and stop sweeps as jobs of a Ray cluster."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.common import (
    RUN,
    STORE,
    DataOption,
    JsonOption,
    OnlyOption,
    SetOption,
    SmokeOption,
    SpecArgument,
    StoreOption,
    TrackingOption,
    load,
)
from orchestrator.errors import FAILED, INTERRUPTED
from orchestrator.formatting import aligned, format_time, show

if TYPE_CHECKING:
    from orchestrator.cluster import Cluster, Job

app = typer.Typer()

# Beginnings of the lines of a driver's final screen that `stop` repeats.
CLOSING = (" trials ", " next ")

AddressOption = Annotated[
    str,
    typer.Option(
        "--address",
        envvar=["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"],
        metavar="URL",
        help="Dashboard of the cluster, http://<head>:8265.",
        show_default=False,
    ),
]


@app.command(rich_help_panel=RUN)
def submit(
    spec: SpecArgument,
    address: AddressOption = "",
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
    code: Annotated[
        str | None,
        typer.Option(
            "--code",
            metavar="SOURCE",
            help="Code that the job runs: checkout (sent with the job) or installed (on the "
            "cluster). Default: checkout, if this is one.",
        ),
    ] = None,
    python: Annotated[
        str,
        typer.Option("--python", metavar="PATH", help="Python interpreter on the cluster."),
    ] = "python",
    detach: Annotated[bool, typer.Option("--detach", help="Do not follow the log.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Run or resume a sweep on a Ray cluster and follow its log.

    Ctrl-C stops following the log; the job keeps running.

    airsweep submit quickstart --address http://head:8265 --store /shared/runs

    airsweep submit sweeps/paper/paper_main.yaml --address http://head:8265 --store s3://bucket/runs
    --detach
    """
    from orchestrator.cluster import Cluster, job_package
    from orchestrator.cluster.jobs import entrypoint

    request = load(spec, sets, only, smoke)
    if as_json and not detach:
        raise ValueError("--json is allowed only with --detach: without it the log is printed")
    paths = job_package.job_paths(request, store, data_root, tracking_uri)
    with_code = job_package.sends_code(code)
    variables = job_package.job_variables(request, with_code, env or [])
    with TemporaryDirectory(prefix="airsweep-job-") as folder:
        packed_spec = job_package.pack(request, Path(folder), with_code)
        cluster = Cluster(address)
        source = "with the code of this checkout" if with_code else "without code"
        _message(f"sending {packed_spec} to {cluster.address}, {source}")
        command = entrypoint(request, paths, packed_spec, python)
        job = cluster.submit(request, paths, Path(folder), variables, command)
    if detach:
        _show_submitted(cluster, job, as_json)
    else:
        _message(f"{job.id}: submitted; Ctrl-C leaves it running")
        sys.exit(_follow(cluster, job))


@app.command()
def jobs(address: AddressOption = "", as_json: JsonOption = False) -> None:
    """List the sweeps that were submitted to a cluster, the newest last.

    Jobs that `ray job submit` has sent are listed with the sweep and the store of their command.

    airsweep jobs --address http://head:8265

    airsweep jobs --address http://head:8265 --json
    """
    from orchestrator.cluster import Cluster

    submitted = Cluster(address).jobs()
    if as_json:
        show(json.dumps([job.json() for job in submitted], indent=1))
        return
    if not submitted:
        _message("no sweep was submitted to this cluster")
        return
    rows = [("job", "sweep", "user", "state", "exit", "since", "store")]
    for job in submitted:
        code = "" if job.exit_code is None else str(job.exit_code)
        since = format_time(job.started)
        rows.append((job.id, job.sweep, job.user, job.state, code, since, job.store))
    show("\n".join(aligned(rows)))


@app.command()
def stop(
    job: Annotated[
        str, typer.Argument(metavar="JOB", help="Id of a job, or the name of a sweep of yours.")
    ],
    address: AddressOption = "",
) -> None:
    """Stop a sweep on a cluster; submit it again to resume.

    airsweep stop default-quickstart-1 --address http://head:8265

    airsweep stop quickstart --address http://head:8265
    """
    from orchestrator.cluster import Cluster
    from orchestrator.cluster.jobs import end_message

    cluster = Cluster(address)
    running = _find_job(cluster, job)
    if running.is_over:
        _message(f"{end_message(running)}: already ended")
        return
    _message(f"{running.id}: stopping")
    _message(end_message(cluster.stop(running.id)))
    log = cluster.log_of(running.id).splitlines()
    killed = "  the driver was killed before it could close; every finished trial is stored"
    for line in [line for line in log if line.startswith(CLOSING)] or [killed]:
        show(line, file=sys.stderr)


# ---------------------------------------------------------------- messages


def _message(text: str) -> None:
    show(f"airsweep: {text}", file=sys.stderr, flush=True)


def _follow(cluster: Cluster, job: Job) -> int:
    """Follow the log of a job; the exit code is the job's, or that of the interruption."""
    from orchestrator.cluster.jobs import ClusterLost, end_message

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        job = cluster.follow(job.id, write, _message)
    except KeyboardInterrupt:
        _message(f"{job.id} keeps running; its log is no longer followed")
        code = INTERRUPTED
    except ClusterLost as lost:
        _message(f"{lost}; {job.id} keeps running if the cluster still exists")
        code = FAILED
    else:
        _message(end_message(job))
        code = FAILED if job.exit_code is None else job.exit_code
    _show_next_commands(cluster, job)
    return code


def _show_submitted(cluster: Cluster, job: Job, as_json: bool) -> None:
    if as_json:
        facts = {"id": job.id, "address": cluster.address, "sweep": job.sweep, "store": job.store}
        show(json.dumps({**facts, "commands": _next_commands(cluster, job)}, indent=1))
    else:
        show(job.id)
        _show_next_commands(cluster, job)


def _next_commands(cluster: Cluster, job: Job) -> dict[str, str]:
    """Commands for a submitted job, by purpose."""
    results = [job.sweep.removeprefix("default/"), "--store", job.store]
    return {
        "follow": cluster.follow_command(job.id),
        "jobs": shlex.join(["airsweep", "jobs", "--address", cluster.address]),
        "stop": cluster.stop_command(job.id),
        "status": shlex.join(["airsweep", "status", *results]),
        "table": shlex.join(["airsweep", "table", *results]),
        "again": shlex.join(["airsweep", *sys.argv[1:]]),
    }


def _show_next_commands(cluster: Cluster, job: Job) -> None:
    after_the_end = {"table"} if job.exit_code == 0 else {"table", "again"}
    for purpose, command in _next_commands(cluster, job).items():
        if not job.is_over or purpose in after_the_end:
            show(f"  {purpose:<7} {command}", file=sys.stderr)


def _find_job(cluster: Cluster, name: str) -> Job:
    """Find a job by its id, or the running job of the current user by its sweep.

    Raises:
        ValueError: no job matches, or several do.
    """
    from orchestrator.store import user_name

    submitted = cluster.jobs()
    for job in submitted:
        if job.id == name:
            return job
    project = os.environ.get("AIRSWEEP_PROJECT") or "default"
    sweep = name if "/" in name else f"{project}/{name}"
    running = [job for job in submitted if not job.is_over]
    mine = [job for job in running if (job.sweep, job.user) == (sweep, user_name())]
    if len(mine) == 1:
        return mine[0]
    choices = ", ".join(f"{job.id}{job.of_user}" for job in mine or running) or "none"
    problem = f"several jobs of yours run {sweep}" if mine else f"no job of yours runs {sweep}"
    raise ValueError(f"{problem} at {cluster.address}; give a job id; running: {choices}")

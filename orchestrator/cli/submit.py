"""Commands about sweeps as jobs of a Ray cluster."""

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
from orchestrator.formatting import aligned, show

if TYPE_CHECKING:
    from orchestrator.cluster import Cluster, Job

app = typer.Typer()

# Rows of the screen that a driver leaves, also where it was stopped.
CLOSING = (" trials ", " again ")

AddressOption = Annotated[
    str,
    typer.Option(
        "--address",
        envvar=["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"],
        metavar="URL",
        help="of the cluster's dashboard, http://<head>:8265",
    ),
]


@app.command()
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
        typer.Option("--env", metavar="NAME[=VALUE]", help="a variable for the job; may repeat"),
    ] = None,
    code: Annotated[
        str | None,
        typer.Option(
            "--code", metavar="WHERE", help="installed: send none (default: this checkout, if any)"
        ),
    ] = None,
    python: Annotated[
        str, typer.Option("--python", metavar="PATH", help="the cluster's, if not the first there")
    ] = "python",
    detach: Annotated[bool, typer.Option("--detach", help="do not follow the log")] = False,
    as_json: JsonOption = False,
) -> None:
    """Run a sweep on a Ray cluster, or go on with it, and follow its log; Ctrl-C lets it run.

    airsweep submit quickstart --address http://head:8265 --store /shared/runs

    airsweep submit sweeps/paper_main.yaml --address http://head:8265 --store s3://bucket/runs
    --detach
    """
    from orchestrator.cluster import Cluster, job_package
    from orchestrator.cluster.jobs import entrypoint

    asked = load(spec, sets, only, smoke)
    if as_json and not detach:
        raise ValueError("--json: what is followed is a log; allowed with --detach")
    to = job_package.destination(asked, store, data_root, tracking_uri)
    with_code = job_package.sends_code(code)
    variables = job_package.variables(asked, with_code, env or [])
    with TemporaryDirectory(prefix="airsweep-job-") as folder:
        packed = job_package.pack(asked, Path(folder), with_code)
        cluster = Cluster(address)
        with_it = "with the code of this checkout" if with_code else "without code"
        _say(f"sending {packed} to {cluster.address}, {with_it}")
        what = entrypoint(asked, to, packed, python)
        job = cluster.submit(asked, to, Path(folder), variables, what)
    if detach:
        _tell_started(cluster, job, as_json)
    else:
        _say(f"{job.id}: submitted; Ctrl-C leaves it running")
        sys.exit(_followed(cluster, job))


@app.command()
def jobs(address: AddressOption = "", as_json: JsonOption = False) -> None:
    """Sweeps on a cluster that were submitted as jobs, the newest last.

    airsweep jobs --address http://head:8265

    airsweep jobs --address http://head:8265 --json
    """
    from orchestrator.cluster import Cluster
    from orchestrator.cluster.jobs import clock_time

    found = Cluster(address).jobs()
    if as_json:
        show(json.dumps([job.json() for job in found], indent=1))
        return
    if not found:
        _say("no sweep was submitted there")
        return
    rows = [("job", "sweep", "user", "state", "exit", "since", "store")]
    for job in found:
        code = "" if job.exit_code is None else str(job.exit_code)
        since = clock_time(job.started)
        rows.append((job.id, job.sweep, job.user, job.state, code, since, job.store))
    show("\n".join(aligned(rows)))


@app.command()
def stop(
    job: Annotated[str, typer.Argument(metavar="JOB", help="a job, or the sweep that it runs")],
    address: AddressOption = "",
) -> None:
    """Stop a sweep on a cluster, and wait until it has closed; to submit it again goes on.

    airsweep stop default-quickstart-1 --address http://head:8265

    airsweep stop quickstart --address http://head:8265
    """
    from orchestrator.cluster import Cluster
    from orchestrator.cluster.jobs import ending

    cluster = Cluster(address)
    found = _named(cluster, job)
    if found.over:
        _say(f"{ending(found)}: it had ended before")
        return
    _say(f"{found.id}: asked to stop")
    _say(ending(cluster.stop(found.id)))
    said = [line for line in cluster.log_of(found.id).splitlines() if line.startswith(CLOSING)]
    for line in said or ["  its driver was killed before it had closed; what is done is there"]:
        show(line, file=sys.stderr)


# ---------------------------------------------------------------- what is said


def _say(text: str) -> None:
    show(f"airsweep: {text}", file=sys.stderr, flush=True)


def _followed(cluster: Cluster, job: Job) -> int:
    """The exit code of a job, or of having left it alone."""
    from orchestrator.cluster.jobs import ClusterLost, ending
    from orchestrator.errors import FAILED, INTERRUPTED

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        job = cluster.follow(job.id, write, _say)
    except KeyboardInterrupt:
        _say(f"{job.id} goes on without being followed")
        code = INTERRUPTED
    except ClusterLost as lost:
        _say(f"{lost}; if {job.id} is there it goes on")
        code = FAILED
    else:
        _say(ending(job))
        code = FAILED if job.exit_code is None else job.exit_code
    _say_next(cluster, job)
    return code


def _tell_started(cluster: Cluster, job: Job, as_json: bool) -> None:
    if as_json:
        facts = {"id": job.id, "address": cluster.address, "sweep": job.sweep, "store": job.store}
        show(json.dumps({**facts, "commands": _next(cluster, job)}, indent=1))
    else:
        show(job.id)
        _say_next(cluster, job)


def _next(cluster: Cluster, job: Job) -> dict[str, str]:
    """What can be done about a job, and by which command."""
    results = [job.sweep.removeprefix("default/"), "--store", job.store]
    return {
        "follow": cluster.follow_command(job.id),
        "jobs": shlex.join(["airsweep", "jobs", "--address", cluster.address]),
        "stop": cluster.stop_command(job.id),
        "status": shlex.join(["airsweep", "status", *results]),
        "table": shlex.join(["airsweep", "table", *results]),
        "again": shlex.join(["airsweep", *sys.argv[1:]]),
    }


def _say_next(cluster: Cluster, job: Job) -> None:
    ended = {"table"} if job.exit_code == 0 else {"table", "again"}
    for what, command in _next(cluster, job).items():
        if not job.over or what in ended:
            show(f"  {what:<7} {command}", file=sys.stderr)


def _named(cluster: Cluster, name: str) -> Job:
    """A job by its id, or the one that runs a sweep of one's own.

    Raises:
        ValueError: there is none, or more than one.
    """
    from orchestrator.store import whoami

    found = cluster.jobs()
    for job in found:
        if job.id == name:
            return job
    project = os.environ.get("AIRSWEEP_PROJECT") or "default"
    sweep = name if "/" in name else f"{project}/{name}"
    running = [job for job in found if not job.over]
    mine = [job for job in running if (job.sweep, job.user) == (sweep, whoami())]
    if len(mine) == 1:
        return mine[0]
    known = ", ".join(f"{job.id} of {job.user}" for job in mine or running) or "none"
    count = "more than one job runs" if mine else "no job of yours runs"
    raise ValueError(f"{count} {sweep} at {cluster.address}; give the id of one: {known}")

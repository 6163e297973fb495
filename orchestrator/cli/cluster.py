"""Commands about cluster files."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from orchestrator.cli.common import OnlyOption, SetOption, SmokeOption, SpecArgument, load
from orchestrator.formatting import show

app = typer.Typer(no_args_is_help=True, help="Files for a cluster.")
render_app = typer.Typer(no_args_is_help=True, help="Print a cluster file, filled in for a sweep.")
app.add_typer(render_app, name="render")

NameOption = Annotated[
    str | None, typer.Option("--name", metavar="NAME", help="in Kubernetes; default: the sweep's")
]
ImageOption = Annotated[
    str | None,
    typer.Option("--image", metavar="IMAGE", help="of cluster/Dockerfile, as you named it"),
]
GpuOption = Annotated[int | None, typer.Option("--gpu-workers", metavar="N", help="pods with GPUs")]
CpuOption = Annotated[
    int | None,
    typer.Option(
        "--cpu-workers", metavar="N", help="pods without; default: 1 if no GPU is asked for"
    ),
]


@render_app.command("rayjob")
def render_rayjob(
    spec: SpecArgument,
    store: Annotated[
        str,
        typer.Option(
            "--store", metavar="PLACE", help="as the pods see it: a folder, or s3://bucket/prefix"
        ),
    ] = "/shared/runs",
    name: NameOption = None,
    image: ImageOption = None,
    gpu_workers: GpuOption = None,
    cpu_workers: CpuOption = None,
    queue: Annotated[
        str | None, typer.Option("--queue", metavar="NAME", help="a LocalQueue of Kueue's")
    ] = None,
    priority: Annotated[
        str | None, typer.Option("--priority", metavar="CLASS", help="a WorkloadPriorityClass")
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option("--env", metavar="NAME=VALUE", help="for the job; no secrets"),
    ] = None,
    sets: SetOption = None,
    only: OnlyOption = None,
    smoke: SmokeOption = False,
) -> None:
    """Print a KubeRay job that runs the sweep, or goes on with it.

    airsweep cluster render rayjob quickstart > job.yaml

    airsweep cluster render rayjob mine.yaml --image registry.example.org/airsweep:1 --queue team
    """
    from orchestrator.cluster.render import Wishes, environment_of, rayjob
    from orchestrator.store import whoami

    asked = load(spec, sets, only, smoke)
    given = {"AIRSWEEP_USER": whoami()}
    if asked.spec.project is None and (project := os.environ.get("AIRSWEEP_PROJECT")):
        given["AIRSWEEP_PROJECT"] = project
    wishes = Wishes(
        name=name,
        image=image,
        gpu_workers=gpu_workers,
        cpu_workers=cpu_workers,
        store=store,
        queue=queue,
        priority=priority,
        env=given | environment_of(env or ()),
        options=asked.options,
    )
    text = rayjob(asked.spec, wishes)
    if asked.spec.budget.wall is None:
        note = "no budget.wall: the job may take three days (activeDeadlineSeconds)"
        show(f"note: {note}", file=sys.stderr)
    show(text, end="")


@render_app.command("raycluster")
def render_raycluster(
    spec: SpecArgument,
    name: NameOption = None,
    image: ImageOption = None,
    gpu_workers: GpuOption = None,
    cpu_workers: CpuOption = None,
    sets: SetOption = None,
) -> None:
    """Print a standing cluster into whose workers the sweep fits; those with GPUs come with work.

    airsweep cluster render raycluster quickstart > cluster.yaml

    airsweep cluster render raycluster paper_main --gpu-workers 16
    """
    from orchestrator.cluster.render import Wishes, raycluster

    asked = load(spec, sets, None)
    wishes = Wishes(name=name, image=image, gpu_workers=gpu_workers, cpu_workers=cpu_workers)
    show(raycluster(asked.spec, wishes), end="")

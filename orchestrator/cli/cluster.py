"""Commands that render deployment files for clusters."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from orchestrator.cli.common import OnlyOption, SetOption, SmokeOption, SpecArgument, load
from orchestrator.formatting import show

app = typer.Typer(no_args_is_help=True, help="Render deployment files for a cluster.")
render_app = typer.Typer(no_args_is_help=True, help="Print a Kubernetes manifest for a sweep.")
app.add_typer(render_app, name="render")

NameOption = Annotated[
    str | None,
    typer.Option(
        "--name",
        metavar="NAME",
        help="Name of the object in Kubernetes. Default: from the sweep's name.",
    ),
]
ImageOption = Annotated[
    str | None,
    typer.Option("--image", metavar="IMAGE", help="Your image, built from cluster/Dockerfile."),
]
GpuOption = Annotated[
    int | None,
    typer.Option(
        "--gpu-workers", metavar="N", help="Worker pods with GPUs. Default: as the sweep needs."
    ),
]
CpuOption = Annotated[
    int | None,
    typer.Option(
        "--cpu-workers",
        metavar="N",
        help="Worker pods without GPUs. Default: 1 if the sweep uses no GPU, else 0.",
    ),
]


@render_app.command("rayjob")
def render_rayjob(
    spec: SpecArgument,
    store: Annotated[
        str,
        typer.Option(
            "--store",
            metavar="STORE",
            help="Store as the pods see it: an absolute folder, or s3://bucket/prefix.",
        ),
    ] = "/shared/runs",
    name: NameOption = None,
    image: ImageOption = None,
    gpu_workers: GpuOption = None,
    cpu_workers: CpuOption = None,
    queue: Annotated[
        str | None, typer.Option("--queue", metavar="NAME", help="LocalQueue of Kueue.")
    ] = None,
    priority: Annotated[
        str | None,
        typer.Option("--priority", metavar="CLASS", help="WorkloadPriorityClass of Kueue."),
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(
            "--env",
            metavar="NAME=VALUE",
            help="Environment variable of the job, not a secret; repeatable.",
        ),
    ] = None,
    sets: SetOption = None,
    only: OnlyOption = None,
    smoke: SmokeOption = False,
) -> None:
    """Print a KubeRay RayJob that runs or resumes a sweep on a temporary cluster.

    airsweep cluster render rayjob quickstart > job.yaml

    airsweep cluster render rayjob mine.yaml --image registry.example.org/airsweep:1 --queue team
    """
    from orchestrator.cluster.render import RenderOptions, parse_variables, rayjob
    from orchestrator.store import user_name

    request = load(spec, sets, only, smoke)
    variables = {"AIRSWEEP_USER": user_name()}
    if request.spec.project is None and (project := os.environ.get("AIRSWEEP_PROJECT")):
        variables["AIRSWEEP_PROJECT"] = project
    options = RenderOptions(
        name=name,
        image=image,
        gpu_workers=gpu_workers,
        cpu_workers=cpu_workers,
        store=store,
        queue=queue,
        priority=priority,
        env=variables | parse_variables(env or ()),
        run_options=request.options,
    )
    show(rayjob(request.spec, options), end="")


@render_app.command("raycluster")
def render_raycluster(
    spec: SpecArgument,
    name: NameOption = None,
    image: ImageOption = None,
    gpu_workers: GpuOption = None,
    cpu_workers: CpuOption = None,
    sets: SetOption = None,
) -> None:
    """Print a KubeRay RayCluster, a standing cluster with workers large enough for a sweep.

    Workers with GPUs start when work arrives and stop when idle.

    airsweep cluster render raycluster quickstart > cluster.yaml

    airsweep cluster render raycluster paper_main --gpu-workers 16
    """
    from orchestrator.cluster.render import RenderOptions, raycluster

    request = load(spec, sets, None)
    options = RenderOptions(
        name=name, image=image, gpu_workers=gpu_workers, cpu_workers=cpu_workers
    )
    show(raycluster(request.spec, options), end="")

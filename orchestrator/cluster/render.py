"""Cluster files filled in for a sweep, by what a laptop knows. Asks no cluster, holds no secret.

The files of `cluster/kuberay/` are what is filled in: what no option names is as it stands there.
"""

from __future__ import annotations

import copy
import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.files import ROOT, SHIPPED
from orchestrator.planning.resources import resource_shortage
from orchestrator.redact import password_at, redacted, shows_secret
from orchestrator.spec import Resources, SweepSpec
from orchestrator.spec.marked_yaml import all_documents, shown, written

SWEEP_FOLDER = "/home/ray/sweep"  # where the ConfigMap is mounted on the head
SLACK = 3600  # seconds beside `budget.wall`: pods that come, and trials that end
GPU = "nvidia.com/gpu"
QUEUE, PRIORITY = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class"
LONGEST = 47  # KubeRay's: names of pods begin with it
LABEL = r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What a sweep file does not say about the cluster; None is as the template has it."""

    name: str | None = None
    image: str | None = None
    gpu_workers: int | None = None
    cpu_workers: int | None = None
    store: str = "/shared/runs"
    queue: str | None = None
    priority: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    options: Sequence[str] = ()  # of `airsweep run`


def rayjob(sweep: SweepSpec, wishes: Wishes) -> str:
    """A ConfigMap with the sweep file and a RayJob that runs it, as YAML.

    Raises:
        ValueError: something asked for cannot be, or would put a secret into the text.
    """
    name = checked_name(wishes.name or job_name(sweep.project or "default", sweep.name))
    refuse_secrets(sweep, wishes)
    store = _allowed(
        *("--store", wishes.store, r"(/|file:///|(s3|gs|az)://).*"),
        "an absolute folder on the disk that all pods see, such as /shared/runs, or "
        "s3://bucket/prefix",
    )
    configmap, job = all_documents(template("rayjob"))
    file = f"{sweep.name}.yaml"
    configmap["metadata"]["name"] = name
    configmap["data"] = {file: sweep.text}
    job["metadata"] = {"name": name, **_labels(wishes)}
    spec = job["spec"]
    command = ("python", "-m", "orchestrator", "run", f"{SWEEP_FOLDER}/{file}")
    spec["entrypoint"] = shlex.join([*command, "--store", store, *wishes.options])
    env = {"AIRSWEEP_DATA": sweep.data_root} if sweep.data_root else {}  # else that of the pods
    spec["runtimeEnvYAML"] = json.dumps({"env_vars": env | dict(wishes.env)}) + "\n"
    if sweep.budget.wall:
        spec["activeDeadlineSeconds"] = math.ceil(sweep.budget.wall) + SLACK
    cluster = spec["rayClusterSpec"]
    for volume in cluster["headGroupSpec"]["template"]["spec"]["volumes"]:
        if volume["name"] == "sweep":
            volume["configMap"]["name"] = name
    [gpu] = cluster["workerGroupSpecs"]
    groups = worker_groups(gpu, sweep.resources, wishes)
    for group in groups:  # all are up before the sweep starts
        group["replicas"] = group["minReplicas"] = group["maxReplicas"]
    cluster["workerGroupSpecs"] = groups
    _set_image(cluster, wishes.image)
    return written([configmap, job])


def raycluster(sweep: SweepSpec, wishes: Wishes) -> str:
    """A RayCluster with workers that this sweep fits into, as YAML. Raises as `rayjob`."""
    [cluster] = all_documents(template("raycluster"))
    if wishes.name:
        cluster["metadata"]["name"] = checked_name(wishes.name)
    spec = cluster["spec"]
    [gpu] = (group for group in spec["workerGroupSpecs"] if group["groupName"] == "gpu")
    groups = worker_groups(gpu, sweep.resources, wishes)
    for group in groups:  # workers with GPUs come with work
        least = 0 if group["groupName"] == "gpu" else min(1, group["maxReplicas"])
        group["replicas"] = group["minReplicas"] = least
    spec["workerGroupSpecs"] = groups
    _set_image(spec, wishes.image)
    return written([cluster])


def template(name: str) -> str:
    """A file of `cluster/kuberay`, in a checkout or in the installed package."""
    for folder in (SHIPPED, ROOT):
        file = folder / "cluster" / "kuberay" / f"{name}.yaml"
        if file.is_file():
            return file.read_text()
    raise FileNotFoundError(f"cluster/kuberay/{name}.yaml is neither here nor in the package")


# ---------------------------------------------------------------- names and values


def job_name(project: str, sweep: str) -> str:
    """A name that Kubernetes takes: small letters, digits and dashes.

    >>> job_name("default", "paper_main")
    'air-paper-main'
    >>> job_name("Team.A", "2nd try")
    'air-team-a-2nd-try'
    """
    words = sweep if project == "default" else f"{project}-{sweep}"
    plain = re.sub(r"[^a-z0-9]+", "-", f"air-{words}".lower())
    return plain[:LONGEST].strip("-")


def checked_name(name: str) -> str:
    return _allowed(
        *("--name", name, rf"(?=.{{1,{LONGEST}}}$)[a-z]([-a-z0-9]*[a-z0-9])?"),
        f"small letters, digits and dashes, a letter first, no dash at the end, at most {LONGEST}",
    )


def _allowed(option: str, value: str, pattern: str, allowed: str) -> str:
    """
    Raises:
        ValueError: the value is not of this form.
    """
    if not re.fullmatch(pattern, value):
        raise ValueError(f"{option} {shown(value)} is not allowed; allowed: {allowed}")
    return value


def environment_of(options: Sequence[str]) -> dict[str, str]:
    """`NAME=VALUE` each.

    Raises:
        ValueError: it is none, looks like a secret, or would not arrive as it is written.
    """
    found = {}
    for option in options:
        _allowed("--env", option, r"(?s)[A-Za-z_][A-Za-z0-9_]*=.*", "NAME=VALUE")
        name, _, value = option.partition("=")
        if shows_secret(name, value):
            raise ValueError(
                f"--env {name}: this looks like a secret, and the file would show it to all who "
                "can read the job; put it into the Secret `airsweep`, of which every pod gets all "
                "keys as variables (cluster/README.md)"
            )
        if not value.isprintable() or set(value) & set("$`"):  # KubeRay's shell would read them
            raise ValueError(
                f"--env {name}: $, ` and line breaks do not arrive as written; put the value into "
                "the Secret `airsweep` instead"
            )
        found[name] = value
    return found


def refuse_secrets(sweep: SweepSpec, wishes: Wishes) -> None:
    """A login in what goes into the text.

    Raises:
        ValueError: there is one.
    """
    texts = {sweep.source: sweep.text, "--store": wishes.store}
    texts |= {option: option for option in wishes.options}
    for where, text in texts.items():
        if password_at(text) is not None:
            raise ValueError(
                f"{redacted(where)}: a login in an address would stand in the job for "
                "all to read; put MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or the "
                "keys of the bucket, into the Secret `airsweep` (cluster/README.md)"
            )


def _labels(wishes: Wishes) -> dict[str, Any]:
    if wishes.priority and not wishes.queue:
        raise ValueError("--priority is a class of Kueue's: give its --queue as well")
    labels = {
        label: _allowed(option, name, LABEL, "the name of one in Kubernetes")
        for option, label, name in (
            ("--queue", QUEUE, wishes.queue),
            ("--priority", PRIORITY, wishes.priority),
        )
        if name is not None
    }
    return {"labels": labels} if labels else {}


# ---------------------------------------------------------------- machines


def worker_groups(
    gpu: dict[str, Any], resources: Resources, wishes: Wishes
) -> list[dict[str, Any]]:
    """Groups of workers into which the sweep's trials and generators fit; `maxReplicas` of each.

    A pod has the GPUs of one trial or one generator, and the cores of all that share them.

    Args:
        gpu: a group of pods with GPUs, whose shape is kept.
    """
    asked = (resources.trial, resources.generator, resources.encoding)
    with_gpu = [want for want in asked if want.gpu]
    if not with_gpu and wishes.gpu_workers:
        raise ValueError(
            f"--gpu-workers {wishes.gpu_workers}: the sweep asks for no GPU; leave it out, or give "
            "--set resources.trial.gpu=1 or resources.generator.gpu=1"
        )
    if with_gpu and wishes.gpu_workers == 0:
        raise ValueError(
            "--gpu-workers 0: the sweep asks for GPUs; give at least 1, or --set "
            "resources.trial.gpu=0 and resources.generator.gpu=0"
        )
    devices = math.ceil(max((want.gpu for want in with_gpu), default=0))
    gpu_workers = wishes.gpu_workers
    if gpu_workers is None:
        gpu_workers = (resources.generator.actors or 1) if with_gpu else 0
    cpu_workers = wishes.cpu_workers
    if cpu_workers is None:
        cpu_workers = 0 if with_gpu else 1
    for option, count in (("--gpu-workers", gpu_workers), ("--cpu-workers", cpu_workers)):
        _allowed(option, str(count), r"\d+", "0 and more")
    most = max(want.cpu for want in asked)
    sharing = max((int(devices / want.gpu) * want.cpu for want in with_gpu), default=0)
    groups = []
    if gpu_workers:
        groups.append(_sized(gpu, "gpu", gpu_workers, max(most, sharing), devices))
    if cpu_workers:
        groups.append(_sized(gpu, "cpu", cpu_workers, most, 0))
    # Each pod has enough of what is neither core nor GPU for what asks for the most.
    custom: dict[str, float] = {}
    for want in asked:
        custom |= {name: max(n, custom.get(name, 0)) for name, n in want.custom.items()}
    for group in groups:
        if custom:  # as a shell takes it from KubeRay
            group["rayStartParams"]["resources"] = json.dumps(json.dumps(custom, sort_keys=True))
    machines = [
        {"CPU": float(limits["cpu"]), "GPU": float(limits.get(GPU, 0)), **custom}
        for limits in (_limits(group) for group in groups)
    ]
    if not machines or (why := resource_shortage(resources, machines, prepares=True)):
        raise ValueError(why if machines else "no worker is left; give --cpu-workers 1 or more")
    return groups


def _sized(
    shape: dict[str, Any], name: str, count: int, cores: float, devices: int
) -> dict[str, Any]:
    group = copy.deepcopy(shape)
    group |= {"groupName": name, "maxReplicas": count}
    limits, pod = _limits(group), group["template"]["spec"]
    limits["cpu"] = str(max(math.ceil(cores), int(limits["cpu"])))
    limits[GPU] = str(devices)
    if not devices:
        del limits[GPU], pod["tolerations"]
    pod["containers"][0]["resources"]["requests"]["cpu"] = limits["cpu"]
    return group


def _limits(group: dict[str, Any]) -> dict[str, Any]:
    limits: dict[str, Any] = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    return limits


def _set_image(cluster: dict[str, Any], image: str | None) -> None:
    if image is None:
        return
    form = "one as in [REGISTRY/]NAME:TAG"
    _allowed("--image", image, r"[A-Za-z0-9][-A-Za-z0-9._/:@]*", form)
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        group["template"]["spec"]["containers"][0]["image"] = image

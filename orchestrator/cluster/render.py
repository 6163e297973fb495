"""Render Kubernetes manifests for a sweep from the templates in `cluster/kuberay/`.

Needs no connection to a cluster, and refuses to write secrets. Values without an option stay as in
the template.
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
from orchestrator.redact import contains_secret, find_password, redact
from orchestrator.spec import Resources, SweepSpec
from orchestrator.spec.marked_yaml import all_documents, dump_documents, short_value

SWEEP_FOLDER = "/home/ray/sweep"  # mount point of the ConfigMap on the head
GPU = "nvidia.com/gpu"
QUEUE, PRIORITY = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class"
MAX_NAME_LENGTH = 47  # KubeRay's limit: it derives names of pods
LABEL = r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"


@dataclass(frozen=True, kw_only=True)
class RenderOptions:
    """Options of `airsweep cluster render`. None keeps the value of the template."""

    name: str | None = None
    image: str | None = None
    gpu_workers: int | None = None
    cpu_workers: int | None = None
    store: str = "/shared/runs"
    queue: str | None = None
    priority: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    run_options: Sequence[str] = ()  # options of `airsweep run`


def rayjob(sweep: SweepSpec, options: RenderOptions) -> str:
    """Render a ConfigMap with the sweep file and a RayJob that runs it, as YAML.

    Raises:
        ValueError: an option is invalid, or the text would contain a secret.
    """
    name = _checked_name(options.name or job_name(sweep.project or "default", sweep.name))
    _refuse_secrets(sweep, options)
    store = _checked(
        *("--store", options.store, r"(/|file:///|(s3|gs|az)://).*"),
        "an absolute folder on the disk that all pods see, such as /shared/runs, or "
        "s3://bucket/prefix",
    )
    configmap, job = all_documents(template("rayjob"))
    file = f"{sweep.name}.yaml"
    configmap["metadata"]["name"] = name
    configmap["data"] = {file: sweep.text} | _plugin_files(sweep)
    job["metadata"] = {"name": name, **_labels(options)}
    spec = job["spec"]
    command = ("python", "-m", "orchestrator", "run", f"{SWEEP_FOLDER}/{file}")
    spec["entrypoint"] = shlex.join([*command, "--store", store, *options.run_options])
    # Without a data root in the sweep, AIRSWEEP_DATA of the pods applies.
    env = {"AIRSWEEP_DATA": sweep.data_root} if sweep.data_root else {}
    spec["runtimeEnvYAML"] = json.dumps({"env_vars": env | dict(options.env)}) + "\n"
    cluster = spec["rayClusterSpec"]
    for volume in cluster["headGroupSpec"]["template"]["spec"]["volumes"]:
        if volume["name"] == "sweep":
            volume["configMap"]["name"] = name
    [gpu] = cluster["workerGroupSpecs"]
    groups = _worker_groups(gpu, sweep.resources, options)
    for group in groups:  # a fixed size: all workers start before the sweep
        group["replicas"] = group["minReplicas"] = group["maxReplicas"]
    cluster["workerGroupSpecs"] = groups
    _set_image(options.image, cluster, spec["submitterPodTemplate"])
    return dump_documents([configmap, job])


def _plugin_files(sweep: SweepSpec) -> dict[str, str]:
    """The files of a sweep's plugins; others are installed in the image.

    Raises:
        ValueError: a plugin is not beside the sweep file.
    """
    files = {one.name: one.text for one in sweep.plugins if one.name.endswith(".py")}
    for name in files:
        if "/" in name:
            raise ValueError(
                f"the plugin {name} is in another folder than {sweep.source}, but the files of a "
                "RayJob are in one; put it beside the sweep file"
            )
    return files


def raycluster(sweep: SweepSpec, options: RenderOptions) -> str:
    """Render a RayCluster with workers large enough for a sweep, as YAML.

    Raises:
        ValueError: an option is invalid.
    """
    [cluster] = all_documents(template("raycluster"))
    if options.name:
        cluster["metadata"]["name"] = _checked_name(options.name)
    spec = cluster["spec"]
    [gpu] = (group for group in spec["workerGroupSpecs"] if group["groupName"] == "gpu")
    groups = _worker_groups(gpu, sweep.resources, options)
    for group in groups:  # the autoscaler starts workers with GPUs when work needs them
        minimum = 0 if group["groupName"] == "gpu" else min(1, group["maxReplicas"])
        group["replicas"] = group["minReplicas"] = minimum
    spec["workerGroupSpecs"] = groups
    _set_image(options.image, spec)
    return dump_documents([cluster])


def template(name: str) -> str:
    """Read a file of `cluster/kuberay`, from the installed package or a checkout."""
    folder = SHIPPED if SHIPPED.is_dir() else ROOT
    return (folder / "cluster" / "kuberay" / f"{name}.yaml").read_text()


# ---------------------------------------------------------------- names and values


def job_name(project: str, sweep: str) -> str:
    """A valid name for Kubernetes: lower-case letters, digits and dashes.

    >>> job_name("default", "paper_main")
    'air-paper-main'
    >>> job_name("Team.A", "2nd try")
    'air-team-a-2nd-try'
    """
    words = sweep if project == "default" else f"{project}-{sweep}"
    plain = re.sub(r"[^a-z0-9]+", "-", f"air-{words}".lower())
    return plain[:MAX_NAME_LENGTH].strip("-")


def _checked_name(name: str) -> str:
    return _checked(
        *("--name", name, rf"(?=.{{1,{MAX_NAME_LENGTH}}}$)[a-z]([-a-z0-9]*[a-z0-9])?"),
        "lower-case letters, digits and dashes, a letter first, no dash at the end, at most "
        f"{MAX_NAME_LENGTH} characters",
    )


def _checked(option: str, value: str, pattern: str, allowed: str) -> str:
    """Return the value if it matches the pattern.

    Raises:
        ValueError: it does not match.
    """
    if not re.fullmatch(pattern, value):
        raise ValueError(f"{option} {short_value(value)} is not allowed; allowed: {allowed}")
    return value


def parse_variables(options: Sequence[str]) -> dict[str, str]:
    """Parse options of the form NAME=VALUE.

    Raises:
        ValueError: the form is wrong, or the value looks like a secret or has characters that
            KubeRay's shell would interpret.
    """
    variables = {}
    for option in options:
        _checked("--env", option, r"(?s)[A-Za-z_][A-Za-z0-9_]*=.*", "NAME=VALUE")
        name, _, value = option.partition("=")
        if contains_secret(name, value):
            raise ValueError(
                f"--env {name}: this looks like a secret, which everyone who can read the job "
                "would see; put it into the Secret `airsweep`, whose keys every pod gets as "
                "variables (cluster/README.md)"
            )
        if not value.isprintable() or set(value) & set("$`"):
            raise ValueError(
                f"--env {name}: KubeRay's shell changes values with $, ` or line breaks; put the "
                "value into the Secret `airsweep` instead"
            )
        variables[name] = value
    return variables


def _refuse_secrets(sweep: SweepSpec, options: RenderOptions) -> None:
    """Refuse texts that contain an address with a password.

    Raises:
        ValueError: the sweep file or an option contains a password.
    """
    texts = {sweep.source: sweep.text, "--store": options.store}
    texts |= {option: option for option in options.run_options}
    texts |= {plugin.name: plugin.text for plugin in sweep.plugins}
    for source, text in texts.items():
        if find_password(text) is not None:
            raise ValueError(
                f"{redact(source)}: an address contains a password, which everyone who can read "
                "the job would see; put MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
                "the keys of the bucket, into the Secret `airsweep` (cluster/README.md)"
            )


def _labels(options: RenderOptions) -> dict[str, Any]:
    if options.priority and not options.queue:
        raise ValueError("--priority is a class of Kueue and needs --queue as well")
    labels = {
        label: _checked(option, name, LABEL, "a name of Kubernetes: letters, digits, -, _ and .")
        for option, label, name in (
            ("--queue", QUEUE, options.queue),
            ("--priority", PRIORITY, options.priority),
        )
        if name is not None
    }
    return {"labels": labels} if labels else {}


# ---------------------------------------------------------------- machines


def _worker_groups(
    gpu: dict[str, Any], resources: Resources, options: RenderOptions
) -> list[dict[str, Any]]:
    """Worker groups that fit the trials and generators of a sweep, with `maxReplicas`.

    A pod has the GPUs of one trial or generator, and the cores of all processes that share them.

    Args:
        gpu: template of a group with GPUs.
    """
    processes = (resources.trial, resources.generator, resources.encoder_resources)
    with_gpu = [process for process in processes if process.gpu]
    if not with_gpu and options.gpu_workers:
        raise ValueError(
            f"--gpu-workers {options.gpu_workers}: the sweep uses no GPU; leave the option out, or "
            "give --set resources.trial.gpu=1 or --set resources.generator.gpu=1"
        )
    if with_gpu and options.gpu_workers == 0:
        raise ValueError(
            "--gpu-workers 0: the sweep needs GPUs; give at least 1, or --set "
            "resources.trial.gpu=0 and --set resources.generator.gpu=0"
        )
    devices = math.ceil(max((process.gpu for process in with_gpu), default=0))
    gpu_workers = options.gpu_workers
    if gpu_workers is None:
        gpu_workers = (resources.generator.actors or 1) if with_gpu else 0
    cpu_workers = options.cpu_workers
    if cpu_workers is None:
        cpu_workers = 0 if with_gpu else 1
    for option, count in (("--gpu-workers", gpu_workers), ("--cpu-workers", cpu_workers)):
        _checked(option, str(count), r"\d+", "0 or more")
    largest = max(process.cpu for process in processes)
    sharing = max((int(devices / p.gpu) * p.cpu for p in with_gpu), default=0)
    groups = []
    if gpu_workers:
        groups.append(_worker_group(gpu, "gpu", gpu_workers, max(largest, sharing), devices))
    if cpu_workers:
        groups.append(_worker_group(gpu, "cpu", cpu_workers, largest, 0))
    # Each pod has as much of every custom resource as the largest process needs.
    custom: dict[str, float] = {}
    for process in processes:
        custom |= {name: max(n, custom.get(name, 0)) for name, n in process.custom.items()}
    for group in groups:
        if custom:  # encoded twice, because KubeRay passes the value through a shell
            group["rayStartParams"]["resources"] = json.dumps(json.dumps(custom, sort_keys=True))
    machines = [
        {
            "CPU": float(limits["cpu"]),
            "GPU": float(limits.get(GPU, 0)),
            "memory": math.inf,
            **custom,
        }
        for limits in (_limits(group) for group in groups)
    ]
    if not machines:
        raise ValueError("the cluster would have no worker; give --cpu-workers 1 or more")
    if shortage := resource_shortage(resources, machines, prepares=True):
        raise ValueError(shortage)
    return groups


def _worker_group(
    template_group: dict[str, Any], name: str, count: int, cores: float, devices: int
) -> dict[str, Any]:
    group = copy.deepcopy(template_group)
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


def _set_image(image: str | None, cluster: dict[str, Any], *pods: dict[str, Any]) -> None:
    if image is None:
        return
    _checked("--image", image, r"[A-Za-z0-9][-A-Za-z0-9._/:@]*", "[REGISTRY/]NAME:TAG")
    groups = (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    for pod in (*pods, *(group["template"] for group in groups)):
        pod["spec"]["containers"][0]["image"] = image

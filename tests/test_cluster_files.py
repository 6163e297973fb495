"""Deployment files of `cluster/`: valid by the schemas of KubeRay and Ray, rendered for sweeps."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

from orchestrator.cluster.render import (
    RenderOptions,
    job_name,
    parse_variables,
    raycluster,
    rayjob,
)
from orchestrator.spec import SweepSpec, load_sweep
from orchestrator.spec.marked_yaml import all_documents, dump_documents, parse
from orchestrator.spec.sweep_file import sweep_from_document
from tests.helpers.plugins import MARGIN
from tests.helpers.sweeps import airsweep, write_sweep

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"
GOLDEN = Path(__file__).parent / "golden" / "cluster"
KUBERAY = json.loads((ROOT / "tests" / "fixtures" / "kuberay.json").read_text())
KINDS = ("RayJob", "RayCluster")
SBATCH = CLUSTER / "slurm" / "airsweep.sbatch"
SPEC = """# Does it help?
version: 1
name: on_gpus
project: Team.A
grid: {method: [cpl, air]}
fixed: {dataset: digits}
seeds: [1]
resources:
  trial: {cpu: 3, gpu: 0.25}
  generator: {cpu: 2, gpu: 1, actors: 4}
"""


def a_sweep(text: str = SPEC, *sets: str) -> SweepSpec:
    return sweep_from_document(parse(text, "on_gpus.yaml"), sets)


def validate_for_kuberay(document: dict[str, Any]) -> None:
    schema = {"$defs": KUBERAY["$defs"], "$ref": f"#/$defs/{document['kind']}"}
    jsonschema.validate(document, schema)


def documents_of(name: str) -> list[dict[str, Any]]:
    return all_documents((CLUSTER / "kuberay" / f"{name}.yaml").read_text())


VOLUMES = {
    *("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim"),
    *("projected", "secret"),
}


def pods(document: Any) -> list[dict[str, Any]]:
    """The specs of all pods of a manifest, with the container that KubeRay adds to the head.

    KubeRay's init container `wait-gcs-ready` has the security context of the worker's container.
    """
    if isinstance(document, list):
        return [pod for each in document for pod in pods(each)]
    if not isinstance(document, dict):
        return []
    if "containers" in document:
        return [document]
    found = pods([*document.values()])
    if document.get("enableInTreeAutoscaling"):
        sidecar = {"name": "autoscaler", **document["autoscalerOptions"]}
        found.append({**found[0], "containers": [sidecar]})
    return found


def forbidden_in(pod: dict[str, Any]) -> list[str]:
    """What the "restricted" pod security standard of Kubernetes 1.32 forbids in a pod."""
    whole = pod.get("securityContext", {})
    found = [key for key in ("hostNetwork", "hostPID", "hostIPC") if pod.get(key)]
    found += ["sysctls"] if "sysctls" in whole else []
    for volume in pod.get("volumes", []):
        found += [f"volume {kind}" for kind in volume.keys() - VOLUMES - {"name"}]
    for container in (*pod["containers"], *pod.get("initContainers", [])):
        own = container.get("securityContext", {})
        context = {**whole, **own}
        capabilities = own.get("capabilities", {})
        problems = {
            "runAsNonRoot": context.get("runAsNonRoot") is not True,
            "runAsUser": context.get("runAsUser") == 0,
            "seccompProfile": context.get("seccompProfile", {}).get("type")
            not in ("RuntimeDefault", "Localhost"),
            "allowPrivilegeEscalation": own.get("allowPrivilegeEscalation") is not False,
            "capabilities.drop": "ALL" not in capabilities.get("drop", []),
            "capabilities.add": bool({*capabilities.get("add", [])} - {"NET_BIND_SERVICE"}),
            "hostPort": any("hostPort" in port for port in container.get("ports", [])),
            **{key: key in context for key in ("privileged", "procMount", "seLinuxOptions")},
        }
        found += [f"{container['name']}: {key}" for key, wrong in problems.items() if wrong]
    return found


# ---------------------------------------------------------------- versions, image


def versions() -> dict[str, str]:
    lines = (CLUSTER / "versions.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def test_all_files_use_the_versions_of_versions_env():
    known = versions()
    for file in sorted(CLUSTER.rglob("*")):
        text = file.read_text() if file.is_file() else ""
        for base in re.findall(r"rayproject/ray:\d[\w.-]*\w", text):
            assert base.replace("-cpu", "-gpu") == known["BASE"], file
        for ray_version in re.findall(r"(?:\bRAY_VERSION=|rayVersion: )(\d[\d.]*)", text):
            assert ray_version == known["RAY_VERSION"], file
        for image in re.findall(r"\bairsweep:\d[\w.-]*\w", text):
            assert image == known["IMAGE"], file
        for minimum in re.findall(r"KubeRay (\d+\.\d+)", text):
            assert known["KUBERAY_VERSION"].startswith(f"{minimum}."), file
    assert known["RAY_VERSION"] in known["BASE"]
    assert known["RAY_VERSION"] == version("ray")
    assert known["IMAGE"] == f"airsweep:{version('airsweep')}-ray{known['RAY_VERSION']}"
    assert f"KubeRay {known['KUBERAY_VERSION']}:" in KUBERAY["$comment"]


def test_the_image_runs_as_a_user_other_than_root_and_uses_no_network():
    text = (CLUSTER / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.split(None, 1) for line in text.splitlines() if line and line[0] != "#"]
    *_, user = (rest for word, rest in lines if word == "USER")
    assert re.fullmatch(r"[1-9]\d*(:\d+)?", user)  # a number, which Kubernetes can check
    [flags] = (
        dict(pair.split("=") for pair in rest.split()) for word, rest in lines if word == "ENV"
    )
    assert flags["HF_HUB_OFFLINE"] == flags["TRANSFORMERS_OFFLINE"] == "1"
    assert flags["MLFLOW_DISABLE_TELEMETRY"] == flags["DO_NOT_TRACK"] == "true"
    assert flags["RAY_USAGE_STATS_ENABLED"] == "0"
    assert [rest for word, rest in lines if word in ("COPY", "ADD")] == [
        "--chown=1000:100 pyproject.toml /tmp/pyproject.toml",
        "--chown=1000:100 . /tmp/airsweep",
    ]


def test_the_image_contains_the_package_and_no_weights_but_the_tiny_ones():
    ignored = (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
    assert next(line for line in ignored if line and line[0] != "#") == "*"
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    target = wheel["targets"]["wheel"]
    needed = {*target["packages"], *target["force-include"], "pyproject.toml", "README.md"}
    assert {Path(name).parts[0] for name in needed} <= allowed
    tracked = subprocess.run(
        ["git", "ls-files", *sorted(allowed)], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    heavy = [name for name in tracked if (ROOT / name).stat().st_size > 2**20]
    assert all(name.startswith("air_core/tiny/weights/") for name in heavy)
    weights = [name for name in tracked if name.endswith((".safetensors", ".pt", ".bin", ".ckpt"))]
    assert all(name.startswith("air_core/tiny/weights/") for name in weights)


# ---------------------------------------------------------------- templates


@pytest.mark.parametrize("name", ["rayjob", "raycluster"])
def test_a_template_is_valid_by_the_schema_of_kuberay(name):
    documents = [document for document in documents_of(name) if document["kind"] in KINDS]
    assert documents
    for document in documents:
        validate_for_kuberay(document)


def test_the_schema_of_kuberay_refuses_a_misspelled_field_or_quantity():
    [_, job] = documents_of("rayjob")
    job["spec"]["activeDeadlineSecond"] = 1
    with pytest.raises(jsonschema.ValidationError, match="activeDeadlineSecond"):
        validate_for_kuberay(job)
    del job["spec"]["activeDeadlineSecond"]
    [submitter] = job["spec"]["submitterPodTemplate"]["spec"]["containers"]
    submitter["resources"]["limits"]["memory"] = "1GiB"
    with pytest.raises(jsonschema.ValidationError, match="'1GiB' does not match"):
        validate_for_kuberay(job)


@pytest.mark.parametrize("name", ["rayjob", "raycluster"])
def test_the_head_requires_a_token_from_a_secret(name):
    [cluster] = (
        document["spec"].get("rayClusterSpec", document["spec"])
        for document in documents_of(name)
        if document["kind"] in KINDS
    )
    assert cluster["authOptions"] == {"mode": "token", "secretName": "airsweep-ray"}
    head = cluster["headGroupSpec"]
    memory = {"object-store-memory": "1000000000"}
    assert head["rayStartParams"] == {"dashboard-host": "0.0.0.0", "num-cpus": "0", **memory}
    assert all(group["rayStartParams"] == memory for group in cluster["workerGroupSpecs"])
    assert "serviceType" not in head  # ClusterIP: the dashboard is visible inside the cluster only


@pytest.mark.parametrize(
    ("name", "count"),
    [("rayjob", 3), ("raycluster", 4), ("mlflow", 1)],  # with submitter and autoscaler
)
def test_all_pods_pass_the_restricted_profile_of_kubernetes(name, count):
    found = pods(documents_of(name))
    assert len(found) == count
    assert [forbidden_in(pod) for pod in found] == [[]] * count


def test_a_pod_without_a_security_context_does_not_pass():
    [job] = (document for document in documents_of("rayjob") if document["kind"] == "RayJob")
    pod = job["spec"]["submitterPodTemplate"]["spec"]
    del pod["securityContext"], pod["containers"][0]["securityContext"]
    pod["volumes"] = [{"name": "disk", "hostPath": {"path": "/"}}]
    wrong = ("runAsNonRoot", "seccompProfile", "allowPrivilegeEscalation", "capabilities.drop")
    assert forbidden_in(pod) == ["volume hostPath", *(f"ray-job-submitter: {key}" for key in wrong)]


@pytest.mark.parametrize("name", ["rayjob", "raycluster", "mlflow"])
def test_no_template_contains_a_secret(name):
    for container in (one for pod in pods(documents_of(name)) for one in pod["containers"]):
        parse_variables([f"{one['name']}={one['value']}" for one in container.get("env", [])])
    text = (CLUSTER / "kuberay" / f"{name}.yaml").read_text()
    assert not re.search(r"://[^\s/@:]+:[^\s/@]+@", text)


def test_python_code_in_the_templates_compiles():
    for name in ("rayjob", "raycluster"):
        for container in (one for pod in pods(documents_of(name)) for one in pod["containers"]):
            for hook in container.get("lifecycle", {}).values():
                [*interpreter, code] = hook["exec"]["command"]
                if interpreter[0] == "python":
                    compile(code, name, "exec")


def test_the_shared_mlflow_takes_its_passwords_from_a_secret():
    _, service, deployment = documents_of("mlflow")
    pod = deployment["spec"]["template"]
    assert pod["metadata"]["labels"] == service["spec"]["selector"]
    [container] = pod["spec"]["containers"]
    assert container["envFrom"] == [{"secretRef": {"name": "mlflow"}}]
    command = container["command"]
    assert "--app-name=basic-auth" in command
    assert "--serve-artifacts" in command
    assert any(word.startswith("--allowed-hosts=mlflow:5000,") for word in command)
    [port] = container["ports"]
    assert service["spec"]["ports"][0]["targetPort"] == port["containerPort"] == 5000
    assert "type" not in service["spec"]
    template = {"metadata": pod["metadata"], "spec": pod["spec"]}
    jsonschema.validate(template, {"$defs": KUBERAY["$defs"], "$ref": "#/$defs/pod"})


def test_the_file_for_ray_up_is_valid_by_ray_s_schema():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((CLUSTER / "ray" / "on_prem.yaml").read_text())
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    prepared = prepare_config(config)  # as `ray up` does
    validate_config(prepared)
    [machines] = prepared["available_node_types"].values()
    assert machines["max_workers"] == len(config["provider"]["worker_ips"])
    for command in (*config["head_start_ray_commands"], *config["worker_start_ray_commands"]):
        if command != "ray stop":
            assert "RAY_AUTH_MODE=token" in command
            assert "--object-store-memory=1000000000" in command


# ---------------------------------------------------------------- Slurm, without Slurm


def test_srun_passes_the_cpus_per_task_of_the_job():
    """Slurm 22.05 to 23.11 does not; the Slurm of Debian 13 does, so that no run can show it."""
    [call] = re.findall(r"^ +srun (?:.*\\\n)*.*", SBATCH.read_text(), re.MULTILINE)
    assert '--cpus-per-task="$SLURM_CPUS_PER_TASK"' in call


@pytest.mark.integration
@pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs Debian's package shellcheck")
def test_shellcheck_accepts_the_slurm_script():
    done = subprocess.run(["shellcheck", SBATCH], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_slurm_script_explains_wrong_calls(tmp_path):
    for arguments, message in (((), "usage: sbatch"), (("a.yaml", "runs"), "set AIRSWEEP_PYTHON")):
        environment = {"PATH": os.environ["PATH"]}
        done = subprocess.run(
            ["bash", SBATCH, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert message in done.stderr


# ---------------------------------------------------------------- rendered files


def valid_job(text: str) -> dict[str, Any]:
    [_, job] = yaml.safe_load_all(text)
    validate_for_kuberay(job)
    assert [forbidden for pod in pods(job) for forbidden in forbidden_in(pod)] == []
    return job


@pytest.mark.parametrize(
    "file", sorted((ROOT / "sweeps").rglob("*.yaml")), ids=lambda one: one.stem
)
def test_every_shipped_sweep_can_be_rendered_as_a_job(file):
    sweep = load_sweep(file)
    text = rayjob(sweep, RenderOptions())
    job = valid_job(text)
    [configmap, _] = yaml.safe_load_all(text)
    assert configmap["data"] == {f"{sweep.name}.yaml": file.read_text()}
    [volume] = (
        one
        for one in job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["volumes"]
        if "configMap" in one
    )
    assert volume["configMap"]["name"] == configmap["metadata"]["name"] == job["metadata"]["name"]
    [cluster] = yaml.safe_load_all(raycluster(sweep, RenderOptions()))
    validate_for_kuberay(cluster)


def test_a_rendered_job_contains_its_plugins(tmp_path):
    (tmp_path / "margin.py").write_text(MARGIN)
    body = "plugins: [margin.py]\nfixed: {method: pseudo, pseudo_labels.kind: margin}\n"
    spec = write_sweep(tmp_path, "plugged", body)
    [configmap, _] = yaml.safe_load_all(rayjob(load_sweep(spec), RenderOptions()))
    assert configmap["data"] == {"plugged.yaml": spec.read_text(), "margin.py": MARGIN}
    (tmp_path / "own").mkdir()
    (tmp_path / "margin.py").rename(tmp_path / "own" / "margin.py")
    spec.write_text(spec.read_text().replace("margin.py", "own/margin.py"))
    with pytest.raises(ValueError, match=r"put it beside the sweep file"):
        rayjob(load_sweep(spec), RenderOptions())


OPTIONS = {
    "queued": RenderOptions(
        image="registry.example.org/airsweep:1",
        queue="team-queue",
        priority="high",
        store="s3://air/runs",
        env={"AIRSWEEP_USER": "ada", "MLFLOW_TRACKING_URI": "http://mlflow:5000"},
        run_options=["--only", "method=air", "--set", "seeds=[1, 2]"],
    ),
    "cpu": RenderOptions(name="small", cpu_workers=2),
}
CPU_ONLY = ("resources.trial.gpu=0", "resources.generator.gpu=0")


@pytest.mark.parametrize("name", OPTIONS)
def test_rendered_jobs_equal_the_golden_files(name):
    sweep = a_sweep(SPEC, *(CPU_ONLY if name == "cpu" else ()))
    text = rayjob(sweep, OPTIONS[name])
    valid_job(text)
    golden = GOLDEN / f"rayjob_{name}.yaml"
    if os.environ.get("AIRSWEEP_UPDATE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text()


@pytest.mark.parametrize(
    ("sets", "options", "expected"),
    [
        # A worker has the cores of all trials that share its GPU. Each actor has a worker.
        ((), {}, {"gpu": ("12", "1", 4)}),
        (["resources.generator.gpu=2"], {"gpu_workers": 3}, {"gpu": ("24", "2", 3)}),
        (CPU_ONLY, {"cpu_workers": 2}, {"cpu": ("8", None, 2)}),
        (
            ["resources.trial.gpu=0"],
            {"gpu_workers": 1, "cpu_workers": 5},
            {"gpu": ("8", "1", 1), "cpu": ("8", None, 5)},
        ),
    ],
)
def test_workers_fit_the_trials_and_generators_of_the_sweep(sets, options, expected):
    """`expected` has cores, GPUs and number of workers of each group."""
    job = valid_job(rayjob(a_sweep(SPEC, *sets), RenderOptions(**options)))
    result = {}
    for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        [container] = group["template"]["spec"]["containers"]
        limits = container["resources"]["limits"]
        gpus = limits.get("nvidia.com/gpu")
        result[group["groupName"]] = (limits["cpu"], gpus, group["replicas"])
        assert ("tolerations" in group["template"]["spec"]) == (gpus is not None)
    assert result == expected


def test_a_standing_cluster_starts_without_gpu_workers():
    options = RenderOptions(gpu_workers=16, cpu_workers=3)
    [cluster] = yaml.safe_load_all(raycluster(a_sweep(), options))
    validate_for_kuberay(cluster)
    result = {
        group["groupName"]: (group["minReplicas"], group["maxReplicas"])
        for group in cluster["spec"]["workerGroupSpecs"]
    }
    assert result == {"gpu": (0, 16), "cpu": (1, 3)}
    assert cluster["spec"]["enableInTreeAutoscaling"] is True


def test_the_data_root_of_the_sweep_overrides_that_of_the_pods():
    sweep = a_sweep(SPEC + "data_root: /shared/more\n")
    spec = valid_job(rayjob(sweep, RenderOptions()))["spec"]
    assert yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"] == {"AIRSWEEP_DATA": "/shared/more"}


NASTY = ["--set", "a='$HOME'", "--only", "x=a>b", "--set", 'q=`id` \\ "!" ; & *']


def test_options_with_special_characters_survive_two_shells():
    """KubeRay's submitter writes the entrypoint to a script, `ray job submit` to a command."""
    job = valid_job(rayjob(a_sweep(), RenderOptions(run_options=NASTY)))
    words = shlex.split(job["spec"]["entrypoint"])
    for _ in range(2):
        script = f"printf '%s\\0' {shlex.join(words)}"
        done = subprocess.run(["bash", "-ce", script], capture_output=True, text=True, check=True)
        assert done.stdout.split("\0")[:-1] == words
    assert words[-len(NASTY) :] == NASTY


def test_any_sweep_name_becomes_a_valid_name_for_kubernetes():
    long = job_name("Some.Project", "x" * 70)
    assert len(long) == 47
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", job_name("default", "9_Lives__"))


@pytest.mark.parametrize(
    ("options", "sets", "message"),
    [
        ({"name": "Ümlaut"}, (), "--name"),
        ({"name": "a" * 48}, (), "at most 47"),
        ({"name": "ends-"}, (), "no dash at the end"),
        ({"gpu_workers": -1}, (), "allowed: 0 or more"),
        ({"cpu_workers": -2}, (), "allowed: 0 or more"),
        ({"gpu_workers": 0}, (), "the sweep needs GPUs"),
        ({"gpu_workers": 2}, CPU_ONLY, "the sweep uses no GPU"),
        ({"cpu_workers": 0}, CPU_ONLY, "would have no worker"),
        ({"store": "runs"}, (), "an absolute folder"),
        ({"store": "s3://key:word@air/runs"}, (), "contains a password"),
        ({"image": "not an image"}, (), "--image"),
        ({"priority": "high"}, (), "--queue"),
        ({"queue": "a b"}, (), "--queue"),
        (
            {"run_options": ["--set", "tracking.uri=http://me:word@mlflow"]},
            (),
            "contains a password",
        ),
    ],
)
def test_invalid_options_are_refused_without_showing_a_password(options, sets, message):
    with pytest.raises(ValueError, match=re.escape(message)) as problem:
        rayjob(a_sweep(SPEC, *sets), RenderOptions(**options))
    assert "word@" not in str(problem.value)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("AWS_SECRET_ACCESS_KEY=abc", "into the Secret"),
        ("some_api_key=abc", "into the Secret"),
        ("MLFLOW_TRACKING_URI=https://me:abc@mlflow", "into the Secret"),
        *((option, "--env") for option in ("A", "9=1", "A B=1", "A=$HOME", "A=`id`", "A=1\nB=2")),
    ],
)
def test_a_variable_that_is_secret_or_needs_quoting_is_refused(option, message):
    with pytest.raises(ValueError, match=message) as problem:
        parse_variables([option])
    assert "abc" not in str(problem.value)


@pytest.mark.parametrize(
    "text", ["1e3", "yes", "0x1F", "12:30", "null", "~", "2.60", "", " a\n b ", "a\x85b"]
)
def test_written_strings_are_strings_for_every_yaml_parser(text):
    out = dump_documents([{"value": text}])
    assert yaml.safe_load(out) == parse(out, "here").value == {"value": text}


def test_render_prints_only_the_job_and_exits_with_2_on_an_invalid_option(tmp_path):
    file = tmp_path / "on_gpus.yaml"
    file.write_text(SPEC)
    command = ("cluster", "render", "rayjob", file)
    variables = {"AIRSWEEP_USER": "ada", "AIRSWEEP_PROJECT": "theirs"}
    done = airsweep(*command, "--queue", "q", "--only", "method=air", "--env", "A=b c", **variables)
    job = valid_job(done.stdout)
    assert job["metadata"] == {
        "name": "air-team-a-on-gpus",
        "labels": {"kueue.x-k8s.io/queue-name": "q"},
    }
    assert yaml.safe_load(job["spec"]["runtimeEnvYAML"]) == {
        "env_vars": {"AIRSWEEP_USER": "ada", "A": "b c"}
    }
    assert job["spec"]["entrypoint"].endswith("--store /shared/runs --only method=air")
    for wrong in (("--gpu-workers", "0"), ("--name", "No"), ("--env", "MY_SECRET=x")):
        done = airsweep(*command, *wrong, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert wrong[0] in done.stderr


def test_an_installed_airsweep_contains_the_templates():
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert wheel["targets"]["wheel"]["force-include"]["cluster"] == "orchestrator/shipped/cluster"

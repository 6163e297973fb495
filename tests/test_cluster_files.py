"""Deployment files of `cluster/`: valid by the schema of KubeRay, of equal versions."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
import yaml

from orchestrator.__main__ import app
from tests.helpers.sweeps import run_command

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"
KUBERAY = json.loads((ROOT / "tests" / "fixtures" / "kuberay.json").read_text())
SBATCH = CLUSTER / "slurm" / "airsweep.sbatch"

# The "restricted" pod security standard of Kubernetes; KubeRay gives its own containers those of
# the head or of a worker.
USER = {"runAsNonRoot": True, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}}
CLOSED = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
VOLUMES = {"name", "configMap", "emptyDir", "persistentVolumeClaim"}


def pods(document: Any) -> list[dict[str, Any]]:
    """The specs of all pods of a manifest."""
    if isinstance(document, list):
        return [pod for each in document for pod in pods(each)]
    if not isinstance(document, dict):
        return []
    return [document] if "containers" in document else pods([*document.values()])


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
    tracked = run_command(["git", "ls-files", *sorted(allowed)], cwd=ROOT).stdout.split()
    heavy = [name for name in tracked if (ROOT / name).stat().st_size > 2**20]
    assert all(name.startswith("air_core/tiny/weights/") for name in heavy)
    weights = [name for name in tracked if name.endswith((".safetensors", ".pt", ".bin", ".ckpt"))]
    assert all(name.startswith("air_core/tiny/weights/") for name in weights)


# ---------------------------------------------------------------- files for KubeRay


@pytest.mark.parametrize("name", ["rayjob", "raycluster"])
def test_a_file_is_valid_by_the_schema_of_kuberay_with_a_token_and_restricted_pods(name):
    document = yaml.safe_load((CLUSTER / "kuberay" / f"{name}.yaml").read_text())
    schema = {"$defs": KUBERAY["$defs"], "$ref": f"#/$defs/{document['kind']}"}
    jsonschema.validate(document, schema)

    cluster = document["spec"].get("rayClusterSpec", document["spec"])
    assert cluster["authOptions"] == {"mode": "token", "secretName": "airsweep-ray"}
    head = cluster["headGroupSpec"]
    memory = {"object-store-memory": "1000000000"}
    assert head["rayStartParams"] == {"dashboard-host": "0.0.0.0", "num-cpus": "0", **memory}
    assert all(group["rayStartParams"] == memory for group in cluster["workerGroupSpecs"])
    assert "serviceType" not in head  # ClusterIP: the dashboard is visible inside the cluster only

    found = pods(document)
    assert len(found) == 3
    for pod in found:
        assert pod["securityContext"] == USER | {"fsGroup": 100}
        assert [each["securityContext"] for each in pod["containers"]] == [CLOSED]
        assert all(volume.keys() <= VOLUMES for volume in pod.get("volumes", []))
        assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & pod.keys()
    autoscaler = document["spec"].get("autoscalerOptions", {"securityContext": CLOSED})
    assert autoscaler["securityContext"] == CLOSED


def test_the_entrypoint_of_the_job_is_a_command_that_runs_the_mounted_sweep():
    job = yaml.safe_load((CLUSTER / "kuberay" / "rayjob.yaml").read_text())
    [*python, command, spec] = shlex.split(job["spec"]["entrypoint"])[:5]
    assert (python, command) == (["python", "-m", "orchestrator"], "run")
    typer.main.get_command(app).commands[command].make_context(
        "run", shlex.split(job["spec"]["entrypoint"])[4:]
    )
    pod = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    [volume] = (one for one in pod["volumes"] if "configMap" in one)
    [mount] = (one for one in pod["containers"][0]["volumeMounts"] if one["name"] == volume["name"])
    assert spec == f"{mount['mountPath']}/{volume['configMap']['name']}.yaml"
    assert (ROOT / "sweeps" / Path(spec).name).is_file()


# ---------------------------------------------------------------- Slurm, without Slurm


def test_srun_passes_the_cpus_per_task_of_the_job():
    """Slurm 22.05 to 23.11 does not; the Slurm of Debian 13 does, so that no run can show it."""
    [call] = re.findall(r"^ +srun (?:.*\\\n)*.*", SBATCH.read_text(), re.MULTILINE)
    assert '--cpus-per-task="$SLURM_CPUS_PER_TASK"' in call


@pytest.mark.integration
@pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs Debian's package shellcheck")
def test_shellcheck_accepts_the_slurm_script():
    run_command(["shellcheck", str(SBATCH)])


def test_the_slurm_script_explains_wrong_calls(tmp_path):
    for arguments, message in ([], "usage: sbatch"), (["a.yaml", "runs"], "set AIRSWEEP_PYTHON"):
        path = {"PATH": os.environ["PATH"]}
        done = run_command(["bash", str(SBATCH), *arguments], check=False, cwd=tmp_path, env=path)
        assert (done.returncode, done.stdout) == (2, "")
        assert message in done.stderr

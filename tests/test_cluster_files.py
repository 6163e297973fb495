"""The files of `cluster/`: against the schemas of who reads them, and filled in for sweeps."""

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

from orchestrator.cluster.render import Wishes, environment_of, job_name, raycluster, rayjob
from orchestrator.spec import SweepSpec, load_sweep
from orchestrator.spec.marked_yaml import all_documents, parse, written
from orchestrator.spec.sweep_file import checked
from tests.helpers.sweeps import airsweep

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"
GOLDEN = Path(__file__).parent / "golden" / "cluster"
KUBERAY = json.loads((ROOT / "tests" / "fixtures" / "kuberay.json").read_text())
KINDS = ("RayJob", "RayCluster")
SBATCH = CLUSTER / "slurm" / "airsweep.sbatch"
SPEC = """# Does it pay?
version: 1
name: on_gpus
project: Team.A
grid: {method: [cpl, air]}
fixed: {dataset: digits}
seeds: [1]
budget: {wall: 12h}
resources:
  trial: {cpu: 3, gpu: 0.25}
  generator: {cpu: 2, gpu: 1, actors: 4}
"""


def a_sweep(text: str = SPEC, *sets: str) -> SweepSpec:
    return checked(parse(text, "on_gpus.yaml"), sets)


def refuse_unknown_to_kuberay(document: dict[str, Any]) -> None:
    schema = {"$defs": KUBERAY["$defs"], "$ref": f"#/$defs/{document['kind']}"}
    jsonschema.validate(document, schema)


def documents_of(name: str) -> list[dict[str, Any]]:
    return all_documents((CLUSTER / "kuberay" / f"{name}.yaml").read_text())


def containers(document: dict[str, Any]) -> list[dict[str, Any]]:
    """All that a file starts."""
    found: list[dict[str, Any]] = []
    if isinstance(document, dict):
        found += document.get("containers", [])
        values: Any = document.values()
    else:
        values = document if isinstance(document, list) else ()
    for value in values:
        found += containers(value)
    return found


# ---------------------------------------------------------------- versions, image


def versions() -> dict[str, str]:
    lines = (CLUSTER / "versions.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def test_all_files_name_the_versions_that_stand_in_one_place():
    known = versions()
    for file in sorted(CLUSTER.rglob("*")):
        text = file.read_text() if file.is_file() else ""
        for base in re.findall(r"rayproject/ray:\d[\w.-]*\w", text):
            assert base.replace("-cpu", "-gpu") == known["BASE"], file
        for found in re.findall(r"(?:\bRAY_VERSION=|rayVersion: )(\d[\d.]*)", text):
            assert found == known["RAY_VERSION"], file
        for image in re.findall(r"\bairsweep:\d[\w.-]*\w", text):
            assert image == known["IMAGE"], file
        for minimum in re.findall(r"KubeRay (\d+\.\d+)", text):
            assert known["KUBERAY_VERSION"].startswith(f"{minimum}."), file
    assert known["RAY_VERSION"] in known["BASE"]
    assert known["RAY_VERSION"] == version("ray")
    assert known["IMAGE"] == f"airsweep:{version('airsweep')}-ray{known['RAY_VERSION']}"
    assert f"KubeRay {known['KUBERAY_VERSION']}:" in KUBERAY["$comment"]


def test_the_image_runs_as_somebody_who_is_not_root_and_asks_no_network():
    text = (CLUSTER / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.split(None, 1) for line in text.splitlines() if line and line[0] != "#"]
    *_, user = (rest for word, rest in lines if word == "USER")
    assert re.fullmatch(r"[1-9]\d*(:\d+)?", user)  # by number, so that Kubernetes can tell
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


def test_the_image_gets_what_the_package_is_made_of_and_no_other_weights():
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


# ---------------------------------------------------------------- files as they stand


@pytest.mark.parametrize("name", ["rayjob", "raycluster"])
def test_kuberays_own_schema_takes_the_file(name):
    found = [one for one in documents_of(name) if one["kind"] in KINDS]
    assert found
    for document in found:
        refuse_unknown_to_kuberay(document)


def test_a_misspelled_field_is_refused_by_that_schema():
    [_, job] = documents_of("rayjob")
    job["spec"]["activeDeadlineSecond"] = 1
    with pytest.raises(jsonschema.ValidationError, match="activeDeadlineSecond"):
        refuse_unknown_to_kuberay(job)


@pytest.mark.parametrize("name", ["rayjob", "raycluster"])
def test_who_reaches_the_head_needs_a_token_from_a_secret(name):
    [cluster] = (
        one["spec"].get("rayClusterSpec", one["spec"])
        for one in documents_of(name)
        if one["kind"] in KINDS
    )
    assert cluster["authOptions"] == {"mode": "token", "secretName": "airsweep-ray"}
    head = cluster["headGroupSpec"]
    few = {"object-store-memory": "1000000000"}
    assert head["rayStartParams"] == {"dashboard-host": "0.0.0.0", "num-cpus": "0", **few}
    assert all(group["rayStartParams"] == few for group in cluster["workerGroupSpecs"])
    assert "serviceType" not in head  # ClusterIP: nothing outside sees the dashboard


@pytest.mark.parametrize("name", ["rayjob", "raycluster", "mlflow"])
def test_no_file_holds_a_secret_and_no_container_is_root(name):
    found = [one for document in documents_of(name) for one in containers(document)]
    assert found
    for container in found:
        environment_of([f"{one['name']}={one['value']}" for one in container.get("env", [])])
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
    text = (CLUSTER / "kuberay" / f"{name}.yaml").read_text()
    assert text.count("runAsNonRoot: true") + text.count("*user") >= len(found)
    assert not re.search(r"://[^\s/@:]+:[^\s/@]+@", text)


def test_python_within_the_files_is_python():
    for name in ("rayjob", "raycluster"):
        for document in documents_of(name):
            for container in containers(document):
                [*interpreter, code] = container["lifecycle"]["preStop"]["exec"]["command"]
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


def test_rays_own_schema_takes_the_machines_of_ones_own():
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


@pytest.mark.integration
@pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs Debian's package shellcheck")
def test_shellcheck_finds_nothing_in_the_slurm_script():
    done = subprocess.run(["shellcheck", SBATCH], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_slurm_script_says_how_it_is_called(tmp_path):
    for arguments, words in (((), "usage: sbatch"), (("a.yaml", "runs"), "set AIRSWEEP_PYTHON")):
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
        assert words in done.stderr


# ---------------------------------------------------------------- filled in


def the_job(text: str) -> dict[str, Any]:
    [_, job] = yaml.safe_load_all(text)
    refuse_unknown_to_kuberay(job)
    return job


@pytest.mark.parametrize("file", sorted((ROOT / "sweeps").glob("*.yaml")), ids=lambda one: one.stem)
def test_every_sweep_that_ships_becomes_a_job_with_that_sweep_in_it(file):
    sweep = load_sweep(file)
    text = rayjob(sweep, Wishes())
    job = the_job(text)
    [configmap, _] = yaml.safe_load_all(text)
    assert configmap["data"] == {f"{sweep.name}.yaml": file.read_text()}
    [volume] = (
        one
        for one in job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["volumes"]
        if "configMap" in one
    )
    assert volume["configMap"]["name"] == configmap["metadata"]["name"] == job["metadata"]["name"]
    [cluster] = yaml.safe_load_all(raycluster(sweep, Wishes()))
    refuse_unknown_to_kuberay(cluster)


WISHES = {
    "queued": Wishes(
        image="registry.example.org/airsweep:1",
        queue="team-queue",
        priority="high",
        store="s3://air/runs",
        env={"AIRSWEEP_USER": "ada", "MLFLOW_TRACKING_URI": "http://mlflow:5000"},
        options=["--only", "method=air", "--set", "seeds=[1, 2]"],
    ),
    "cpu": Wishes(name="small", cpu_workers=2),
}
CPU_ONLY = ("resources.trial.gpu=0", "resources.generator.gpu=0", "budget={}")


@pytest.mark.parametrize("name", WISHES)
def test_the_golden_jobs_are_what_is_rendered(name):
    sweep = a_sweep(SPEC, *(CPU_ONLY if name == "cpu" else ()))
    text = rayjob(sweep, WISHES[name])
    the_job(text)
    golden = GOLDEN / f"rayjob_{name}.yaml"
    if os.environ.get("AIRSWEEP_UPDATE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text()


@pytest.mark.parametrize(
    ("sets", "wishes", "expected"),
    [
        # A worker has the cores of all trials that share its GPU, and each actor has a worker.
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
def test_workers_fit_the_trials_and_generators_of_the_sweep(sets, wishes, expected):
    """Cores, GPUs and number of workers by group."""
    sweep = a_sweep(SPEC, *sets)
    groups = the_job(rayjob(sweep, Wishes(**wishes)))["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    found = {}
    for group in groups:
        [container] = group["template"]["spec"]["containers"]
        limits = container["resources"]["limits"]
        gpus = limits.get("nvidia.com/gpu")
        found[group["groupName"]] = (limits["cpu"], gpus, group["replicas"])
        assert ("tolerations" in group["template"]["spec"]) == (gpus is not None)
    assert found == expected


def test_workers_with_gpus_of_a_standing_cluster_come_from_zero():
    [cluster] = yaml.safe_load_all(raycluster(a_sweep(), Wishes(gpu_workers=16, cpu_workers=3)))
    refuse_unknown_to_kuberay(cluster)
    found = {
        group["groupName"]: (group["minReplicas"], group["maxReplicas"])
        for group in cluster["spec"]["workerGroupSpecs"]
    }
    assert found == {"gpu": (0, 16), "cpu": (1, 3)}
    assert cluster["spec"]["enableInTreeAutoscaling"] is True


def test_the_data_root_of_the_file_outweighs_that_of_the_pods():
    spec = the_job(rayjob(a_sweep(SPEC + "data_root: /shared/more\n"), Wishes()))["spec"]
    assert yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"] == {"AIRSWEEP_DATA": "/shared/more"}


NASTY = ["--set", "a='$HOME'", "--only", "x=a>b", "--set", 'q=`id` \\ "!" ; & *']


def test_options_arrive_as_they_were_given_through_both_shells():
    """KubeRay's submitter puts the entrypoint into a script, `ray job submit` into a command."""
    entrypoint = the_job(rayjob(a_sweep(), Wishes(options=NASTY)))["spec"]["entrypoint"]
    words = shlex.split(entrypoint)
    for _ in range(2):
        script = f"printf '%s\\0' {shlex.join(words)}"
        done = subprocess.run(["bash", "-ce", script], capture_output=True, text=True, check=True)
        assert done.stdout.split("\0")[:-1] == words
    assert words[-len(NASTY) :] == NASTY


def test_names_of_kubernetes_are_made_of_any_sweeps():
    long = job_name("Some.Project", "x" * 70)
    assert len(long) == 47
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", job_name("default", "9_Lives__"))


@pytest.mark.parametrize(
    ("wishes", "sets", "words"),
    [
        ({"name": "Ümlaut"}, (), "--name"),
        ({"name": "a" * 48}, (), "at most 47"),
        ({"name": "ends-"}, (), "no dash at the end"),
        ({"gpu_workers": -1}, (), "allowed: 0 and more"),
        ({"cpu_workers": -2}, (), "allowed: 0 and more"),
        ({"gpu_workers": 0}, (), "the sweep asks for GPUs"),
        ({"gpu_workers": 2}, CPU_ONLY, "asks for no GPU"),
        ({"cpu_workers": 0}, CPU_ONLY, "no worker is left"),
        ({"store": "runs"}, (), "an absolute folder"),
        ({"store": "s3://key:word@air/runs"}, (), "a login"),
        ({"image": "not an image"}, (), "--image"),
        ({"priority": "high"}, (), "--queue"),
        ({"queue": "a b"}, (), "--queue"),
        ({"options": ["--set", "tracking.uri=http://me:word@mlflow"]}, (), "a login"),
    ],
)
def test_what_cannot_be_is_refused_with_what_is_allowed(wishes, sets, words):
    with pytest.raises(ValueError, match=re.escape(words)) as problem:
        rayjob(a_sweep(SPEC, *sets), Wishes(**wishes))
    assert "word@" not in str(problem.value)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("AWS_SECRET_ACCESS_KEY=abc", "into the Secret"),
        ("some_api_key=abc", "into the Secret"),
        ("MLFLOW_TRACKING_URI=https://me:abc@mlflow", "into the Secret"),
        *((option, "--env") for option in ("A", "9=1", "A B=1", "A=$HOME", "A=`id`", "A=1\nB=2")),
    ],
)
def test_a_variable_that_is_secret_or_would_not_arrive_as_written_is_refused(option, words):
    with pytest.raises(ValueError, match=words) as problem:
        environment_of([option])
    assert "abc" not in str(problem.value)


@pytest.mark.parametrize(
    "text", ["1e3", "yes", "0x1F", "12:30", "null", "~", "2.60", "", " a\n b ", "a\x85b"]
)
def test_text_stays_text_for_every_reader_of_yaml(text):
    out = written([{"value": text}])
    assert yaml.safe_load(out) == parse(out, "here").value == {"value": text}


def test_the_command_prints_the_job_and_nothing_else_and_ends_with_2_on_a_bad_wish(tmp_path):
    file = tmp_path / "on_gpus.yaml"
    file.write_text(SPEC)
    command = ("cluster", "render", "rayjob", file)
    more = {"AIRSWEEP_USER": "ada", "AIRSWEEP_PROJECT": "theirs"}
    done = airsweep(*command, "--queue", "q", "--only", "method=air", "--env", "A=b c", **more)
    job = the_job(done.stdout)
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


def test_an_installed_airsweep_has_the_files_that_are_filled_in():
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert wheel["targets"]["wheel"]["force-include"]["cluster"] == "orchestrator/cluster"

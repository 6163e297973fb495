"""A run uses the GPUs of its machines, or its sweep says that it does not."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from air_core.datasets import get_dataset
from air_core.models.weights import generator_folder, tiny_folder
from orchestrator.planning import (
    plan_of,
    read_request,
    unused_gpus_reason,
)
from orchestrator.planning.requests import location_for
from tests.helpers.disks import UNSHARE
from tests.helpers.machines import keep, mounts_of
from tests.helpers.sweeps import python, write_sweep


@contextmanager
def fake_gpus(folder: Path, count: int) -> Iterator[list[str]]:
    """The prefix of commands that find `count` GPUs in /dev."""
    dev = folder / "dev"
    dev.mkdir()
    commands = [f"mount -t tmpfs none {dev}", f"mkdir {dev}/shm", f"ln -s /proc/self/fd {dev}/fd"]
    for name in ("null", "zero", "random", "urandom"):
        commands.append(f"touch {dev}/{name} && mount --bind /dev/{name} {dev}/{name}")
    commands += [f"touch {dev}/nvidia{number}" for number in range(count)]
    commands += [f"mount --bind /dev/shm {dev}/shm", f"mount --rbind {dev} /dev"]
    keeper = keep(UNSHARE, *commands)
    yield mounts_of(keeper)
    keeper.communicate()


SWEEP = """
grid: {{method: [cpl, air]}}
fixed: {{backbone: {backbone}, generator: {generator}, train.steps: 3, generation.size: 32}}
seeds: [1]
"""
MACHINES = [{"CPU": 8.0, "GPU": 8.0}, {"CPU": 8.0}]
BOTH = "resources: {trial: {gpu: 0.25}, generator: {gpu: 1}}"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Copies of the embedded models: by their names they are real ones."""
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(tiny_folder(), folder / "clip")
    shutil.copytree(generator_folder("tiny"), folder / "sd")
    return {"backbone": folder / "clip", "generator": folder / "sd"}


def reason(folder: Path, sets: tuple[str, ...] = (), **models: Any) -> str:
    """Why the sweep of these models does not start on MACHINES; empty if it does."""
    body = SWEEP.format(**{"backbone": "tiny", "generator": "tiny", **models})
    request = read_request(write_sweep(folder, "mine", body), sets)
    location = location_for(request, folder / "runs", None)
    return unused_gpus_reason(plan_of(request.spec, location), location.store, MACHINES) or ""


def test_a_sweep_of_embedded_models_may_leave_gpus_unused(tmp_path):
    assert reason(tmp_path) == ""


def test_each_process_that_runs_a_real_model_states_its_gpus(models, tmp_path):
    assert reason(tmp_path, **models) == (
        f"the machines have 8 GPUs, but {models['backbone']} and {models['generator']} would run "
        "on CPUs, because the sweep does not set the GPUs of a trial and a generator; write "
        f"`{BOTH}` into the sweep file, or `gpu: 0` there to compute on CPUs"
    )
    generator = {"generator": models["generator"]}
    assert "`resources: {generator: {gpu: 1}}`" in reason(tmp_path, **generator)
    sets = ("resources.generator.gpu=0",)
    assert reason(tmp_path, sets, **generator) == ""
    assert "`resources: {trial: {gpu: 0.25}}`" in reason(tmp_path, sets, **models)
    assert reason(tmp_path, (*sets, "resources.trial.gpu=0.5"), **models) == ""


def test_a_generator_encodes_ready_images_with_a_real_backbone(models, tmp_path):
    for name in get_dataset("digits").classnames:
        (tmp_path / "drawn" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "drawn" / name / "0.png")
    ready = {"backbone": models["backbone"], "generator": f"folder:{tmp_path / 'drawn'}"}
    sets = ("resources.trial.gpu=0.5", "images_per_class=1")
    assert "`resources: {generator: {gpu: 1}}`" in reason(tmp_path, sets, **ready)


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Iterator[list[str]]:
    """The prefix of commands on a machine with two GPUs."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with fake_gpus(tmp_path, 2) as inside:
        yield inside


def test_plan_and_run_name_the_missing_lines(machine, models, tmp_path):
    spec = write_sweep(tmp_path, "mine", SWEEP.format(**models))
    store = ("--store", tmp_path / "runs")

    def command(name: str, *words: str) -> Any:
        return python("-m", "orchestrator", name, spec, *store, *words, check=False, inside=machine)

    done = command("run")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"{spec}:1:1: resources: the machines have 2 GPUs, but")
    assert f"write `{BOTH}` into the sweep file, or `gpu: 0` there" in done.stderr
    assert not (tmp_path / "runs" / "sweeps").exists()
    done = command("plan")
    assert done.returncode == 0, done.stderr
    assert "  cannot start: the machines have 2 GPUs, but" in done.stdout
    assert command("plan", "--check").returncode == 2
    spec.write_text(spec.read_text() + "resources: {trial: {gpu: 0}, generator: {gpu: 0}}\n")
    assert "cannot start" not in command("plan").stdout


def test_a_first_sweep_file_on_a_machine_with_gpus_uses_them(machine, tmp_path):
    code = (
        "import os, sys; os.chdir(sys.argv[1]); from orchestrator import api; "
        "print(api.init('mine').read_text())"
    )
    assert f"\n{BOTH}\n" in python("-c", code, tmp_path, inside=machine).stdout
    assert f"\n# {BOTH}\n" in python("-c", code, tmp_path / "dev").stdout


def test_a_gpu_without_bf16_is_refused_where_settings_require_it(machine, models, tmp_path):
    """`nvidia-smi` is a script here."""
    spec = write_sweep(tmp_path, "mine", SWEEP.format(**models) + BOTH)
    (tmp_path / "bin").mkdir()
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 9.0\necho 8.0\n")
    smi.chmod(0o755)
    path = f"{smi.parent}:{os.environ['PATH']}"

    def checked() -> Any:
        words = ("plan", str(spec), "--store", str(tmp_path / "runs"), "--check")
        return python("-m", "orchestrator", *words, check=False, inside=machine, PATH=path)

    done = checked()  # the devices of this machine are only files
    assert done.returncode == 3
    assert "this machine: gpu: Ray counts a GPU, but torch" in done.stderr
    smi.write_text("#!/bin/sh\necho 7.5\n")
    assert checked().stderr == (
        "airsweep: GPUs of computing capability 7.5 have no bf16, which needs 8: set "
        "lora.precision and generation.precision to fp32\n"
    )


@pytest.mark.ray
def test_a_run_refuses_a_joined_ray_whose_gpus_the_sweep_does_not_mention(
    models, tmp_path, monkeypatch
):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    spec, store = write_sweep(tmp_path, "mine", SWEEP.format(**models)), tmp_path / "runs"
    code = (
        "import ray\n"
        "from orchestrator import api\n"
        "ray.init('local', num_cpus=2, num_gpus=8, include_dashboard=False, log_to_driver=False)\n"
        f"try: api.run({str(spec)!r}, store={str(store)!r}, tracking_uri='none')\n"
        "except ValueError as problem: print(problem)\n"
    )
    done = python("-c", code, RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0")
    assert "the machines have 8 GPUs, but" in done.stdout, done.stderr
    [outcome] = store.glob("sweeps/*/*/outcome.json")
    assert json.loads(outcome.read_text())["exit_code"] == 2
    assert not (store / "artifacts").exists()

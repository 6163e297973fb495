"""A run uses the GPUs of its machines, or its sweep says that it does not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from air_core.models.weights import generator_folder, tiny_folder
from orchestrator import api
from orchestrator.planning import plan_of, read_request, unused_gpus_reason
from orchestrator.planning.requests import location_for
from tests.helpers.sweeps import python, write_sweep

SWEEP = """
grid: {{method: [cpl, air]}}
fixed: {{backbone: {backbone}, generator: {generator}, generation.size: 32}}
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


def test_each_process_that_runs_a_real_model_states_its_gpus(models, drawn_digits, tmp_path):
    assert reason(tmp_path) == ""  # the embedded models
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
    # A generator encodes ready images with the real backbone.
    ready = {"backbone": models["backbone"], "generator": f"folder:{drawn_digits}"}
    sets = ("resources.trial.gpu=0.5", "images_per_class=1")
    assert "`resources: {generator: {gpu: 1}}`" in reason(tmp_path, sets, **ready)


@pytest.fixture
def two_gpus(monkeypatch) -> None:
    """This machine has two GPUs in /dev."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    devices = SimpleNamespace(glob=lambda pattern: ["/dev/nvidia0", "/dev/nvidia1"])
    monkeypatch.setattr("orchestrator.planning.resources.glob", devices)


@pytest.mark.usefixtures("two_gpus")
def test_plan_and_run_name_the_missing_lines(models, tmp_path, command):
    spec = write_sweep(tmp_path, "mine", SWEEP.format(**models))
    store = ("--store", tmp_path / "runs")
    code, _, err = command("run", spec, *store)
    assert (code, err.count("\n")) == (2, 1), err
    assert err.startswith(f"{spec}:1:1: resources: the machines have 2 GPUs, but")
    assert f"write `{BOTH}` into the sweep file, or `gpu: 0` there" in err
    assert not (tmp_path / "runs" / "sweeps").exists()
    code, out, _ = command("plan", spec, *store)
    assert code == 0
    assert "  cannot start: the machines have 2 GPUs, but" in out
    assert command("plan", spec, *store, "--check")[0] == 2
    body = spec.read_text()
    spec.write_text(body + "resources: {trial: {gpu: 0}, generator: {gpu: 0}}\n")
    assert "cannot start" not in command("plan", spec, *store)[1]
    spec.write_text(body + BOTH)
    code, _, err = command("plan", spec, *store, "--check")  # the two devices are only names
    assert (code, "this machine: gpu: Ray counts a GPU, but torch" in err) == (3, True)


@pytest.mark.parametrize(("visible", "line"), [(None, f"\n{BOTH}\n"), ("", f"\n# {BOTH}\n")])
def test_a_first_sweep_file_uses_the_gpus_of_the_machine(
    two_gpus, tmp_path, monkeypatch, visible, line
):
    monkeypatch.chdir(tmp_path)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert line in api.init("mine").read_text()


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_without_bf16_is_refused_where_settings_require_it(
    models, tmp_path, monkeypatch, command
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    body = SWEEP.format(**models) + BOTH
    spec = write_sweep(tmp_path, "mine", body)
    code, _, err = command("plan", spec, "--store", tmp_path / "runs", "--check")
    assert (code, "has no bf16 (computing capability 7.5, which" in err) == (3, True)
    assert "set lora.precision" in err


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

"""AiR with a small random model of each family of diffusion models, and a GPU day."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from air_core.models.families import FAMILIES
from tests.helpers import pipelines
from tests.helpers.sweeps import airsweep, python, write_sweep

pytestmark = [pytest.mark.ray, pytest.mark.integration]

QUICK = {
    "images_per_class": 2, "generation.size": pipelines.SIZE, "generation.block": 2,
    "generation.num_inference_steps": 2, "lora.steps": 2, "lora.batch": 2,
    "initial_labels.k": 1, "evidence.images": 4, "evidence.top": 2, "evidence.block": 8,
    "iterations": 1, "train.steps": 5, "fidelity.kind": "none",
}  # fmt: skip


def photographs(folder: Path) -> Path:
    """Twelve photographs of each of two classes: noise of other colours."""
    rng = np.random.default_rng(0)
    for c, name in enumerate(("cat", "dog")):
        (folder / name).mkdir(parents=True)
        for number in range(12):
            coarse = rng.integers(0, 128, (6, 8, 3), dtype=np.uint8)
            coarse[..., c] += 100
            image = Image.fromarray(coarse).resize((160, 120), Image.Resampling.BICUBIC)
            image.save(folder / name / f"{number}.jpg")
    return folder


def test_air_runs_with_a_model_of_each_family(tmp_path):
    built = [str(pipelines.MODELS[family][-1](tmp_path / family)) for family in FAMILIES]
    models = json.dumps(built)
    data = photographs(tmp_path / "photographs")
    reads_both = {"method": "air_evidence", "evidence.draws": 1}  # images and denoising errors
    fixed = json.dumps({"dataset": f"folder:{data}", **reads_both, **QUICK})
    body = f"""
grid: {{generator: {models}}}
fixed: {fixed}
seeds: [1]
"""
    sweep, store = write_sweep(tmp_path, "families", body), tmp_path / "runs"
    airsweep("run", sweep, "--store", store, "--tracking-uri", "none")
    rows = json.loads(airsweep("table", sweep, "--store", store, "--format", "json").stdout)
    done = {row["settings"]["generator"] for row in rows if row["n"] == 1}
    assert done == {*built}


def test_a_gpu_day_makes_one_report_and_continues(tmp_path):
    model = pipelines.stable_diffusion_1(tmp_path / "model")
    data = photographs(tmp_path / "photographs")
    quick: dict[str, Any] = {**QUICK, "resources.trial.gpu": 0, "resources.generator.gpu": 0}
    quick |= {"resources.trial.cpu": 1, "resources.generator.cpu": 1, "seeds": [1]}
    quick |= {"resources.generator.actors": 1, "grid.method": ["cpl_real_evidence"]}
    settings = [f"{key}={json.dumps(value)}" for key, value in quick.items()]
    command = (
        "benchmarks/gpu_day.py", "--dataset", f"folder:{data}", "--generator", model, "--backbone",
        "tiny", "--store", tmp_path / "runs", "--out", tmp_path / "day", "--set", *settings,
    )  # fmt: skip
    first = python(*command, MLFLOW_TRACKING_URI="none")
    figures = json.loads(first.stdout.splitlines()[-1])
    assert figures["name"] == "gpu_day"
    assert figures["ratio"] > 1
    report = (tmp_path / "day" / "report.md").read_text()
    for step in ("check", "smoke", "plan", "run", "table", "device"):
        assert f"## {step}\n" in report
    assert "cpl_real_evidence" in report
    (tmp_path / "day" / "table.txt").write_text("interrupted")
    again = python(*command, MLFLOW_TRACKING_URI="none")
    assert again.stderr.count("done before") == 5
    assert (tmp_path / "day" / "report.md").read_text().count("exit code 0") == 6

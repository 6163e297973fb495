"""Defaults that the files of a generator determine; a value in the sweep file wins."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from air_core.models.weights import generator_folder
from air_core.settings import GenerationSettings
from orchestrator.planning import plan_of, read_request
from orchestrator.planning.requests import location_for
from tests.helpers.sweeps import airsweep, write_sweep

SWEEP = """
grid: {{method: [zero_shot, air]}}
fixed: {{generator: {folder}, images_per_class: 8}}
seeds: [1]
"""


@pytest.fixture
def turbo(tmp_path) -> Path:
    """A distilled model of latents with twice the side of the tiny model, which draws 32 pixels."""
    folder = tmp_path / "turbo"
    shutil.copytree(generator_folder("tiny"), folder)
    for file, changes in (
        (folder / "unet" / "config.json", {"sample_size": 16}),
        (folder / "scheduler" / "scheduler_config.json", {"timestep_spacing": "trailing"}),
    ):
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def planned(folder: Path, body: str, *sets: str) -> Any:
    request = read_request(write_sweep(folder, "mine", body), sets)
    return plan_of(request.spec, location_for(request, folder / "runs", None))


def drawing(plan: Any) -> tuple[int, int, float]:
    settings: GenerationSettings = plan.slots[-1].spec.generation
    return settings.size, settings.num_inference_steps, settings.guidance_scale


def test_a_sweep_draws_as_the_files_of_its_generator_say_unless_it_says_otherwise(turbo, tmp_path):
    body = SWEEP.format(folder=turbo)
    assert drawing(planned(tmp_path, body)) == (64, 4, 0.0)
    assert drawing(planned(tmp_path, body, "generation.size=48")) == (48, 4, 0.0)
    assert drawing(planned(tmp_path, body, "generation.guidance_scale=1.5")) == (64, 4, 1.5)
    relative = planned(tmp_path, SWEEP.format(folder="./turbo"))
    assert drawing(relative) == (64, 4, 0.0)
    other = body.replace("air]", "air], generator: [tiny, ./turbo]").replace(f"{turbo}", "")
    in_grid = planned(tmp_path, other.replace("generator: ,", ""))
    assert {drawing(replace(in_grid, slots=(slot,))) for slot in in_grid.slots[-2:]} == {
        (32, 10, 4.0),
        (64, 4, 0.0),
    }


def test_a_generator_that_no_trial_uses_need_not_exist(tmp_path):
    body = SWEEP.format(folder="/nowhere/at/all").replace("air]", "fpl]")
    assert drawing(planned(tmp_path, body)) == (512, 25, 7.5)


def test_plan_explains_where_the_size_comes_from(turbo, tmp_path):
    spec = write_sweep(tmp_path, "mine", SWEEP.format(folder=turbo))
    text = airsweep("plan", spec, "--store", tmp_path / "runs", "--explain").stdout
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines.count("generation.size 64 512 default of dataset or models") == 1

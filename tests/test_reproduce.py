"""A published number, if this machine has the paper's weights and data (docs/experiments.md).

AIRSWEEP_CLIP   the backbone: ViT-B-32/openai if downloaded, or ViT-B-32-quickgelu@<file>
AIRSWEEP_SD     the generator: owner/name if downloaded, or a diffusers folder
AIRSWEEP_DATA   the data root, with flowers102/
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.sweeps import environment

ROOT = Path(__file__).parents[1]
SWEEP = "sweeps/paper/paper_main.yaml"
PUBLISHED = 63.67  # zero-shot CLIP ViT-B/32 on Flowers102, in CPL's table (arXiv:2406.10502)
TOLERANCE = 1.5  # points: other code resizes images with other filters
HOUR = 3600  # features of 8,189 images on one slow core

pytestmark = pytest.mark.weights


@pytest.fixture(scope="module")
def inputs() -> dict[str, str]:
    """Weights and data from the environment."""
    names = ("AIRSWEEP_CLIP", "AIRSWEEP_SD", "AIRSWEEP_DATA")
    missing = [name for name in names if not os.environ.get(name)]
    if missing:
        pytest.skip(f"{', '.join(missing)} not set: see docs/experiments.md")
    return {name: os.environ[name] for name in names}


def airsweep(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator", *arguments],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=ROOT,
        timeout=HOUR,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def cell_options(inputs: dict[str, str], method: str) -> list[str]:
    """Options that select one cell of the sweep: flowers102, UL, text and a method."""
    cell = {"dataset": "flowers102", "paradigm": "ul", "modality": "text", "method": method}
    sets = {"backbone": inputs["AIRSWEEP_CLIP"], "generator": inputs["AIRSWEEP_SD"]}
    if not _has_gpu():
        sets |= {"resources.trial.gpu": "0", "resources.generator.gpu": "0"}
    only = [f"--only={key}={value}" for key, value in cell.items()]
    return [*only, *(f"--set={key}={value}" for key, value in sets.items())]


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def test_zero_shot_accuracy_on_flowers102_is_the_published_one(inputs, tmp_path):
    store = f"--store={tmp_path / 'runs'}"
    airsweep("run", SWEEP, store, *cell_options(inputs, "zero_shot"))
    (row,) = json.loads(airsweep("table", "paper_main", store, "--format=json"))
    assert row["n_test"] == 6149
    assert 100 * row["mean"] == pytest.approx(PUBLISHED, abs=TOLERANCE)

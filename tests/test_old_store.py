"""A store that an older version filled (commit 9fb42b3): it is read, reused, and not sent again.

The fixture has the store with its MLflow file, and the sweep file.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from orchestrator import api
from tests.helpers.sweeps import airsweep, environment

ROOT = Path(__file__).parents[1]
MEANS = [0.48148148148148145, 0.5518518518518518, 0.5657407407407408]  # as that version printed


@pytest.fixture
def old(tmp_path) -> Path:
    with tarfile.open(ROOT / "tests" / "fixtures" / "store_9fb42b3.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def runs(store: Path) -> list[tuple[str, str]]:
    with sqlite3.connect(store / "mlflow.db") as database:
        return sorted(database.execute("select run_uuid, status from runs"))


def test_all_of_it_is_done_and_the_numbers_are_the_same(old):
    before = runs(old / "store")
    planned = api.plan(old / "old.yaml", store=old / "store").json()
    assert (planned["trials"]["done"], planned["trials"]["to_run"]) == (6, 0)
    assert {one["state"] for one in planned["artifacts"]} == {"present"}
    assert api.table("old", store=old / "store")["mean"].tolist() == pytest.approx(MEANS, abs=0)
    done = airsweep("run", old / "old.yaml", "--store", old / "store")
    assert "nothing to do" in done.stderr
    assert airsweep("cache", "verify", "--store", old / "store").returncode == 0
    airsweep("mlflow", "reconcile", "old", "--store", old / "store")
    assert runs(old / "store") == before


# ---------------------------------------------------------------- with edited code

EDITS = {
    # file, old, new: stages with something to make
    ("training.py", "MOMENTUM = 0.9", "MOMENTUM = 0.8"): set(),
    ("training.py", "MOMENTUM = 0.9", "MOMENTUM = 0.9  # a comment"): None,
    ("diffusion/lora.py", "GAMMA = 5.0", "GAMMA = 4.0"): {"lora", "images"},
}


@pytest.mark.parametrize(("edit", "missing"), EDITS.items(), ids=["method", "comment", "lora"])
def test_an_edit_of_a_stage_makes_it_and_later_ones_new(old, tmp_path, edit, missing):
    file, before, after = edit
    checkout = _copy(tmp_path)
    path = checkout / "air_core" / file
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))
    planned = _plan(checkout, old)
    assert (planned["trials"]["to_run"] > 0) == (missing is not None)
    lacking = {one["key"].partition("/")[0] for one in planned["artifacts"] if _lacks(one)}
    assert lacking == (missing or set())
    results = 6 if missing == set() else 2  # those of `air` read the LoRA's images
    wanted = [] if missing is None else [f"{results} results are of the earlier code"]
    assert [one.partition(": ")[2].partition(": ")[2] for one in planned["changed_inputs"]] == (
        wanted
    )
    # What was run stays readable.
    table = [sys.executable, "-m", "orchestrator", "table", "old", "--store", str(old / "store")]
    shown = subprocess.run(
        table, cwd=checkout, env=_environment(checkout), capture_output=True, text=True, check=True
    )
    assert "56.6 ± 2.2" in shown.stdout


def _copy(folder: Path) -> Path:
    for package in ("air_core", "orchestrator"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, folder / "checkout" / package, ignore=ignored)
    return folder / "checkout"


def _environment(checkout: Path) -> dict[str, str]:
    return environment() | {"PYTHONPATH": str(checkout)}


def _plan(checkout: Path, old: Path) -> dict:
    words = [sys.executable, "-m", "orchestrator", "plan", str(old / "old.yaml"), "--json"]
    done = subprocess.run(
        [*words, "--store", str(old / "store")],
        cwd=checkout,
        env=_environment(checkout),
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def _lacks(artifact: dict) -> bool:
    return artifact["state"] != "present"

"""A store of an older version (commit 9fb42b3) is read and reused; its runs are not sent again.

What a recipe number has changed since is made again; until then the table has the earlier results.

The fixture contains the store with its MLflow database, and the sweep file. The definition of
`air` and a default have changed since, so the sweep file has to state what they were.
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

from air_core.specs import LoraSpec
from orchestrator import api, keys
from tests.helpers.sweeps import airsweep, environment

pytestmark = [pytest.mark.ray, pytest.mark.integration]

ROOT = Path(__file__).parents[1]
DEFINITION = (
    "  fusion_weight: 0.5\n  auxiliary.kind: lda\n  fidelity.kind: none\n  synthetic_weight: 0.0\n"
)
MEANS = [0.48148148148148145, 0.5518518518518518, 0.5657407407407408]  # as that version printed


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """The older store, and its sweep file."""
    folder = tmp_path_factory.mktemp("original")
    with tarfile.open(ROOT / "tests" / "fixtures" / "store_9fb42b3.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    file = folder / "old.yaml"
    file.write_text(file.read_text().replace("fixed:\n", f"fixed:\n{DEFINITION}"))
    return folder


@pytest.fixture(scope="module")
def continued(original, tmp_path_factory) -> Path:
    """The same after a run of the sweep."""
    folder = Path(shutil.copytree(original, tmp_path_factory.mktemp("continued") / "old"))
    airsweep("run", folder / "old.yaml", "--store", folder / "store")
    return folder


@pytest.fixture
def old(continued, tmp_path) -> Path:
    return Path(shutil.copytree(continued, tmp_path / "old"))


def runs(store: Path) -> list[tuple[str, str]]:
    with sqlite3.connect(store / "mlflow.db") as database:
        return sorted(database.execute("select run_uuid, status from runs"))


def test_results_are_reused_except_where_a_recipe_has_changed_since(original, old):
    store, before = old / "store", runs(original / "store")
    planned = api.plan(original / "old.yaml", store=original / "store").json()
    counts = [planned["trials"][name] for name in ("done", "shared", "to_run")]
    assert counts == [3, 1, 2]
    lacking = {a["key"].partition("-")[0] for a in planned["artifacts"] if a["state"] != "present"}
    assert lacking == {"lora/v2/digits", "images/v2/tiny"}
    assert planned["changed_inputs"] == [
        f"{stage}: the code changed since: 2 results are of the earlier code"
        for stage in ("images", "lora")
    ]
    assert api.table("old", store=store)["mean"].tolist()[:2] == pytest.approx(MEANS[:2], abs=0)
    done = airsweep("run", old / "old.yaml", "--store", store)
    assert "nothing to do" in done.stderr
    airsweep("mlflow", "reconcile", "old", "--store", store)
    assert {*before} < {*runs(store)}


def test_results_of_an_earlier_recipe_stay_in_the_table_and_plan_says_why_it_makes_new_ones(
    old, monkeypatch
):
    store = old / "store"
    means = api.table("old", store=store)["mean"].tolist()
    keys._key.cache_clear()
    monkeypatch.setattr(LoraSpec, "recipe", 3)
    assert api.table("old", store=store)["mean"].tolist() == means
    planned = api.plan(old / "old.yaml", store=store).json()
    assert planned["trials"]["to_run"] == 2
    assert planned["changed_inputs"] == [
        "lora: the code changed since: 2 results are of the earlier code"
    ]
    keys._key.cache_clear()


# ---------------------------------------------------------------- with edited code

EDITS = {
    # file, old, new: stages with missing artifacts
    ("training.py", "MOMENTUM = 0.9", "MOMENTUM = 0.8"): set(),
    ("diffusion/lora.py", "WARMUP = 0.1", "WARMUP = 0.2"): {"lora", "images"},
}


@pytest.mark.parametrize(("edit", "missing"), EDITS.items(), ids=["method", "lora"])
def test_an_edit_of_a_stage_requires_it_and_later_stages_again(old, tmp_path, edit, missing):
    file, before, after = edit
    air = api.table("old", store=old / "store").set_index("method").loc["air"]
    checkout = _copy(tmp_path)
    path = checkout / "air_core" / file
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))
    planned = _plan(checkout, old)
    assert planned["trials"]["to_run"] > 0
    absent = {a["key"].partition("/")[0] for a in planned["artifacts"] if a["state"] != "present"}
    assert absent == missing
    results = 2 if missing else 6  # two of `air`, which use images of the LoRA
    [changed] = planned["changed_inputs"]
    assert changed.endswith(f": {results} results are of the earlier code")
    # Earlier results stay readable.
    table = [sys.executable, "-m", "orchestrator", "table", "old", "--store", str(old / "store")]
    shown = subprocess.run(
        table, cwd=checkout, env=_environment(checkout), capture_output=True, text=True, check=True
    )
    assert f"{100 * air['mean']:.1f} ± {100 * air['std']:.1f}" in shown.stdout


def _copy(folder: Path) -> Path:
    for package in ("air_core", "orchestrator"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, folder / "checkout" / package, ignore=ignored)
    return folder / "checkout"


def _environment(checkout: Path) -> dict[str, str]:
    return environment() | {"PYTHONPATH": str(checkout)}


def _plan(checkout: Path, old: Path) -> dict:
    command = [sys.executable, "-m", "orchestrator", "plan", str(old / "old.yaml"), "--json"]
    done = subprocess.run(
        [*command, "--store", str(old / "store")],
        cwd=checkout,
        env=_environment(checkout),
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)

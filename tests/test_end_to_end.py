"""A sweep from outside: the commands, their JSON, their exit codes, what lies in the store."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sweeps import airsweep, all_runs, children, environment, events, table, write_sweep

SWEEP = """
grid: {{method: [zero_shot, fpl, air_fpl]}}
fixed: {{generator: "folder:{folder}", images_per_class: 16, train.steps: 20}}
seeds: [1, 2]
resources: {{generator: {{actors: 1}}}}
"""


@pytest.fixture(scope="module")
def swept(tmp_path_factory, drawn_digits) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("swept")
    spec = write_sweep(folder, "small", SWEEP.format(folder=drawn_digits))
    plan = json.loads(airsweep("plan", spec, "--store", folder / "runs", "--json").stdout)
    assert plan["trials"] == {"total": 6, "done": 0, "reused": 1, "to_run": 5}
    assert [a["state"] for a in plan["artifacts"]] == ["missing", "missing"]
    assert not (folder / "runs" / "sweeps").exists()
    done = airsweep("run", spec, "--store", folder / "runs")
    assert "zero_shot" in done.stdout
    return spec, folder / "runs"


@pytest.mark.ray
def test_plan_and_status_agree_with_what_ran(swept):
    spec, store = swept
    plan = json.loads(airsweep("plan", spec, "--store", store, "--json").stdout)
    assert plan["cells"] == 3
    assert plan["points"] == 3
    assert plan["trials"] == {"total": 6, "done": 6, "reused": 0, "to_run": 0}
    assert {a["stage"]: (a["state"], a["have"], a["need"]) for a in plan["artifacts"]} == {
        "features": ("present", 1, 1),
        "images": ("present", 20, 20),
    }
    assert plan["estimate"] == {"seconds": 0, "calibrated": True}
    status = json.loads(airsweep("status", "small", "--store", store, "--json").stdout)
    assert status["trials"] == {"done": 5, "reused": 1, "failed": 0, "running": 0, "waiting": 0}
    assert status["exit_code"] == 0


@pytest.mark.ray
def test_table_rows_have_the_agreed_keys(swept):
    rows = table(swept[1], "small")
    assert [row["method"] for row in rows] == ["zero_shot", "fpl", "air_fpl"]
    expected = (
        "dataset paradigm modality method settings metric n n_test mean std low high interval"
    )
    for row in rows:
        assert sorted(row) == sorted(expected.split())
        assert row["low"] <= row["mean"] <= row["high"]
        assert row["n_test"] == 540
    assert [row["n"] for row in rows] == [1, 2, 2]


@pytest.mark.ray
def test_mlflow_has_a_parent_and_a_child_for_each_slot(swept):
    _, store = swept
    runs = children(store, "small")
    assert len(runs) == 6
    assert {run.info.status for run in all_runs(store)} == {"FINISHED"}
    tags = runs[0].data.tags
    for name in ("trial_key", "sweep", "dataset", "paradigm", "modality", "method", "seed"):
        assert f"air.{name}" in tags
    parents = {run.data.tags["mlflow.parentRunId"] for run in runs}
    assert len(parents) == 1
    states = [run.data.tags["air.state"] for run in runs]
    assert sorted(states) == ["done"] * 5 + ["reused"]
    assert all("test/accuracy" in run.data.metrics for run in runs)


@pytest.mark.ray
def test_again_does_no_work_and_imports_neither_torch_nor_ray(swept):
    spec, store = swept
    before = len(events(store, "small"))
    code = (
        "import sys; sys.argv = ['airsweep', *sys.argv[1:]]\n"
        "from orchestrator.__main__ import main\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code == 0\n"
        "bad = {'torch', 'ray', 'mlflow', 'optuna'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    subprocess.run(
        [sys.executable, "-c", code, "run", str(spec), "--store", str(store)],
        env=environment(),
        check=True,
        capture_output=True,
    )
    assert len(events(store, "small")) == before


@pytest.mark.ray
def test_a_moved_store_still_knows_what_is_done(swept, tmp_path):
    spec, store = swept
    import shutil

    moved = tmp_path / "elsewhere"
    shutil.copytree(store, moved)
    plan = json.loads(airsweep("plan", spec, "--store", moved, "--json").stdout)
    assert plan["trials"]["to_run"] == 0
    assert table(moved, "small") == table(store, "small")


@pytest.mark.ray
def test_another_sweep_reuses_what_this_one_computed(swept, drawn_digits):
    spec, store = swept
    body = SWEEP.format(folder=drawn_digits).replace("[1, 2]", "[1, 2, 3]")
    more = write_sweep(spec.parent, "more", body)
    plan = json.loads(airsweep("plan", more, "--store", store, "--json").stdout)
    assert plan["trials"] == {"total": 9, "done": 0, "reused": 7, "to_run": 2}


def test_help_is_quick_to_import_and_lists_the_commands():
    done = airsweep("--help")
    for command in ("validate", "plan", "prepare", "run", "status", "table", "ui"):
        assert command in done.stdout
    code = (
        "import sys; sys.argv = ['airsweep', '--help']\n"
        "from orchestrator.__main__ import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'ray', 'mlflow', 'numpy', 'pydantic', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True, capture_output=True)


@pytest.mark.parametrize(
    ("body", "place", "words"),
    [
        ("grid: {method: [fpl, cpll]}\n", ":3:22:", "did you mean"),
        ("fixed: {method: fpl, backbone: /nowhere/at/all}\n", "", "/nowhere/at/all"),
        ("fixed: {method: fpl}\nfusion: 1\n", ":4:1:", "fusion"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(tmp_path, body, place, words):
    spec = write_sweep(tmp_path, "bad", body)
    done = airsweep("run", spec, "--store", tmp_path / "runs", check=False)
    assert done.returncode == 2
    assert place in done.stderr
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    if place:
        assert done.stderr.startswith(f"{spec}{place} ")
    assert done.stdout == ""
    assert not (tmp_path / "runs" / "sweeps").exists()


def test_an_unknown_sweep_names_those_that_are_there(tmp_path):
    done = airsweep("status", "nothing", "--store", tmp_path, check=False)
    assert done.returncode == 2
    assert "no sweep default/nothing" in done.stderr

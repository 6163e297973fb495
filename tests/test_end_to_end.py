"""Commands from outside that need no cluster: help, what bad input gets, rows that are the same."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from orchestrator.__main__ import main
from tests.sweeps import airsweep, count, environment, events, write_sweep


def test_help_is_quick_to_import_and_lists_the_commands():
    done = airsweep("--help")
    commands = ("validate", "plan", "prepare", "run", "retry", "status", "table", "ui")
    for command in (*commands, "cache", "mlflow", "repro", "diff"):
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


COMMANDS = (
    "run",
    "prepare",
    "plan",
    "status",
    "table",
    "ui",
    "cache ls",
    "cache verify",
    "cache gc",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_store_of_another_version_is_refused_with_exit_code_3(
    tmp_path, monkeypatch, capsys, command
):
    """In this process: nine starts of Python would take longer than they tell."""
    store = tmp_path / "runs"
    store.mkdir()
    (store / "VERSION").write_text("99\n")
    spec = str(write_sweep(tmp_path, "x", "fixed: {method: fpl}\n"))
    named = {"run": spec, "prepare": spec, "plan": spec, "status": "x", "table": "x"}
    words = [*command.split(), *([named[command]] if command in named else [])]
    monkeypatch.setattr(sys, "argv", ["airsweep", *words, "--store", str(store)])
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr()
    assert end.value.code == 3
    assert "is a store of version '99'; this airsweep reads version 1 alone" in said.err
    assert said.out == ""
    assert list(store.iterdir()) == [store / "VERSION"]


def test_an_unknown_sweep_names_those_that_are_there(tmp_path):
    done = airsweep("status", "nothing", "--store", tmp_path, check=False)
    assert done.returncode == 2
    assert "no sweep default/nothing" in done.stderr


def test_cells_of_the_same_images_wait_for_them_together_and_run_once(tmp_path, drawn_digits):
    other = shutil.copytree(drawn_digits, tmp_path / "copied")
    body = f"""
grid: {{generator: ["folder:{drawn_digits}", "folder:{other}"]}}
fixed: {{method: air_fpl, generation.block: 8, images_per_class: 8}}
seeds: [1, 2]
"""
    spec, store = write_sweep(tmp_path, "twins", body), tmp_path / "runs"
    command = ("run", spec, "--store", store, "--tracking-uri", "none")
    airsweep(*command, module="tests.trivial")
    found = events(store, "twins")
    assert count(found, "trial_done") == count(found, "trial_reused") == 2
    assert count(found, "trial_failed") == 0
    rows = json.loads(airsweep("table", "twins", "--store", store, "--format", "json").stdout)
    assert [row["n"] for row in rows] == [2, 2]

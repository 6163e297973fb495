"""Commands that need no cluster: help, errors for bad input, equal images of two folders."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.sweeps import airsweep, count, environment, events, write_sweep


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
    ("body", "position", "words"),
    [
        ("grid: {method: [fpl, cpll]}\n", ":3:22:", "did you mean"),
        ("fixed: {method: fpl, backbone: /nowhere/at/all}\n", "", "/nowhere/at/all"),
        ("fixed: {method: fpl}\nfusion: 1\n", ":4:1:", "fusion"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(command, tmp_path, body, position, words):
    spec = write_sweep(tmp_path, "bad", body)
    code, out, err = command("run", spec, "--store", tmp_path / "runs")
    assert (code, out) == (2, "")
    assert position in err
    assert words in err
    assert len(err.strip().splitlines()) == 1
    if position:
        assert err.startswith(f"{spec}{position} ")
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


@pytest.mark.parametrize("name", COMMANDS)
def test_a_store_of_another_version_is_refused_with_exit_code_3(tmp_path, command, name):
    store = tmp_path / "runs"
    store.mkdir()
    (store / "VERSION").write_text("99\n")
    spec = str(write_sweep(tmp_path, "x", "fixed: {method: fpl}\n"))
    named = {"run": spec, "prepare": spec, "plan": spec, "status": "x", "table": "x"}
    words = [*name.split(), *([named[name]] if name in named else [])]
    code, out, err = command(*words, "--store", store)
    assert (code, out) == (3, "")
    assert "is a store of version '99', but this airsweep reads version 1" in err
    assert list(store.iterdir()) == [store / "VERSION"]


def test_an_unknown_sweep_is_exit_code_2(tmp_path):
    done = airsweep("status", "nothing", "--store", tmp_path, check=False)
    assert done.returncode == 2
    assert "no sweep default/nothing" in done.stderr


def test_cells_of_equal_images_are_one_computation(tmp_path, drawn_digits):
    other = shutil.copytree(drawn_digits, tmp_path / "copied")
    body = f"""
grid: {{generator: ["folder:{drawn_digits}", "folder:{other}"]}}
fixed: {{method: air_fpl, generation.block: 8, images_per_class: 8}}
seeds: [1, 2]
"""
    spec, store = write_sweep(tmp_path, "twins", body), tmp_path / "runs"
    command = ("run", spec, "--store", store, "--tracking-uri", "none")
    airsweep(*command, module="tests.helpers.trivial")
    log = events(store, "twins")
    assert count(log, "trial_done") == count(log, "trial_reused") == 2
    assert count(log, "trial_failed") == 0
    rows = json.loads(airsweep("table", "twins", "--store", store, "--format", "json").stdout)
    assert [row["n"] for row in rows] == [2, 2]


@pytest.fixture
def foreign_store() -> Iterator[Path]:
    """A store that belongs to root and that other users may read."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to change the user")
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # other users cannot enter pytest's folder
    folder.chmod(0o755)
    yield folder / "runs"
    shutil.rmtree(folder)


def test_a_user_who_may_only_read_can_use_all_views_and_cannot_run(foreign_store, command):
    folder = foreign_store.parent
    mine = write_sweep(folder, "mine", "fixed: {method: fpl}\nseeds: [1]\n")
    other = write_sweep(folder, "other", "fixed: {method: zero_shot}\nseeds: [1]\n")
    airsweep("run", mine, "--store", foreign_store, module="tests.helpers.trivial")

    def outcome(*arguments: str | Path) -> tuple[int, str]:
        code, out, err = command(*arguments)
        return code, out + err

    store = ("--store", foreign_store)
    views = [(*words, *store) for words in (("status", "mine"), ("table", "mine"), ("plan", other))]
    as_root = [outcome(*words) for words in (*views, ("run", mine, *store))]  # imports all modules
    os.seteuid(65534)
    try:
        assert [outcome(*words) for words in (*views, ("run", mine, *store))] == as_root
        refused = outcome("run", other, *store)
        os.seteuid(0)
        foreign_store.chmod(0o700)
        os.seteuid(65534)
        closed = outcome("status", "mine", *store)
    finally:
        os.seteuid(0)
    assert [code for code, _ in as_root] == [0, 0, 0, 0]
    assert refused[0] == closed[0] == 3
    assert f"may not write {foreign_store}, which belongs to root" in refused[1]
    assert f"may not read {foreign_store}" in closed[1]
    assert not (foreign_store / "sweeps" / "default" / "other").exists()

"""Commands that need no cluster: help, errors for bad input, equal images of two folders."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from air_core.models.weights import tiny_folder
from orchestrator.store import open_store
from tests.helpers.servers import free_port
from tests.helpers.sweeps import airsweep, python, write_sweep

# Libraries that take long to import, or are not installed everywhere.
UNUSED = {
    "orchestrator.api": "torch ray mlflow numpy pandas pydantic yaml typer",
    "orchestrator.execution.driver": "torch obstore pyarrow",
    "orchestrator.tracking.export, orchestrator.tracking_uri": "mlflow",
    "orchestrator.cli.cache, orchestrator.planning.recorded": "torch ray mlflow optuna pyarrow",
    "orchestrator.reporting.html_report": "torch ray mlflow optuna sklearn",
    "air_core.bundle": "torch PIL open_clip",
}


@pytest.mark.parametrize(("modules", "libraries"), UNUSED.items())
def test_a_module_imports_no_heavy_library(modules, libraries):
    code = f"import sys, {modules}; print(*sorted({{*sys.argv[1:]}} & {{*sys.modules}}))"
    assert python("-c", code, *libraries.split()).stdout == "\n"


HELP = """
import sys
from orchestrator.__main__ import main
libraries, sys.argv = sys.argv[1].split(), sys.argv[1:]
try: main()
finally: print(*sorted({*libraries} & {*sys.modules}), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("words", "libraries", "shown"),
    [
        ("--help", "torch ray mlflow numpy pydantic yaml", "Start Run Look Use after plan cache"),
        ("check --help", "numpy PIL torch ray", "DATASET"),
        ("--version", "torch ray diffusers open_clip", "airsweep ray torch CUDA"),
        (
            "plan quickstart --store /nowhere/runs --json",
            "torch ray mlflow optuna diffusers transformers peft open_clip sklearn matplotlib",
            "artifacts estimate",
        ),
    ],
)
def test_a_command_that_computes_nothing_imports_no_heavy_library(words, libraries, shown):
    done = python("-c", HELP, libraries, *words.split())
    assert done.stderr == "\n"
    for word in shown.split():
        assert word in done.stdout


@pytest.mark.parametrize("name", ["run", "plan", "status", "table", "ui", "cache ls", "cache gc"])
def test_a_store_of_another_format_is_refused_with_exit_code_3(tmp_path, command, name):
    store = tmp_path / "runs"
    store.mkdir()
    (store / "store.json").write_text('{"format": 99}')
    spec = str(write_sweep(tmp_path, "x", "fixed: {method: fpl}\n"))
    named = {"run": spec, "plan": spec, "status": "x", "table": "x"}
    words = [*name.split(), *([named[name]] if name in named else [])]
    code, out, err = command(*words, "--store", store)
    assert (code, out) == (3, "")
    assert "has format 99, but this airsweep reads format 1: choose another" in err
    assert list(store.iterdir()) == [store / "store.json"]


def test_a_mistyped_name_of_a_sweep_is_an_error_with_the_three_most_similar_ones(tmp_path, command):
    open_store(tmp_path).initialize()
    for name in ("air", "colours", "context", "contexts", "texture"):
        (tmp_path / "sweeps" / "default" / name).mkdir(parents=True)
        (tmp_path / "sweeps" / "default" / name / "events.jsonl").touch()
    code, _, err = command("status", "contxt", "--store", tmp_path)
    assert code == 2
    assert "recorded sweeps: default/context, default/contexts, default/" in err
    assert "and 2 more, see `airsweep list`" in err


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
    shutil.copytree(tiny_folder(), folder / "clip")
    airsweep("run", mine, "--store", foreign_store, module="tests.helpers.trivial")

    def outcome(*arguments: str | Path) -> tuple[int, str]:
        code, out, err = command(*arguments)
        return code, re.sub(r"(?m)^[0-9:]{8} ", "", out + err)  # without the time of log lines

    store = ("--store", foreign_store)
    views = [(*words, *store) for words in (("status", "mine"), ("table", "mine"), ("plan", other))]
    as_root = [outcome(*words) for words in (*views, ("run", mine, *store))]  # imports all modules
    copied = ("--set", f"backbone={folder / 'clip'}")
    outcome("plan", other, "--store", folder / "new", *copied)  # imports those that read models
    os.seteuid(65534)
    try:
        assert [outcome(*words) for words in (*views, ("run", mine, *store))] == as_root
        refused = outcome("run", other, *store)
        unchecked = outcome("plan", other, "--check", *store)
        unplanned = outcome("plan", other, *store, *copied)
        outside = [
            outcome(*words, "--store", folder / "new")
            for words in (("run", other), ("plan", other, "--check"))
        ]
        os.seteuid(0)
        foreign_store.chmod(0o700)
        os.seteuid(65534)
        closed = outcome("status", "mine", *store)
    finally:
        os.seteuid(0)
    assert [code for code, _ in as_root] == [0, 0, 0, 0]
    assert unplanned[0] == 0  # its digests cannot be written to the store
    for code, screen in (refused, unchecked):
        assert code == 2
        assert f"may not write {foreign_store}, which belongs to root" in screen
        assert "choose another folder with --store" in screen
    for code, screen in outside:
        assert code == 2
        assert f"may not write {folder}/new: {folder} belongs to root" in screen
    assert closed[0] == 2
    assert f"may not read {foreign_store}, which belongs to root" in closed[1]
    assert not (foreign_store / "sweeps" / "default" / "other").exists()
    assert sorted(folder.iterdir()) == sorted([folder / "clip", mine, other, foreign_store])


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("", "the store is empty"),
        ("~nosuchuser/runs", "home of an unknown user"),
        ("{folder}/two.yaml", "two.yaml is a file; a store is a folder"),
        ("{folder}/two.yaml/runs", "two.yaml is a file; a store is a folder"),
        ("/proc/runs", "cannot be created"),
    ],
)
def test_a_run_with_an_unusable_store_exits_with_2_and_writes_nothing(
    address, reason, tmp_path, command, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    spec = write_sweep(tmp_path, "two", "fixed: {method: zero_shot}\n")
    code, out, err = command("run", spec, "--store", address.format(folder=tmp_path))
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert reason in err
    assert "--store" in err
    assert list(tmp_path.iterdir()) == [spec]


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1:1", "http://127.0.0.1:8265"])
def test_a_run_whose_cluster_does_not_answer_leaves_no_store(
    tmp_path, command, address, monkeypatch
):
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr("orchestrator.cluster.session.CONNECT_TIMEOUT", 0.1)
    spec = write_sweep(tmp_path, "one", "fixed: {method: zero_shot}\n")
    code, _, err = command("run", spec, "--store", tmp_path / "runs", "--tracking-uri", "none")
    assert code == 3
    assert f"RAY_ADDRESS={address}" in err
    assert not (tmp_path / "runs").exists()


def test_a_ray_that_does_not_start_in_time_is_awaited_and_then_refused(
    tmp_path, command, monkeypatch
):
    def init(**options):
        time.sleep(1.5)
        raise Exception("The current node timed out during startup. This could happen because")

    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("orchestrator.cluster.session.kill_local_ray", lambda: None)
    monkeypatch.setattr("orchestrator.execution.screen.WAIT_INTERVAL", 1)
    spec = write_sweep(tmp_path, "one", "fixed: {method: zero_shot}\n")
    code, _, err = command("run", spec, "--store", tmp_path / "runs", "--tracking-uri", "none")
    assert code == 3
    assert "waiting for Ray to start (1 s so far)" in err
    last = err.splitlines()[-1]
    assert last.startswith(
        "airsweep: Ray did not start on this machine (The current node timed out"
    )
    assert "startup); if the machine is busy, try again later (Ray's logs: " in last


def test_a_deleted_working_directory_is_named(tmp_path):
    (tmp_path / "gone").mkdir()
    leave = f"import os, sys; os.chdir({str(tmp_path / 'gone')!r}); os.rmdir(os.getcwd())"
    run = "from orchestrator.__main__ import main; sys.argv = ['airsweep', 'list']; main()"
    done = python("-c", f"{leave}; {run}", check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "the working directory was deleted" in done.stderr


def test_a_plan_and_a_refused_run_do_not_create_the_store(tmp_path, command):
    spec = write_sweep(
        tmp_path, "two", "fixed: {method: zero_shot}\nresources: {trial: {cpu: 999}}\n"
    )
    store = ("--store", tmp_path / "runs")
    code, out, _ = command("plan", spec, *store)
    assert (code, "a trial requires 999 CPU" in out) == (0, True)
    tracking = ("--tracking-uri", f"http://127.0.0.1:{free_port()}")
    code, _, err = command("run", spec, *store)
    assert (code, "a trial requires 999 CPU" in err) == (3, True)
    assert command("run", spec, *store, *tracking, "--set", "resources.trial.cpu=1")[0] == 3
    assert not (tmp_path / "runs").exists()


def test_the_commands_that_a_smoke_run_prints_find_its_results(tmp_path, command):
    spec = write_sweep(tmp_path, "two", "fixed: {method: zero_shot}\n")
    arguments = ("run", spec, "--smoke", "--store", tmp_path / "runs", "--tracking-uri", "none")
    screen = airsweep(*arguments, module="tests.helpers.trivial").stdout
    printed = " ".join(screen.split())

    def words(first: str, end: str) -> list[str]:
        return shlex.split(printed[printed.index(first) :].partition(end)[0])[1:]

    code, out, _ = command(*words("airsweep table", " the table"))
    assert code == 0
    assert "zero_shot" in out
    whole = words("airsweep run", " the whole sweep")
    assert "nothing to do" in command(*whole, "--smoke")[2]
    assert "3 trials" in command(*["plan", *whole[1:]])[1]
    assert not (tmp_path / "runs-smoke-smoke").exists()
    code, _, err = command("table", "two", "--store", tmp_path / "runs")
    assert code == 2
    assert f"--store {tmp_path / 'runs-smoke'}" in err


def test_a_damaged_database_of_runs_is_named_with_its_remedy(tmp_path, command):
    (tmp_path / "mlflow.db").write_bytes(b"no database " * 100)
    code, _, err = command("ui", "--store", tmp_path)
    assert code == 2
    assert f"{tmp_path}/mlflow.db: file is not a database; move the file, and `airsweep" in err


def test_a_file_in_the_place_of_a_folder_of_the_store_is_named(tmp_path, command):
    spec = write_sweep(tmp_path, "two", "fixed: {method: zero_shot}\n")
    (tmp_path / "sweeps").touch()
    for words in (("plan", spec), ("run", spec)):
        code, _, err = command(*words, "--store", tmp_path)
        assert code == 2
        assert f"{tmp_path}/sweeps" in err
        assert "there is a file where a folder is needed" in err
    assert not (tmp_path / "artifacts").exists()
    code, _, err = command("plan", spec, "--store", tmp_path / ("x" * 300))
    assert (code, "the path is too long" in err) == (2, True)


def test_a_server_on_a_port_in_use_is_refused(tmp_path, command):
    (tmp_path / "mlflow.db").touch()
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = str(used.getsockname()[1])
        code, _, err = command("ui", "--store", tmp_path, "--port", port)
    assert code == 2
    assert f"port {port}: Address already in use" in err

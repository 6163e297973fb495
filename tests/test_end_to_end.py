"""Commands that need no cluster: help, errors for bad input, smoke runs."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from air_core.models.weights import tiny_folder
from tests.helpers.golden import check_refusals
from tests.helpers.servers import free_port
from tests.helpers.sweeps import airsweep, python, write_sweep

# Names of recorded sweeps.
SIMILAR = ("air", "colours", "context", "contexts", "texture")
IMPORTED = """
import sys
code, libraries = sys.argv[1], sys.argv[2].split()
try: exec(code)
finally: print(*sorted({*libraries} & {*sys.modules}), file=sys.stderr)
"""
MAIN = "from orchestrator.__main__ import main; sys.argv[1:] = {!r}.split(); main()"
WORKER = """
from orchestrator.cluster.session import prepare_worker
prepare_worker({}, ())
"""
TRAINED = """
import torch, orchestrator.execution._tuning, orchestrator.stages.trial_run
from air_core.backbone.loading import load_backbone
load_backbone("tiny")
torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1).step()
"""
DRAWN = """
import orchestrator.execution._stream, orchestrator.stages.images, orchestrator.stages.evidence
from air_core.diffusion.pipeline import load_pipeline
from air_core.models.weights import generator_folder
load_pipeline(generator_folder("tiny"))
"""
PLAN = "plan quickstart --store /nowhere/runs --json"


@pytest.mark.parametrize(
    ("code", "libraries", "shown"),  # libraries take long to import, or are not everywhere
    [
        ("import orchestrator.api", "torch ray mlflow numpy pandas pydantic yaml typer", ""),
        ("import orchestrator.execution.driver", "torch obstore pyarrow", ""),
        ("import orchestrator.execution._progress", "numpy pydantic", ""),
        ("import orchestrator.tracking.export, orchestrator.tracking_uri", "mlflow", ""),
        ("import orchestrator.cli.cache", "torch ray mlflow optuna pyarrow", ""),
        ("import orchestrator.planning.recorded", "torch ray mlflow optuna pyarrow", ""),
        ("import orchestrator.reporting.html_report", "torch ray mlflow optuna sklearn", ""),
        ("import air_core.bundle", "torch PIL open_clip", ""),
        (WORKER + TRAINED, "sympy scipy mlflow matplotlib optuna diffusers transformers timm", ""),
        (WORKER + DRAWN, "mlflow matplotlib optuna timm sklearn", ""),
        (
            MAIN.format("--help"),
            "torch ray mlflow numpy pydantic yaml",
            "Start Run Look Use after plan cache",
        ),
        (MAIN.format("check --help"), "numpy PIL torch ray", "DATASET"),
        (MAIN.format("--version"), "torch ray diffusers open_clip", "airsweep ray torch CUDA"),
        (
            MAIN.format(PLAN),
            "torch ray mlflow optuna diffusers transformers peft open_clip sklearn matplotlib",
            "artifacts estimate",
        ),
    ],
)
def test_code_that_computes_nothing_imports_no_heavy_library(code, libraries, shown):
    done = python("-c", IMPORTED, code, libraries)
    assert done.stderr == "\n"
    for word in shown.split():
        assert word in done.stdout


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
    folder, store = foreign_store.parent, ("--store", foreign_store)
    mine = write_sweep(folder, "mine", "fixed: {method: fpl}\nseeds: [1]\n")
    other = write_sweep(folder, "other", "fixed: {method: zero_shot}\nseeds: [1]\n")
    shutil.copytree(tiny_folder(), folder / "clip")
    airsweep("run", mine, *store, trivial=True)
    words = (("status", "mine"), ("table", "mine"), ("plan", other), ("run", mine))

    def outcomes() -> list[tuple[int, str]]:
        found = [command(*each, *store) for each in words]
        # Without the time of log lines.
        return [(code, re.sub(r"(?m)^[0-9:]{8} ", "", out + err)) for code, out, err in found]

    copied = ("plan", other, "--set", f"backbone={folder / 'clip'}")
    # Imports all modules, which the other user may not read.
    as_root, *_ = outcomes(), command(*copied, "--store", folder / "new"), folder.group()
    os.seteuid(65534)
    try:
        assert outcomes() == as_root
        refused = command("run", other, *store), command("plan", other, "--check", *store)
        outside = command("run", other, "--store", folder / "new")
        assert command(*copied, *store)[0] == 0  # its digests cannot be written to the store
        os.seteuid(0)
        foreign_store.chmod(0o700)
        os.seteuid(65534)
        closed = command("status", "mine", *store)
    finally:
        os.seteuid(0)
    assert [code for code, _ in as_root] == [0, 0, 0, 0]
    for code, _, err in refused:
        assert code == 2
        assert f"may not write {foreign_store}, which belongs to root" in err
        assert "choose another folder with --store" in err
    assert outside[0] == closed[0] == 2
    assert f"may not write {folder}/new: {folder} belongs to root" in outside[2]
    assert f"may not read {foreign_store}, which belongs to root" in closed[2]
    assert not (foreign_store / "sweeps" / "default" / "other").exists()
    assert sorted(folder.iterdir()) == sorted([folder / "clip", mine, other, foreign_store])


def test_a_store_that_cannot_be_used_is_refused_and_nothing_is_written(
    tmp_path, command, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write_sweep(tmp_path, "two", "fixed: {method: zero_shot}\n")
    for name, file, text in (
        ("later", "store.json", '{"format": 99}'),
        ("mixed", "sweeps", ""),
        ("damaged", "mlflow.db", "no database " * 100),
        *(("many", f"sweeps/default/{name}/events.jsonl", "") for name in SIMILAR),
    ):
        (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name / file).write_text(text)
    before = {*tmp_path.rglob("*")}
    stores = ("", "~nosuchuser/runs", "two.yaml", "two.yaml/runs", "later", "mixed")
    looks = ("plan two.yaml", "status two", "table two", "ui", "cache ls", "cache gc")
    check_refusals(
        "messages/stores.txt",
        command,
        *(("run", "two.yaml", "--store", store) for store in stores),
        *((*words.split(), "--store", "later") for words in looks),
        ("plan", "two.yaml", "--store", "mixed"),
        ("plan", "two.yaml", "--store", "x" * 300),
        ("ui", "--store", "damaged"),
        ("status", "contxt", "--store", "many"),
        folder=tmp_path,
    )
    assert {*tmp_path.rglob("*")} - before == {tmp_path / "mixed" / "digests.json"}
    code, _, err = command("run", "two.yaml", "--store", "/proc/runs")
    assert (code, "/proc/runs cannot be created" in err) == (2, True)


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


@pytest.mark.ray
def test_a_ray_that_does_not_start_in_time_is_refused(tmp_path):
    spec = write_sweep(tmp_path, "one", "fixed: {method: zero_shot}\n")
    words = ("run", spec, "--store", tmp_path / "runs", "--tracking-uri", "none")
    done = airsweep(*words, check=False, RAY_gcs_server_port_wait_time_s="0")
    assert done.returncode == 3
    last = done.stderr.splitlines()[-1]
    assert last.startswith("airsweep: Ray did not start on this machine (")
    assert "if the machine is busy, try again later (Ray's logs: " in last


def test_a_deleted_working_directory_is_named(tmp_path, command, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    message = "airsweep: the working directory was deleted; change to one that exists\n"
    assert command("list") == (2, "", message)


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
    screen = airsweep(*arguments, trivial=True).stdout
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


def test_a_server_on_a_port_in_use_is_refused(tmp_path, command):
    (tmp_path / "mlflow.db").touch()
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = str(used.getsockname()[1])
        code, _, err = command("ui", "--store", tmp_path, "--port", port)
    assert code == 2
    assert f"port {port}: Address already in use" in err

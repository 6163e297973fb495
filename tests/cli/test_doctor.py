"""`airsweep doctor` on this machine; test_preflight checks nodes of clusters."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.disks import small_disk
from tests.helpers.servers import free_port
from tests.helpers.sweeps import airsweep, environment, python, write_sweep

SWEEP = "fixed: {method: fpl, train.steps: 3}\nseeds: [1]\n"


@pytest.fixture
def spec(tmp_path) -> Path:
    return write_sweep(tmp_path, "small", SWEEP)


def report(*words: str | Path, code: int, **variables: str) -> dict[str, Any]:
    done = airsweep("doctor", *words, "--json", check=False, **variables)
    assert done.returncode == code, done.stdout + done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    assert result["ok"] == (code == 0)
    return result


def test_a_healthy_machine_passes_and_no_file_is_left(tmp_path):
    result = report("--store", tmp_path / "deep" / "runs", code=0)
    assert result["findings"] == []
    skipped = {name for name, check in result["checks"].items() if check["state"] == "-"}
    assert skipped == {"sweep", "resources"}  # no sweep was given
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_is_checked_with_its_weights_and_resources(spec, tmp_path):
    result = report(spec, "--store", tmp_path / "runs", code=0)
    assert result["checks"]["sweep"]["state"] == "ok"
    assert result["checks"]["resources"]["state"] == "ok"
    result = report(
        spec, "--set", "backbone=ViT-B-32@gone.pt", "--store", tmp_path / "runs", code=3
    )
    (problem,) = result["findings"]
    assert (problem["node"], problem["check"]) == ("this machine", "sweep")
    assert "gone.pt does not exist" in problem["problem"]


def test_a_sweep_that_fits_no_machine_fails_with_a_remedy(spec, tmp_path):
    words = ("--set", "resources.trial.cpu=999", "--store", tmp_path / "runs")
    done = airsweep("doctor", spec, *words, check=False)
    assert done.returncode == 3
    assert "resources  failed  a trial requires 999 CPU" in done.stdout
    assert "lower resources.trial.cpu or .gpu" in done.stdout.splitlines()[-1]


def test_a_library_version_out_of_range_fails_with_the_pip_command(tmp_path):
    """The metadata of an older version comes first on the path."""
    folder = tmp_path / "optuna-4.0.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: optuna\nVersion: 4.0.0\n")
    path = f"{tmp_path}:{environment()['PYTHONPATH']}"
    result = report("--store", tmp_path / "runs", code=3, PYTHONPATH=path)
    (problem,) = result["findings"]
    assert problem["problem"] == "optuna is 4.0.0, but airsweep needs <6,>=5.0"
    assert problem["remedy"] == "pip install 'optuna<6,>=5.0'"


def test_a_full_disk_and_a_read_only_disk_are_different_findings(tmp_path):
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        (problem,) = report_on_disk(disk)["findings"]
        assert (problem["check"], problem["fatal"]) == ("room", True)
        assert "cache gc" in problem["remedy"]
        remount = ["mount", "-o", "remount,ro", str(disk.place)]
        subprocess.run([*disk.inside, *remount], check=True)
        (problem,) = report_on_disk(disk)["findings"]
        assert problem["check"] == "store"
        assert "Read-only file system" in problem["problem"]
        run = ("-m", "orchestrator", "run", "quickstart", "--store", disk.place / "runs")
        done = python(*run, inside=disk.inside, check=False)
        assert done.returncode == 2
        assert f"the file system of {disk.place / 'runs'} is read-only" in done.stderr


def report_on_disk(disk: Any) -> dict[str, Any]:
    words = ("-m", "orchestrator", "doctor", "--json", "--store", disk.place / "runs")
    done = python(*words, inside=disk.inside, check=False)
    assert done.returncode == 3, done.stdout + done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_an_unreachable_tracker_fails(tmp_path):
    uri = f"http://127.0.0.1:{free_port()}"
    result = report("--store", tmp_path / "runs", "--tracking-uri", uri, code=3)
    (problem,) = result["findings"]
    assert problem["check"] == "tracker"
    assert f"MLflow at {uri} does not answer" in problem["problem"]
    assert "--tracking-uri none" in problem["remedy"]


def test_with_offline_no_socket_is_opened(spec, tmp_path):
    """An audit hook of Python records every use of a socket."""
    code = (
        "import sys\n"
        "opened = []\n"
        "sys.addaudithook(lambda name, args: name.startswith('socket.') and opened.append(name))\n"
        "from orchestrator.__main__ import main\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "assert not {'ray', 'mlflow', 'torch'} & set(sys.modules)\n"
        "print(opened, file=sys.stderr)\n"
    )
    uri = f"http://127.0.0.1:{free_port()}"
    for store in (str(tmp_path / "runs"), "s3://bucket/runs"):
        words = ("doctor", spec, "--offline", "--tracking-uri", uri, "--store", store)
        done = python("-c", code, *words)
        assert done.stderr == "[]\n"
        assert "not checked: --offline" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--cluster",), "--cluster needs --address"),
        (("--address", "http://head:8265"), "--address is allowed only with --cluster"),
        (("--cluster", "--address", "head:6379", "--offline"), "needs a connection"),
        (("nothing_such",), "nothing_such"),
    ],
)
def test_wrong_options_exit_with_2_and_one_message(words, message):
    done = airsweep("doctor", *words, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stdout == ""

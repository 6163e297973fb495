"""What `airsweep doctor` says of this machine; machines of clusters are in test_preflight."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.disks import small_disk
from tests.helpers.servers import free_port
from tests.helpers.sweeps import airsweep, environment, write_sweep

SWEEP = "fixed: {method: fpl, train.steps: 3}\nseeds: [1]\n"


@pytest.fixture
def spec(tmp_path) -> Path:
    return write_sweep(tmp_path, "small", SWEEP)


def looked(*words: str | Path, code: int, **more: str) -> dict[str, Any]:
    done = airsweep("doctor", *words, "--json", check=False, **more)
    assert done.returncode == code, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["ok"] == (code == 0)
    return found


def test_a_machine_that_is_fit_is_told_so_and_nothing_is_left(tmp_path):
    found = looked("--store", tmp_path / "deep" / "runs", code=0)
    assert found["findings"] == []
    left_out = {name for name, check in found["checks"].items() if check["state"] == "-"}
    assert left_out == {"sweep", "resources"}  # none was given
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_is_looked_at_with_what_it_names(spec, tmp_path):
    found = looked(spec, "--store", tmp_path / "runs", code=0)
    assert found["checks"]["sweep"]["state"] == "ok"
    assert found["checks"]["resources"]["state"] == "ok"
    found = looked(spec, "--set", "backbone=ViT-B-32@gone.pt", "--store", tmp_path / "runs", code=3)
    (problem,) = found["findings"]
    assert (problem["node"], problem["check"]) == ("this machine", "sweep")
    assert "gone.pt: that file is not there" in problem["problem"]


def test_a_sweep_that_fits_no_machine_is_told_with_the_remedy(spec, tmp_path):
    words = ("--set", "resources.trial.cpu=999", "--store", tmp_path / "runs")
    done = airsweep("doctor", spec, *words, check=False)
    assert done.returncode == 3
    assert "resources  failed  a trial requires 999 CPU" in done.stdout
    assert "lower resources.trial.cpu or .gpu" in done.stdout.splitlines()[-1]


def test_a_library_out_of_the_range_is_named_with_the_command_that_mends_it(tmp_path):
    """As an older one would lie there that comes first on the path."""
    folder = tmp_path / "optuna-4.0.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: optuna\nVersion: 4.0.0\n")
    path = f"{tmp_path}:{environment()['PYTHONPATH']}"
    found = looked("--store", tmp_path / "runs", code=3, PYTHONPATH=path)
    (problem,) = found["findings"]
    assert problem["problem"] == "optuna 4.0.0, and airsweep needs <6,>=5.0"
    assert problem["remedy"] == "pip install 'optuna<6,>=5.0'"


def test_a_disk_without_room_and_one_that_is_read_only_are_told_apart(tmp_path):
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        (problem,) = inside(disk, tmp_path)["findings"]
        assert (problem["check"], problem["fatal"]) == ("room", True)
        assert "cache gc" in problem["remedy"]
        remount = ["mount", "-o", "remount,ro", str(disk.place)]
        subprocess.run([*disk.inside, *remount], check=True)
        (problem,) = inside(disk, tmp_path)["findings"]
        assert problem["check"] == "store"
        assert "Read-only file system" in problem["problem"]


def inside(disk: Any, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "orchestrator", "doctor", "--json"]
    done = subprocess.run(
        [*disk.inside, *command, "--store", str(disk.place / "runs")],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert done.returncode == 3, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_tracker_that_is_away_is_told(tmp_path):
    uri = f"http://127.0.0.1:{free_port()}"
    found = looked("--store", tmp_path / "runs", "--tracking-uri", uri, code=3)
    (problem,) = found["findings"]
    assert problem["check"] == "tracker"
    assert f"MLflow at {uri} does not answer" in problem["problem"]
    assert "--tracking-uri none" in problem["remedy"]


def test_offline_it_opens_no_socket(spec, tmp_path):
    """Python itself tells of each socket."""
    code = (
        "import sys\n"
        "opened = []\n"
        "sys.addaudithook(lambda name, of: name.startswith('socket.') and opened.append(name))\n"
        "from orchestrator.__main__ import main\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "assert not {'ray', 'mlflow', 'torch'} & set(sys.modules)\n"
        "print(opened, file=sys.stderr)\n"
    )
    uri = f"http://127.0.0.1:{free_port()}"
    for store in (str(tmp_path / "runs"), "s3://bucket/runs"):
        words = ("doctor", str(spec), "--offline", "--tracking-uri", uri, "--store", store)
        done = subprocess.run(
            [sys.executable, "-c", code, *words],
            capture_output=True,
            text=True,
            env=environment(),
            check=True,
        )
        assert done.stderr == "[]\n"
        assert "not looked at: --offline" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--cluster",), "which cluster? give --address"),
        (("--address", "http://head:8265"), "--address: allowed with --cluster"),
        (("--cluster", "--address", "head:6379", "--offline"), "without a connection"),
        (("nothing_such",), "nothing_such"),
    ],
)
def test_a_bad_call_is_one_sentence(words, said):
    done = airsweep("doctor", *words, check=False)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stdout == ""

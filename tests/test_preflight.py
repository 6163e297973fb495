"""Node checks on a real cluster: an unfit machine is refused before a sweep starts.

The second machine is a raylet with separate mounts, so that a store or weights can exist on one
machine only.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.cluster.node_checks import TOKENS
from orchestrator.store.buckets import parse
from tests.helpers.clusters import head, joined
from tests.helpers.disks import SmallDisk
from tests.helpers.servers import free_port, full_bucket
from tests.helpers.sweeps import environment, run_command, table, write_sweep

pytestmark = [pytest.mark.integration, pytest.mark.ray]

ROOT = Path(__file__).parents[1]
UNTRACKED = {"MLFLOW_TRACKING_URI": "none"}
SWEEP = "fixed: {method: fpl, train.steps: 3, prompt.length: 2}\nseeds: [1]\n"


@pytest.fixture(scope="module")
def address(s3_server, tmp_path_factory) -> Iterator[str]:
    """A cluster of one machine, which inherits the variables of the bucket."""
    with head(AIRSWEEP_CACHE=str(tmp_path_factory.mktemp("mirrors"))) as address:
        yield address


@pytest.fixture
def spec(tmp_path) -> Path:
    return write_sweep(tmp_path, "small", SWEEP)


def run(
    address: str, spec: Path, store: Path | str, *words: str, do: str = "run", **more: str
) -> subprocess.CompletedProcess[str]:
    """Run a command with a sweep on the cluster at an address, without MLflow."""
    return run_command(
        [sys.executable, "-m", "orchestrator", do, str(spec), "--store", str(store), *words],
        check=False,
        cwd=spec.parent,  # Ray prepends the driver's working directory to the path of its workers
        env=environment(
            **{"RAY_ADDRESS": address, "RAY_AUTH_MODE": "disabled", **UNTRACKED, **more}
        ),
    )


def test_healthy_machines_are_checked_once_and_no_token_is_left(address, spec, encoded, tmp_path):
    with joined(address):
        checked = run(address, spec, tmp_path / "new", "--check", do="plan")
        assert checked.returncode == 0, checked.stderr
        assert "checked 2 machines of the cluster: ok" in checked.stderr
        assert not [path for path in (tmp_path / "new").rglob("*") if path.is_file()]
        done = run(address, spec, encoded)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("checked 2 machines of the cluster: ok") == 1
    assert [row["method"] for row in table(encoded, "small")] == ["fpl"]
    assert not list(encoded.glob(f"{TOKENS}*"))


def test_each_fault_of_a_machine_is_refused_with_its_remedy(address, tmp_path):
    """It has another airsweep, a GPU that torch does not see, and neither store nor weights."""
    old, clip, store = (tmp_path / name for name in ("old", "clip", "runs"))
    for package in ("air_core", "orchestrator"):
        shutil.copytree(ROOT / package, old / package)
    with (old / "air_core" / "training.py").open("a") as changed:
        changed.write("\nEARLIER = True\n")
    shutil.copytree(ROOT / "air_core" / "tiny" / "weights" / "clip", clip)
    spec = write_sweep(tmp_path, "own", SWEEP.replace("{", f"{{backbone: {clip}, "))
    gpus = ("--set", "resources.trial.gpu=0.5", "--set", "resources.generator.gpu=1")
    with SmallDisk(store, 200 << 20) as disk:
        subprocess.run([*disk.inside, "mount", "-t", "tmpfs", "none", str(clip)], check=True)
        with joined(address, "--num-gpus=1", inside=disk.inside, PYTHONPATH=str(old)):
            done = run(address, spec, store, *gpus)
    assert done.returncode == 3, done.stderr
    for words in (
        "1 of 2 machines of the cluster cannot run this sweep",
        f"store: {store} is not the store that the driver uses; give --store a folder",
        "its code differs from the driver's: air_core/training.py;",
        f"files: backbone {clip} is missing",
        "copy it to that machine",
        "Ray counts a GPU, but torch",
        "--num-gpus=0",
    ):
        assert words in done.stderr
    assert not (store / "artifacts").exists()
    assert not list(store.glob(f"{TOKENS}*"))


# ---------------------------------------------------------------- a bucket


def test_a_machine_that_cannot_reach_the_bucket_is_refused(address, spec, bucket):
    lost = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}"}
    with joined(address, **lost):
        done = run(address, spec, bucket)
    assert done.returncode == 3, done.stderr
    assert "1 of 2 machines" in done.stderr  # the other machine can use the bucket
    assert f"{lost['AWS_ENDPOINT_URL']} does not answer" in done.stderr
    assert not [entry.name for entry in parse(bucket).list_objects("unfinished")]


def test_a_full_bucket_is_refused_before_the_cluster_is_joined(address, spec, bucket, s3_server):
    parse(bucket).put("store.json", b'{"format": 1}')
    with full_bucket(s3_server) as full:
        done = run(address, spec, bucket, "--prepare", AWS_ENDPOINT_URL=full)
    assert done.returncode == 3, done.stderr
    assert f"airsweep: {bucket} is full (XMinioStorageFull" in done.stderr
    assert "choose another --store" in done.stderr
    assert "joining" not in done.stderr


# ---------------------------------------------------------------- joining


def test_a_cluster_that_requires_a_token_is_refused_with_the_variables_to_set(spec, tmp_path):
    token = tmp_path / "token"
    token.write_text("0" * 64)
    token.chmod(0o600)
    auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    with head(**auth) as address:
        done = run(address, spec, tmp_path / "runs")
        assert done.returncode == 3, done.stderr
        assert "rejected the connection" in done.stderr
        assert "export RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE" in done.stderr
        assert "0" * 64 not in done.stderr
        checked = run(address, spec, tmp_path / "runs", "--check", do="plan", **auth)
        assert checked.returncode == 0, checked.stderr
        assert "checked 1 machine of the cluster: ok" in checked.stderr

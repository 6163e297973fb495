"""Machines of a real cluster that are not fit: said before anything starts, and nothing is left.

The second machine is a raylet with mounts of its own, so that a store or weights which lie on one
machine only really do.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray

from orchestrator.cluster.node_facts import TOKENS
from orchestrator.store.buckets import parse
from tests.helpers.clusters import OneNode, head, one_node
from tests.helpers.disks import SmallDisk, small_disk
from tests.helpers.servers import free_port, full_bucket
from tests.helpers.sweeps import TIMEOUT, environment, table, write_sweep

pytestmark = [pytest.mark.integration, pytest.mark.ray]

ROOT = Path(__file__).parents[1]
SWEEP = "fixed: {method: fpl, train.steps: 3, prompt.length: 2}\nseeds: [1]\n"


@pytest.fixture(scope="module")
def cluster(s3_server, tmp_path_factory) -> Iterator[OneNode]:
    """Its machines inherit the way to the bucket."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AIRSWEEP_CACHE", str(tmp_path_factory.mktemp("mirrors")))
        with one_node(patch) as found:
            yield found


@pytest.fixture
def disk(tmp_path) -> Iterator[SmallDisk]:
    """Mounts of a machine's own; its disk lies where the store would."""
    with small_disk(tmp_path / "runs", 200 << 20) as found:
        yield found


@pytest.fixture
def spec(tmp_path) -> Path:
    return write_sweep(tmp_path, "small", SWEEP)


def run(cluster: OneNode, spec: Path, store: Path | str, *words: str, **more: Any) -> Any:
    return run_at(cluster.address, spec, store, *words, **more)


def run_at(
    address: str,
    spec: Path,
    store: Path | str,
    *words: str,
    do: str = "run",
    program: Sequence[str] = ("-m", "orchestrator"),
    inside: Sequence[str] = (),
    **more: str,
) -> subprocess.CompletedProcess[str]:
    """Do something with a sweep on the cluster at an address.

    Args:
        do: a command; `prepare` takes half the time of `run`.
        program: of Python.
        inside: what it begins with, such as `nsenter` into other mounts.
        more: of the environment.
    """
    command = [sys.executable, *program, do, str(spec), "--store", str(store)]
    return subprocess.run(
        [*inside, *command, *words],
        capture_output=True,
        text=True,
        cwd=spec.parent,  # Ray puts the folder that a driver is in before those of its machines
        env=environment(**{"RAY_ADDRESS": address, **more}),
        timeout=TIMEOUT,
        check=False,
    )


@contextmanager
def another_ray(folder: Path) -> Iterator[str]:
    own = Path(ray.__file__).parent
    folder.mkdir()
    subprocess.run(["cp", "-rs", str(own), str(folder / "ray")], check=True)
    said = folder / "ray" / "_version.py"
    text = said.read_text().replace(ray.__version__, "2.0.9")
    said.unlink()
    said.write_text(text)
    with head(PYTHONPATH=str(folder)) as address:
        yield address


def mounted(disk: SmallDisk, *words: str) -> None:
    """Mount something, for the machines alone that begin with `disk.inside`."""
    subprocess.run([*disk.inside, "mount", *words], check=True)


def assert_refused(done: subprocess.CompletedProcess[str], store: Path, *words: str) -> None:
    assert done.returncode == 3, done.stderr
    assert "1 of 2 machines of the cluster cannot do this sweep" in done.stderr
    for word in words:
        assert word in done.stderr
    assert not (store / "artifacts").exists()
    assert not list(store.glob(f"{TOKENS}*"))


def test_machines_that_are_fit_are_looked_at_once_and_nothing_is_left(cluster, spec, tmp_path):
    store = tmp_path / "runs"
    with cluster.joined():
        done = run(cluster, spec, store)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("checked 2 machines of the cluster: fit") == 1
    assert [row["method"] for row in table(store, "small")] == ["fpl"]
    assert not list(store.glob(f"{TOKENS}*"))


def test_a_store_that_one_machine_has_for_itself_lacks_or_may_only_read_is_refused(
    cluster, disk, spec, tmp_path
):
    hidden, kept = tmp_path / "hidden", tmp_path / "kept"
    for folder in (hidden, kept):
        folder.mkdir()
    mounted(disk, "-t", "tmpfs", "none", str(hidden))
    mounted(disk, "--bind", str(kept), str(kept))
    mounted(disk, "-o", "remount,bind,ro", str(kept))
    said = {
        disk.place: "is not the one that the driver writes to; give --store a folder that every",
        hidden / "runs": "is not there; give --store a folder that every machine mounts",
        kept: "cannot be used (Read-only file system); let the user of that machine's Ray",
    }
    with cluster.joined(inside=disk.inside):
        for store, words in said.items():
            done = run(cluster, spec, store)
            assert_refused(done, store, f"store: {store} {words}")


def test_weights_that_one_machine_lacks_or_has_otherwise_are_refused(cluster, disk, tmp_path):
    clip = tmp_path / "clip"
    shutil.copytree(ROOT / "air_core" / "tiny" / "weights" / "clip", clip)
    spec = write_sweep(tmp_path, "own", SWEEP.replace("{", f"{{backbone: {clip}, "))
    mounted(disk, "-t", "tmpfs", "none", str(clip))
    store = tmp_path / "shared"
    with cluster.joined(inside=disk.inside):
        done = run(cluster, spec, store)
        assert_refused(done, store, f"files: backbone {clip} is not there", "copy it there")
        changed = shutil.copytree(ROOT / "air_core" / "tiny" / "weights" / "clip", tmp_path / "new")
        weights = changed / "open_clip_model.safetensors"
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        mounted(disk, "--bind", str(changed), str(clip))
        done = run(cluster, spec, store)
    assert_refused(done, store, f"files: backbone {clip} has other content there")


def test_a_machine_with_another_airsweep_is_refused(cluster, spec, tmp_path):
    for package in ("air_core", "orchestrator"):
        leave = shutil.ignore_patterns("__pycache__", "papers")
        shutil.copytree(ROOT / package, tmp_path / "old" / package, ignore=leave)
    with (tmp_path / "old" / "air_core" / "training.py").open("a") as changed:
        changed.write("\nEARLIER = True\n")
    (tmp_path / "old" / "orchestrator" / "cluster" / "node_facts.py").unlink()
    store = tmp_path / "runs"
    with cluster.joined(PYTHONPATH=str(tmp_path / "old")):
        done = run(cluster, spec, store)
    assert_refused(
        done,
        store,
        "its airsweep is another one: "
        "air_core/training.py, orchestrator/cluster/node_facts.py differ",
    )


def test_a_gpu_that_ray_counts_and_torch_does_not_see_is_refused(cluster, spec, tmp_path):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    asks = ("--set", "resources.trial.gpu=0.5", "--set", "resources.generator.gpu=1")
    store = tmp_path / "runs"
    with cluster.joined("--num-gpus=1"):
        done = run(cluster, spec, store, *asks)
    assert_refused(done, store, "Ray counts a GPU there; torch", "--num-gpus=0")
    done = run(cluster, spec, store, *asks)
    assert done.returncode == 3
    assert "no machine has both" in done.stderr


# A machine whose workers take an hour to start, and a driver that is less patient. It waits long
# enough for the other machine to answer, busy or not.
SLOW = (
    "import sys, time\ntime.sleep(3600 * any('default_worker' in word for word in sys.orig_argv))\n"
)
HASTY = """
from orchestrator.cluster import (node_checks)
from orchestrator.__main__ import main

node_checks.ANSWER = 60
main()
"""


def test_a_machine_that_does_not_answer_is_refused(cluster, spec, tmp_path):
    store, slow = tmp_path / "runs", tmp_path / "slow"
    slow.mkdir()
    (slow / "sitecustomize.py").write_text(SLOW)
    with cluster.joined(PYTHONPATH=f"{slow}{os.pathsep}{ROOT}"):
        done = run(cluster, spec, store, program=("-c", HASTY))
    assert_refused(done, store, "answers: it could not be checked", "start Ray there anew")
    assert "no answer within 60 s" in done.stderr


def test_a_machine_that_goes_while_it_is_looked_at_is_told_of_and_stops_nothing(
    cluster, spec, tmp_path
):
    """As those that an autoscaler takes back. It is stopped before the look, so that the head
    counts it still, and gives it up meanwhile."""
    with cluster.joined() as machine:
        os.killpg(machine.pid, signal.SIGSTOP)
        done = run(cluster, spec, tmp_path / "runs", do="prepare")
    assert done.returncode == 0, done.stderr
    assert "answers: it could not be checked" in done.stderr
    assert "checked 1 machine of the cluster: fit" in done.stderr


# ---------------------------------------------------------------- a bucket


def test_a_machine_that_a_bucket_lets_not_in_is_refused(cluster, spec, bucket):
    lost = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}"}
    with cluster.joined(**lost):
        done = run(cluster, spec, bucket, "--tracking-uri", "none")
    assert done.returncode == 3, done.stderr
    assert "1 of 2 machines" in done.stderr  # the other reads and writes there
    assert f"{lost['AWS_ENDPOINT_URL']} does not answer" in done.stderr
    assert not [one.name for one in parse(bucket).listed("") if TOKENS in one.name]


def test_a_full_bucket_is_told_before_the_cluster_is_joined(cluster, spec, bucket, s3_server):
    parse(bucket).put("VERSION", b"1\n")
    with full_bucket(s3_server) as address:
        done = run(cluster, spec, bucket, do="prepare", AWS_ENDPOINT_URL=address)
    assert done.returncode == 3, done.stderr
    assert f"airsweep: {bucket} is full (XMinioStorageFull" in done.stderr
    assert "give another --store" in done.stderr
    assert "joining" not in done.stderr


# ---------------------------------------------------------------- joining


@pytest.mark.parametrize("address", ["127.0.0.1:1", "http://127.0.0.1:8265"])
def test_an_address_where_no_cluster_can_be_joined_is_refused(spec, tmp_path, address):
    done = run_at(address, spec, tmp_path / "runs")
    assert done.returncode == 3
    assert re.search(rf"no Ray answers at {address}|{address} cannot be joined", done.stderr)
    assert "Traceback" not in done.stderr


def test_a_cluster_of_another_ray_is_refused_with_both_versions(spec, tmp_path, monkeypatch):
    """A head of the same Ray, which says that it is another one: a tree of links to it, with one
    file of its own."""
    with another_ray(tmp_path / "other") as address:
        done = run_at(address, spec, tmp_path / "runs")
    assert done.returncode == 3, done.stderr
    assert f"{address} cannot be joined" in done.stderr
    assert "Ray: 2.0.9 Python: 3" in done.stderr
    assert f"Ray: {ray.__version__} Python: 3" in done.stderr
    assert "; install the same here" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_cluster_that_wants_a_token_is_refused_with_the_variables_to_set(spec, tmp_path):
    token = tmp_path / "token"
    token.write_text("0" * 64)
    token.chmod(0o600)
    auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    with head(**auth) as address:
        done = run_at(address, spec, tmp_path / "runs", RAY_AUTH_MODE="disabled")
        assert done.returncode == 3, done.stderr
        assert "lets us not in" in done.stderr
        assert "export RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE" in done.stderr
        assert "0" * 64 not in done.stderr
        done = run_at(address, spec, tmp_path / "runs", do="prepare", **auth)
        assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- doctor


def test_doctor_looks_at_each_machine_of_a_cluster_and_runs_nothing(cluster, disk, spec):
    with cluster.joined(inside=disk.inside):
        words = ("--cluster", "--json")
        done = run(cluster, spec, disk.place, *words, do="doctor")
    assert done.returncode == 3, done.stderr
    found = json.loads(done.stdout)
    states = sorted(one["store"] for one in found["machines"].values())
    assert states == ["failed", "ok"]
    assert {one["answers"] for one in found["machines"].values()} == {"ok"}
    (problem,) = found["findings"]
    assert problem["check"] == "store"
    assert found["machines"][problem["node"]]["store"] == "failed"
    assert found["checks"]["cluster"]["said"] == "2 machines, 2 CPU, 0 GPU"
    assert not (disk.place / "sweeps").exists()


def test_by_the_address_of_a_dashboard_a_cluster_looks_at_itself_as_a_job(spec, tmp_path):
    with head(jobs=True) as address:
        to = {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "disabled"}
        done = run_at(address, spec, tmp_path / "runs", "--cluster", do="doctor", **to)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "cluster    ok  1 machine, 1 CPU, 0 GPU" in done.stdout
        assert "versions   ok  Python" in done.stdout  # the cluster's, in the ranges of this code
        assert not (tmp_path / "runs" / "sweeps").exists()
        words = ("--cluster", "--json", "--set", "backbone=/nowhere")
        done = run_at(address, spec, "runs", *words, do="doctor", **to)
    assert done.returncode == 3, done.stdout + done.stderr
    (problem,) = json.loads(done.stdout)["findings"]
    assert "the store 'runs' is relative, and this is a Ray job" in problem["problem"]
    assert problem["remedy"].startswith("set --store")
    done = run_at(address, spec, tmp_path / "runs", "--cluster", do="doctor", **to)
    assert done.returncode == 3
    assert f"no Ray answers at {address}" in done.stderr

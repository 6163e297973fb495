"""Node checks on a real cluster: an unfit machine is refused before a sweep starts.

The second machine is a raylet with separate mounts, so that a store or weights can exist on one
machine only.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray

from orchestrator.cluster.node_checks import TOKENS
from orchestrator.store.buckets import parse
from tests.helpers.clusters import OneNode, head, one_node
from tests.helpers.disks import SmallDisk
from tests.helpers.servers import free_port, full_bucket
from tests.helpers.sweeps import environment, run_command, table, write_sweep

pytestmark = [pytest.mark.integration, pytest.mark.ray]

ROOT = Path(__file__).parents[1]
SWEEP = "fixed: {method: fpl, train.steps: 3, prompt.length: 2}\nseeds: [1]\n"


@pytest.fixture(scope="module")
def cluster(s3_server, tmp_path_factory) -> Iterator[OneNode]:
    """A cluster whose machines inherit the variables of the bucket."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AIRSWEEP_CACHE", str(tmp_path_factory.mktemp("mirrors")))
        with one_node(patch) as node:
            yield node


@pytest.fixture
def disk(tmp_path) -> Iterator[SmallDisk]:
    """Mounts of a second machine; a small disk takes the path of the store."""
    with SmallDisk(tmp_path / "runs", 200 << 20) as disk:
        yield disk


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
    """Run a command with a sweep on the cluster at an address.

    Args:
        do: the command.
        program: arguments of Python that start airsweep.
        inside: a prefix, such as `nsenter` into other mounts.
        more: environment variables.
    """
    command = [sys.executable, *program, do, str(spec), "--store", str(store)]
    return run_command(
        [*inside, *command, *words],
        check=False,
        cwd=spec.parent,  # Ray prepends the driver's working directory to the path of its workers
        env=environment(**{"RAY_ADDRESS": address, **more}),
    )


@contextmanager
def another_ray(folder: Path) -> Iterator[str]:
    """The head of a Ray with another version: links to the files of this Ray, except one."""
    folder.mkdir()
    subprocess.run(["cp", "-rs", str(Path(ray.__file__).parent), str(folder / "ray")], check=True)
    version_file = folder / "ray" / "_version.py"
    text = version_file.read_text().replace(ray.__version__, "2.0.9")
    version_file.unlink()
    version_file.write_text(text)
    with head(PYTHONPATH=str(folder)) as address:
        yield address


def mounted(disk: SmallDisk, *words: str) -> None:
    """Mount a file system for the machines that start with `disk.inside`."""
    subprocess.run([*disk.inside, "mount", *words], check=True)


def assert_refused(done: subprocess.CompletedProcess[str], store: Path, *words: str) -> None:
    assert done.returncode == 3, done.stderr
    assert "1 of 2 machines of the cluster cannot run this sweep" in done.stderr
    for word in words:
        assert word in done.stderr
    assert not (store / "artifacts").exists()
    assert not list(store.glob(f"{TOKENS}*"))


def test_healthy_machines_are_checked_once_and_no_token_is_left(cluster, spec, tmp_path):
    store = tmp_path / "runs"
    with cluster.joined():
        checked = run(cluster, spec, store, "--check", do="plan")
        assert checked.returncode == 0, checked.stderr
        assert "checked 2 machines of the cluster: ok" in checked.stderr
        assert not [path for path in store.rglob("*") if path.is_file()]
        done = run(cluster, spec, store)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("checked 2 machines of the cluster: ok") == 1
    assert [row["method"] for row in table(store, "small")] == ["fpl"]
    assert not list(store.glob(f"{TOKENS}*"))


def test_each_fault_of_a_machine_is_refused_with_its_remedy(cluster, disk, tmp_path):
    """The second machine has another airsweep, a GPU that torch does not see, and other files."""
    if importlib.import_module("torch").cuda.is_available():
        pytest.skip("this machine has a GPU")
    old = tmp_path / "old"
    for package in ("air_core", "orchestrator"):
        leave = shutil.ignore_patterns("__pycache__", "papers")
        shutil.copytree(ROOT / package, old / package, ignore=leave)
    with (old / "air_core" / "training.py").open("a") as changed:
        changed.write("\nEARLIER = True\n")
    clip, other = (tmp_path / name for name in ("clip", "other"))
    for folder in (clip, other):
        shutil.copytree(ROOT / "air_core" / "tiny" / "weights" / "clip", folder)
    weights = other / "open_clip_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    read_only = tmp_path / "kept"
    read_only.mkdir()
    mounted(disk, "--bind", str(read_only), str(read_only))
    mounted(disk, "-o", "remount,bind,ro", str(read_only))
    mounted(disk, "-t", "tmpfs", "none", str(clip))

    spec = write_sweep(tmp_path, "own", SWEEP.replace("{", f"{{backbone: {clip}, "))
    gpus = ("--set", "resources.trial.gpu=0.5", "--set", "resources.generator.gpu=1")
    with cluster.joined("--num-gpus=1", inside=disk.inside, PYTHONPATH=str(old)):
        assert_refused(
            run(cluster, spec, disk.place, *gpus),
            disk.place,
            f"store: {disk.place} is not the store that the driver uses; give --store a folder",
            "its code differs from the driver's: air_core/training.py;",
            f"files: backbone {clip} is missing",
            "copy it to that machine",
            "Ray counts a GPU, but torch",
            "--num-gpus=0",
        )
        mounted(disk, "--bind", str(other), str(clip))
        assert_refused(
            run(cluster, spec, read_only, "--check", *gpus, do="plan"),
            read_only,
            f"store: {read_only} cannot be used (Read-only file system); give --store a folder",
            f"files: backbone {clip} has other content than on the driver",
            "gpu: Ray counts a GPU",
        )


# The workers of a machine take an hour to start. The driver waits for the other machine's answer,
# however long it takes, and then no longer.
SLOW = (
    "import sys, time\ntime.sleep(3600 * any('default_worker' in word for word in sys.orig_argv))\n"
)
HASTY = """
import ray
from orchestrator.__main__ import main

def wait_for_one(pending, num_returns, timeout):
    return wait(pending, num_returns=1, timeout=None)

wait, ray.wait = ray.wait, wait_for_one
main()
"""


def test_a_machine_that_does_not_answer_is_refused(cluster, spec, tmp_path):
    store, slow = tmp_path / "runs", tmp_path / "slow"
    slow.mkdir()
    (slow / "sitecustomize.py").write_text(SLOW)
    with cluster.joined(PYTHONPATH=f"{slow}{os.pathsep}{ROOT}"):
        done = run(cluster, spec, store, program=("-c", HASTY))
    assert_refused(done, store, "answers: the machine could not be checked", "restart its Ray")
    assert "no answer within 90 s" in done.stderr


# ---------------------------------------------------------------- a bucket


def test_a_machine_that_cannot_reach_the_bucket_is_refused(cluster, spec, bucket):
    lost = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}"}
    with cluster.joined(**lost):
        done = run(cluster, spec, bucket, "--tracking-uri", "none")
    assert done.returncode == 3, done.stderr
    assert "1 of 2 machines" in done.stderr  # the other machine can use the bucket
    assert f"{lost['AWS_ENDPOINT_URL']} does not answer" in done.stderr
    assert not [entry.name for entry in parse(bucket).list_objects("unfinished")]


def test_a_full_bucket_is_refused_before_the_cluster_is_joined(cluster, spec, bucket, s3_server):
    parse(bucket).put("store.json", b'{"format": 1}')
    with full_bucket(s3_server) as address:
        done = run(cluster, spec, bucket, "--prepare", AWS_ENDPOINT_URL=address)
    assert done.returncode == 3, done.stderr
    assert f"airsweep: {bucket} is full (XMinioStorageFull" in done.stderr
    assert "choose another --store" in done.stderr
    assert "joining" not in done.stderr


# ---------------------------------------------------------------- joining


def test_a_cluster_with_another_ray_is_refused_with_both_versions(spec, tmp_path):
    with another_ray(tmp_path / "other") as address:
        done = run_at(address, spec, tmp_path / "runs")
    assert done.returncode == 3, done.stderr
    assert f"{address} cannot be joined" in done.stderr
    assert "Ray: 2.0.9 Python: 3" in done.stderr
    assert f"Ray: {ray.__version__} Python: 3" in done.stderr
    assert "; install the same versions here" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_cluster_that_requires_a_token_is_refused_with_the_variables_to_set(spec, tmp_path):
    token = tmp_path / "token"
    token.write_text("0" * 64)
    token.chmod(0o600)
    auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    with head(**auth) as address:
        done = run_at(address, spec, tmp_path / "runs", RAY_AUTH_MODE="disabled")
        assert done.returncode == 3, done.stderr
        assert "rejected the connection" in done.stderr
        assert "export RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE" in done.stderr
        assert "0" * 64 not in done.stderr
        done = run_at(address, spec, tmp_path / "runs", "--prepare", **auth)
        assert done.returncode == 0, done.stderr

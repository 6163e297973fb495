"""Facts of a node and the findings from them; test_preflight checks nodes of real clusters."""

from __future__ import annotations

import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cluster.node_checks import Finding, compare_facts, finding_lines
from orchestrator.cluster.node_facts import (
    DRIVER,
    STALE,
    TOKENS,
    NodeRequirements,
    has_token,
    node_facts,
    store_token,
)
from orchestrator.store import open_store
from tests.helpers.disks import small_disk
from tests.helpers.servers import free_port
from tests.helpers.sweeps import python, write_sweep

HEALTHY: dict[str, Any] = {
    "versions": {"python": "3.11.7", "ray": "2.60.0", "torch": "2.13.0+cpu", "numpy": "2.1.0"},
    "code": {"air_core/method.py": "a", "orchestrator/planning/plan.py": "b"},
    "store": {
        **{"exists": True, "token": True, "answered": True, "error": ""},
        **{"where": "/runs", "free": 1 << 40},
    },
    "temporary": ("/tmp", 0.5),
    "hub": {},
    "files": [{"count": 3, "digest": "x"}],
    "gpu": None,
}
INPUTS = (("backbone", "tiny"),)


def problems(bytes_left: int = 0, model: Any = None, **facts: Any) -> list[tuple[str, bool]]:
    needs = NodeRequirements(INPUTS, bytes_left=bytes_left, model=model)
    findings = compare_facts("b", HEALTHY | facts, HEALTHY, "/runs", needs)
    return [(finding.check, finding.fatal) for finding in findings]


def test_another_build_is_ignored_and_another_patch_version_of_a_library_is_a_warning():
    versions = HEALTHY["versions"]
    assert problems() == []
    assert problems(versions={**versions, "torch": "2.13.0+cu126"}) == []
    assert problems(versions={**versions, "numpy": "2.1.3"}) == [("versions", False)]
    assert problems(versions={**versions, "numpy": "2.2.0"}) == [("versions", True)]
    assert problems(versions={**versions, "ray": "2.60.1"}) == [("versions", True)]
    assert problems(versions={**versions, "torch": ""}) == [("versions", True)]


def test_each_wrong_fact_fails_its_check():
    store = HEALTHY["store"]
    assert problems(gpu="") == []
    assert problems(gpu="torch sees none") == [("gpu", True)]
    half_of_20 = ("flux has 20.0 GiB of weights in bf16", 0.5, 20 << 30)
    assert problems(model=half_of_20, gpu="", smallest_gpu=(80 << 30, 9.0)) == []
    assert problems(model=half_of_20, gpu="", smallest_gpu=(24 << 30, 9.0)) == [("gpu", True)]
    assert problems(model=half_of_20, gpu="", smallest_gpu=None) == []  # unknown
    assert problems(bytes_left=1 << 41) == [("room", False)]
    assert problems(store={**store, "free": 1 << 20}) == [("room", True)]
    for wrong in ({"error": "Disk quota exceeded", "answered": False}, {"answered": False}):
        assert problems(store={**store, **wrong}) == [("store", True)]
    assert problems(files=[{"count": 3, "digest": "y"}]) == [("files", True)]
    assert problems(files=[{"problem": "gone"}]) == [("files", True)]
    assert problems(code={}) == [("code", True)]
    assert problems(temporary=("/tmp", 0.97)) == [("room", False)]


def test_missing_weights_are_reported_with_the_folders_of_the_hub():
    facts = HEALTHY | {"files": [{"problem": "gone"}], "hub": {"HF_HOME": "/elsewhere"}}
    (finding,) = compare_facts("b", facts, HEALTHY, "/runs", NodeRequirements(INPUTS))
    assert finding.problem == (
        "backbone tiny is missing (gone); HF_HOME and HF_HUB_CACHE differ from the driver's: "
        "HF_HOME=/elsewhere"
    )


def test_a_problem_of_several_machines_is_one_line():
    findings = [Finding(name, "store", "/runs does not exist", "mount it") for name in "abcd"]
    assert finding_lines(findings) == ["a, b and 2 more: store: /runs does not exist; mount it"]


def store_facts(store: Any, token: str, node: str) -> dict[str, Any]:
    facts: dict[str, Any] = node_facts(str(store), token, node, NodeRequirements(), False)["store"]
    return facts


def test_a_token_exists_in_the_driver_s_store_only(tmp_path):
    shared, other = open_store(tmp_path / "shared"), open_store(tmp_path / "other")
    other.root.mkdir()
    with store_token(shared) as token:
        assert store_facts(shared.name, token, "one")["token"]
        assert not store_facts(other.name, token, "two")["token"]
        assert not store_facts(tmp_path / "gone", token, "none")["exists"]
        assert has_token(shared.name, token, "one")
        assert not has_token(shared.name, token, "two")
    assert [folder.name for folder in tmp_path.iterdir()] == ["other"]


def test_many_drivers_at_the_same_time_leave_no_token(tmp_path):
    store = open_store(tmp_path)

    def read_own_token(number: int) -> bool:
        with store_token(store) as token:
            return bool(store_facts(store.name, token, "me")["token"])

    with ThreadPoolExecutor(16) as threads:
        assert all(threads.map(read_own_token, range(64)))
    assert not list(tmp_path.iterdir())


def test_the_next_driver_removes_the_token_of_a_killed_driver(tmp_path):
    for name, age in (("old", 2 * STALE), ("running", 0)):
        folder = tmp_path / f"{TOKENS}{name}"
        folder.mkdir()
        (folder / DRIVER).write_text(name)
        os.utime(folder, (time.time() - age,) * 2)
    with store_token(open_store(tmp_path)):
        pass
    assert [folder.name for folder in tmp_path.iterdir()] == [f"{TOKENS}running"]


# ---------------------------------------------------------------- this machine


@pytest.fixture
def spec(tmp_path) -> Path:
    return write_sweep(tmp_path, "small", "fixed: {method: fpl, train.steps: 3}\nseeds: [1]\n")


def test_a_check_of_a_healthy_machine_passes_and_leaves_no_file(spec, tmp_path, command):
    before = {*tmp_path.rglob("*")}
    code, out, err = command("plan", spec, "--store", tmp_path / "deep" / "runs", "--check")
    assert (code, err.partition(" ")[2]) == (0, "checked this machine: ok\n")
    assert out.startswith("small: 1 cell")
    assert {*tmp_path.rglob("*")} == before


def test_an_unreachable_tracker_is_refused(spec, tmp_path, command):
    uri = f"http://127.0.0.1:{free_port()}"
    words = ("--store", tmp_path / "runs", "--tracking-uri", uri, "--check")
    code, _, err = command("plan", spec, *words)
    assert code == 3
    assert f"MLflow at {uri} does not answer" in err
    assert "--tracking-uri none" in err


def test_a_full_disk_and_a_read_only_disk_are_refused(spec, tmp_path):
    with small_disk(tmp_path / "disk", 1 << 20) as disk:

        def check() -> subprocess.CompletedProcess[str]:
            words = ("plan", spec, "--store", disk.place / "runs", "--check")
            return python("-m", "orchestrator", *words, inside=disk.inside, check=False)

        done = check()
        assert done.returncode == 3
        assert "this machine cannot run this sweep:\n  this machine: room: " in done.stderr
        assert "airsweep cache gc" in done.stderr
        subprocess.run([*disk.inside, "mount", "-o", "remount,ro", str(disk.place)], check=True)
        done = check()
        assert done.returncode == 2
        assert f"the file system of {disk.place / 'runs'} is read-only" in done.stderr

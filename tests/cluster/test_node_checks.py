"""Facts of a node and the findings from them; test_preflight checks nodes of real clusters."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cluster import node_checks
from orchestrator.cluster.node_checks import (
    NodeRequirements,
    compare_facts,
    finding_lines,
    node_facts,
    store_token,
)
from orchestrator.store import open_store
from tests.helpers.disks import SmallDisk
from tests.helpers.servers import free_port
from tests.helpers.sweeps import python, write_sweep

VERSIONS = {"python": "3.11", "torch": "2.13"}
HEALTHY: dict[str, Any] = {
    "code": {**VERSIONS, "air_core/method.py": "a", "orchestrator/planning/plan.py": "b"},
    "store": "",
    "files": [(3, "x")],
    "gpu": "",
}
NEEDS = NodeRequirements((("backbone", "tiny"),))


@pytest.mark.parametrize(
    ("facts", "line"),
    [
        ({"code": HEALTHY["code"] | {"torch": "2.12"}}, "code: its code differs .*: torch 2.12;"),
        ({"code": HEALTHY["code"] | {"air_core/method.py": "c"}}, "code: .*: air_core/method.py;"),
        ({"code": VERSIONS, "more": 1}, "code: its code differs .*: air_core/method.py, orch"),
        ({"store": "does not exist"}, "store: /runs does not exist; give --store a folder"),
        ({"files": [(3, "y")]}, "files: backbone tiny has other content than on the driver; copy"),
        ({"files": ["gone"]}, r"files: backbone tiny is missing \(gone\); copy it"),
        ({"gpu": "torch sees none"}, "gpu: torch sees none; or start its Ray with --num-gpus=0"),
    ],
)
def test_each_wrong_fact_is_a_line_with_the_machines_and_a_remedy(facts, line):
    assert compare_facts("b", HEALTHY, HEALTHY, "/runs", NEEDS) == []
    found = [
        finding
        for name in "abcd"
        for finding in compare_facts(name, HEALTHY | facts, HEALTHY, "/runs", NEEDS)
    ]
    [text] = finding_lines(found)
    assert re.match(f"a, b and 2 more: {line}", text)


def store_problem(store: Any, token: str) -> str:
    return str(node_facts(str(store), token, NodeRequirements(), False)["store"])


def test_a_token_exists_in_the_driver_s_store_only(tmp_path):
    shared, other = open_store(tmp_path / "shared"), open_store(tmp_path / "other")
    other.root.mkdir()
    with store_token(shared.name) as token:
        assert store_problem(shared.name, token) == ""
        assert "is not the store" in store_problem(other.name, token)
        assert store_problem(tmp_path / "gone", token) == "does not exist"
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.ray
def test_a_machine_that_does_not_answer_in_time_is_a_finding(ray_session, tmp_path, monkeypatch):
    monkeypatch.setattr(node_checks, "ANSWER_TIMEOUT", 0.0)
    store = open_store(tmp_path / "runs")
    store.initialize()
    [findings] = node_checks.check_nodes(store, NodeRequirements()).values()
    [line] = finding_lines(findings)
    assert "answers: the machine could not be checked (no answer within 0 s)" in line
    assert "restart its Ray" in line


# ---------------------------------------------------------------- this machine


@pytest.fixture
def spec(tmp_path) -> Path:
    return write_sweep(tmp_path, "small", "fixed: {method: zero_shot}\n")


def test_an_unreachable_tracker_is_refused(spec, tmp_path, command):
    address = f"127.0.0.1:{free_port()}"
    uri = f"http://me:secret@{address}"
    words = ("--store", tmp_path / "runs", "--tracking-uri", uri, "--check")
    code, _, err = command("plan", spec, *words)
    assert code == 3
    assert f"MLflow at http://{address} does not answer" in err
    assert "--tracking-uri none" in err
    assert "secret" not in err


def test_a_read_only_disk_is_refused(spec, tmp_path):
    with SmallDisk(tmp_path / "disk", 1 << 20) as disk:
        subprocess.run([*disk.inside, "mount", "-o", "remount,ro", str(disk.place)], check=True)
        words = ("plan", spec, "--store", disk.place / "runs", "--check")
        done = python("-m", "orchestrator", *words, inside=disk.inside, check=False)
        assert done.returncode == 2
        assert f"the file system of {disk.place / 'runs'} is read-only" in done.stderr

"""Facts of a node, and what is judged from them; nodes of real clusters are in test_preflight."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from orchestrator.cluster.node_checks import Finding, NodeReport, judge, lines
from orchestrator.cluster.node_facts import (
    DRIVER,
    STALE,
    TOKENS,
    Needed,
    has_token,
    node_facts,
    store_token,
)
from orchestrator.store import open_store

FINE: dict[str, Any] = {
    "versions": {"python": "3.11.7", "ray": "2.60.0", "torch": "2.13.0+cpu", "numpy": "2.1.0"},
    "code": {"air_core/method.py": "a", "orchestrator/planning/plan.py": "b"},
    "store": {
        **{"exists": True, "token": True, "answered": True, "error": ""},
        **{"where": "/runs", "free": 1 << 40},
    },
    "files": [{"count": 3, "digest": "x"}],
    "gpu": None,
}
INPUTS = (("backbone", "tiny"),)


def problems(bytes_left: int = 0, **facts: Any) -> list[tuple[str, bool]]:
    needed = Needed(INPUTS, bytes_left=bytes_left)
    found = judge("b", FINE | facts, FINE, "/runs", needed)
    return [(one.check, one.fatal) for one in found]


def test_versions_may_differ_in_the_build_and_of_libraries_in_the_patch():
    versions = FINE["versions"]
    assert problems() == []
    assert problems(versions={**versions, "torch": "2.13.0+cu126"}) == []
    assert problems(versions={**versions, "numpy": "2.1.3"}) == [("versions", False)]
    assert problems(versions={**versions, "numpy": "2.2.0"}) == [("versions", True)]
    assert problems(versions={**versions, "ray": "2.60.1"}) == [("versions", True)]
    assert problems(versions={**versions, "torch": ""}) == [("versions", True)]


def test_each_fact_is_judged_by_its_check():
    store = FINE["store"]
    assert problems(gpu="") == []
    assert problems(gpu="torch sees none") == [("gpu", True)]
    assert problems(bytes_left=1 << 41) == [("room", False)]
    assert problems(store={**store, "free": 1 << 20}) == [("room", True)]
    for wrong in ({"error": "Disk quota exceeded", "answered": False}, {"answered": False}):
        assert problems(store={**store, **wrong}) == [("store", True)]
    assert problems(files=[{"count": 3, "digest": "y"}]) == [("files", True)]
    assert problems(files=[{"problem": "gone"}]) == [("files", True)]
    assert problems(code={}) == [("code", True)]


def test_what_machines_have_in_common_is_written_once():
    found = [Finding(name, "store", "/runs is not there", "mount it") for name in "abcd"]
    assert lines(found) == ["a, b and 2 more: store: /runs is not there; mount it"]


def test_a_machine_that_does_not_answer_has_no_other_state():
    states = NodeReport("a", (Finding("a", "answers", "gone", "start it"),)).states()
    assert states.pop("answers") == "failed"
    assert set(states.values()) == {"-"}


def store_facts(store: Any, token: str, node: str) -> dict[str, Any]:
    found: dict[str, Any] = node_facts(str(store), token, node, Needed(), False)["store"]
    return found


def test_a_token_is_found_in_the_same_store_and_in_no_other(tmp_path):
    here, there = open_store(tmp_path / "here"), open_store(tmp_path / "there")
    there.root.mkdir()
    with store_token(here) as token:
        assert store_facts(here.name, token, "one")["token"]
        assert not store_facts(there.name, token, "other")["token"]
        assert not store_facts(tmp_path / "gone", token, "none")["exists"]
        assert has_token(here.name, token, "one")
        assert not has_token(here.name, token, "other")
    assert [folder.name for folder in tmp_path.iterdir()] == ["there"]


def test_many_drivers_at_once_leave_nothing(tmp_path):
    store = open_store(tmp_path)

    def once(number: int) -> bool:
        with store_token(store) as token:
            return bool(store_facts(store.name, token, "me")["token"])

    with ThreadPoolExecutor(16) as threads:
        assert all(threads.map(once, range(64)))
    assert not list(tmp_path.iterdir())


def test_what_a_killed_driver_left_goes_with_the_next(tmp_path):
    for name, age in (("old", 2 * STALE), ("running", 0)):
        folder = tmp_path / f"{TOKENS}{name}"
        folder.mkdir()
        (folder / DRIVER).write_text(name)
        os.utime(folder, (time.time() - age,) * 2)
    with store_token(open_store(tmp_path)):
        pass
    assert [folder.name for folder in tmp_path.iterdir()] == [f"{TOKENS}running"]

"""What the next cells read is begun while trials run, and the driver alone tells of it."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from orchestrator.ahead import Ahead, waves, without_images
from orchestrator.failures import Failure
from orchestrator.plan import needs_of
from orchestrator.store import ArtifactStore

LOST = Failure("data", "no images")


class Driver:
    """Notes what it is told, and by which thread."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, Any, threading.Thread]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *what: self.heard.append((name, what, threading.current_thread()))


def test_outcomes_are_told_by_the_one_who_asks_and_progress_at_once(trial):
    (need, *_) = needs_of([trial("fpl")])
    driver, seen, go_on = Driver(), threading.Event(), threading.Event()

    def make(watcher: Any) -> None:
        watcher.progress("LoRA", 1, 2)
        watcher.retried(need, LOST)
        seen.set()
        go_on.wait()
        watcher.prepared(need, 1.0, {})
        watcher.phase("lora", 1000.0)

    ahead = Ahead(make, driver)
    seen.wait()
    assert [name for name, *_ in driver.heard] == ["progress"]
    go_on.set()
    ahead.wait()
    assert [name for name, *_ in driver.heard] == ["progress", "retried", "prepared", "phase"]
    mine = [by is threading.main_thread() for _, _, by in driver.heard]
    assert mine == [False, True, True, True]
    stage, waited = driver.heard[-1][1]
    assert stage == "lora"
    assert waited < 1000  # it took the clock only what the driver has waited


def test_what_goes_wrong_in_the_thread_is_raised_when_it_is_waited_for(trial):
    (need, *_) = needs_of([trial("fpl")])
    driver = Driver()

    def make(watcher: Any) -> None:
        watcher.failed(need, LOST)
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        Ahead(make, driver).wait()
    assert [name for name, *_ in driver.heard] == ["failed"]


def test_a_lora_of_the_first_round_can_come_ahead_and_images_cannot(trial, tmp_path):
    store = ArtifactStore(tmp_path)

    def stages(rounds: int) -> list[str]:
        needs = needs_of([trial("air", **{"lora.rounds": rounds})])
        assert "images" in {need.stage for need in needs}
        return sorted(need.stage for need in without_images(needs, store))

    assert stages(1) == ["features", "labels", "lora"]
    assert stages(2) == ["features", "labels", "lora"]  # of the first round alone
    (features,) = [n.spec for n in needs_of([trial("fpl")]) if n.stage == "features"]
    store.get_or_build(features, lambda folder: {})
    assert "features" not in [n.stage for n in without_images(needs_of([trial("air")]), store)]


def test_so_many_loras_are_trained_together_as_there_are_workers(trial, tmp_path):
    store = ArtifactStore(tmp_path)
    groups = [needs_of([trial("air", split_seed=seed)]) for seed in range(5)]

    def loras(workers: int) -> list[int]:
        made: set[Any] = set()
        counts = []
        for number, wave in waves(groups, store, lambda: workers):
            new = {need.key for need in wave if need.stage == "lora"} - made
            counts += [] if number is not None else [len(new)]
            made |= new
            for need in wave:
                if need.stage != "images":
                    store.get_or_build(need.spec, lambda folder: {})
        return counts

    assert loras(2) == [2, 2, 1]


def test_groups_come_in_order_and_each_with_all_that_it_reads(trial, tmp_path):
    groups = [needs_of([trial("fpl")]), needs_of([trial("air")])]
    found = list(waves(groups, ArtifactStore(tmp_path), lambda: 1))
    assert [number for number, _ in found] == [None, 0, None, 1]
    assert [wave for number, wave in found if number is not None] == [list(g) for g in groups]

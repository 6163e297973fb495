"""The word that tells a store from another one."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

from orchestrator.echo import STALE, word_in
from orchestrator.look import DRIVER, PROBES, look
from orchestrator.store import open_store


def test_a_word_is_echoed_by_who_reads_it_in_the_same_folder_and_by_nobody_else(tmp_path):
    here, there = open_store(tmp_path / "here"), open_store(tmp_path / "there")
    there.root.mkdir()
    with word_in(here) as (word, echoed):
        assert look(here.name, word, (), "", "one")["store"]["state"] == "ok"
        assert look(there.name, word, (), "", "other")["store"]["state"] == "other"
        assert look(str(tmp_path / "gone"), word, (), "", "none")["store"]["state"] == "absent"
        assert echoed("one")
        assert not echoed("other")
    assert [folder.name for folder in tmp_path.iterdir()] == ["there"]


def test_many_drivers_at_once_leave_nothing(tmp_path):
    store = open_store(tmp_path / "runs")

    def once(number: int) -> bool:
        with word_in(store) as (word, echoed):
            return look(store.name, word, (), "", "me")["store"]["state"] == "ok" and echoed("me")

    with ThreadPoolExecutor(16) as threads:
        assert all(threads.map(once, range(64)))
    assert not (store.root / PROBES).exists()


def test_what_a_killed_driver_left_goes_with_the_next(tmp_path):
    store = open_store(tmp_path / "runs")
    for name, age in (("old", 2 * STALE), ("running", 0)):
        folder = store.root / PROBES / name
        folder.mkdir(parents=True)
        (folder / DRIVER).write_text(name)
        os.utime(folder, (time.time() - age,) * 2)
    with word_in(store):
        pass
    assert [folder.name for folder in (store.root / PROBES).iterdir()] == ["running"]

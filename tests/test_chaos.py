"""A driver that is killed at any event of its ledger, or that finds its disk full at any byte: the
same command again ends the sweep as if nothing had happened. On a trainable that takes no time;
`test_runs.py` does it with the real one.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest

from orchestrator.ledger import CRASH_AT
from orchestrator.search import open_storage
from tests.disks import PAGE, small_disk
from tests.sweeps import (
    airsweep,
    begun_twice,
    children,
    environment,
    events,
    search_sweep,
    table,
    write_sweep,
)

SAMPLES = None if os.environ.get("AIRSWEEP_CHAOS") else 5  # None: every event
KINDS = {
    "whole": {"host": "fpl"},
    "pruned": {"host": "grip", "pruning": "{rule: halving, rungs: [1, 2]}"},  # fpl has one round
}


def run(spec: Path, store: Path, crash_at: str = "") -> int:
    done = said(spec, store, crash_at)
    assert done.returncode in (0, -9), done.stderr
    return done.returncode


def said(
    spec: Path, store: Path, crash_at: str = "", inside: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.trivial", "run", str(spec), "--store", str(store)]
    return subprocess.run(
        [*inside, *command, "--tracking-uri", "none"],
        capture_output=True,
        text=True,
        env=environment(**{CRASH_AT: crash_at}),
        check=False,
    )


def studies(store: Path) -> dict[str, list[tuple[Any, ...]]]:
    storage = open_storage(store / "sweeps" / "default" / "chaos" / "studies.journal")
    found = {}
    for name in optuna.get_all_study_names(storage):
        trials = optuna.load_study(study_name=name, storage=storage).get_trials(deepcopy=False)
        found[name] = [(t.state.name, t.params, t.value) for t in trials if t.state.name != "FAIL"]
    return found


def outcomes(store: Path) -> dict[str, str]:
    ended = ("trial_done", "trial_reused", "trial_failed", "trial_pruned")
    return {e["slot"]: e["event"] for e in events(store, "chaos") if e["event"] in ended}


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def spec(tmp_path_factory, drawn_digits, kind) -> Path:
    text = search_sweep(drawn_digits, **KINDS[kind])
    return write_sweep(tmp_path_factory.mktemp("chaos"), "chaos", text)


@pytest.fixture(scope="module")
def calm(spec) -> Path:
    """The store of a run that nobody disturbed."""
    store = spec.parent / "calm"
    assert run(spec, store) == 0
    return store


def test_killed_at_any_event_a_sweep_ends_as_if_nothing_had_happened(spec, calm, tmp_path, kind):
    count = len(events(calm, "chaos"))
    assert ("trial_pruned" in outcomes(calm).values()) == (kind == "pruned")
    assert count > 40
    chosen = range(1, count + 1)
    if SAMPLES:
        chosen = sorted(random.Random(time_seed()).sample(chosen, SAMPLES))
    for number in chosen:
        store = tmp_path / str(number)
        assert run(spec, store, f"event:{number}") == -9
        assert run(spec, store) == 0
        assert_alike(store, calm, f"killed at event {number}")


def test_out_of_room_anywhere_a_sweep_stops_and_ends_as_if_nothing_had_happened(
    spec, calm, tmp_path
):
    files = [file for file in calm.rglob("*") if file.is_file()]
    whole = sum(-(-file.stat().st_size // PAGE) for file in files)
    chosen = range(2, whole - 8)
    some = min(SAMPLES - 3 if SAMPLES else 20, len(chosen))
    sizes = {*random.Random(time_seed()).sample(chosen, some), *(() if SAMPLES else range(2, 12))}
    for pages in sorted(sizes):
        when = f"no room beyond {pages} pages"
        with small_disk(tmp_path / str(pages), pages * PAGE) as disk:
            stopped = said(spec, disk.place, inside=disk.inside)
            assert stopped.returncode == 1, (when, stopped.stderr)
            last = stopped.stderr.splitlines()[-1]
            assert last.startswith(f"airsweep: no room where the store lies, {disk.place} "), when
            assert "the same command goes on" in last
            assert not [file for file in disk.seen.rglob(".*") if file.name != ".driver.lock"]
            ends = [e for e in events(disk.seen, "chaos") if e["event"] == "sweep_ended"]
            assert [end["exit_code"] for end in ends] in ([], [1]), when  # no room for it

            disk.resize(64 * 2**20)
            again = said(spec, disk.place, inside=disk.inside)
            assert again.returncode == 0, (when, again.stderr)
            store = shutil.copytree(disk.seen, tmp_path / "seen" / str(pages))
        assert_alike(store, calm, when, redone=1)


def test_who_was_pruned_is_said_by_plan_status_table_and_tracker(spec, calm, kind, tmp_path):
    stopped = [slot for slot, end in outcomes(calm).items() if end == "trial_pruned"]
    count = len(stopped)
    plan = json.loads(airsweep("plan", spec, "--store", calm, "--json").stdout)["trials"]
    assert (plan["pruned"], plan["to_run"]) == (count, 0)
    assert plan["total"] == plan["done"] + plan["reused"] + count
    shown = json.loads(airsweep("status", "chaos", "--store", calm, "--json").stdout)["trials"]
    assert (shown["pruned"], shown["waiting"]) == (count, 0)
    text = airsweep("table", "chaos", "--store", calm).stdout
    assert (f"{count // 2} points pruned early" in text) == (count > 0)
    store = shutil.copytree(calm, tmp_path / "runs")
    airsweep("mlflow", "reconcile", "chaos", "--store", store)
    states = {run.data.tags["air.slot"]: run.data for run in children(store, "chaos")}
    assert states.keys() == outcomes(calm).keys()
    noted = {e["slot"]: e for e in events(calm, "chaos") if e["event"] == "trial_pruned"}
    assert {s for s, run in states.items() if run.tags["air.state"] == "pruned"} == {*stopped}
    for slot in stopped:
        assert states[slot].tags["air.pruned_after"] == str(noted[slot]["rung"])
        assert list(states[slot].metrics) == ["rung/mutual_information"]


def time_seed() -> int:
    """Another sample each day; the message of a failure names the event."""
    import datetime

    return datetime.date.today().toordinal()


def assert_alike(store: Path, calm: Path, when: str, redone: int = 0) -> None:
    """
    Args:
        redone: so many pieces of work may have been begun twice.
    """
    assert table(store, "chaos") == table(calm, "chaos"), when
    assert studies(store) == studies(calm), when
    told_states = {state for of in studies(store).values() for state, *_ in of}
    assert told_states in ({"COMPLETE"}, {"COMPLETE", "PRUNED"}), when
    mine, theirs = outcomes(store), outcomes(calm)
    assert mine.keys() == theirs.keys(), when
    assert "trial_failed" not in mine.values(), when
    stopped = [[slot for slot, end in of.items() if end == "trial_pruned"] for of in (mine, theirs)]
    assert sorted(stopped[0]) == sorted(stopped[1]), when
    assert bool(stopped[0]) == ("PRUNED" in told_states), when
    # Work that is begun twice loses at most a job, here two seeds of ten iterations, and what the
    # driver prepares beside them at that moment.
    trials, prepared = begun_twice(store / "built.log", calm / "built.log")
    assert trials.total() <= redone, (when, trials)
    assert prepared.total() <= 1, (when, prepared)
    iterations, _ = begun_twice(store / "iterations.log", calm / "iterations.log")
    assert iterations.total() <= 20 * redone, when

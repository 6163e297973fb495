"""A driver is killed at any event of its log, or finds the disk full at any byte: the same command
then completes the sweep as if nothing had happened. Trials take no time (`helpers/trivial.py`);
`test_runs.py` has real ones.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from orchestrator import api
from orchestrator.store.event_log import CRASH_AT
from orchestrator.tracking._runs import create_database
from tests.helpers.disks import PAGE, SmallDisk
from tests.helpers.sweeps import all_runs, begun_twice, events, search_sweep, table, write_sweep
from tests.helpers.trivial import Trivial

UNTRACKED = ("--tracking-uri", "none")
ENOUGH = 64 * 2**20  # bytes of a disk
FEW = 4  # distances of the events at which drivers are killed


@pytest.fixture(scope="module")
def spec(tmp_path_factory, drawn_digits) -> Path:
    return write_sweep(tmp_path_factory.mktemp("chaos"), "chaos", search_sweep(drawn_digits))


@pytest.fixture(scope="module")
def disk(spec) -> Iterator[SmallDisk]:
    with SmallDisk(spec.parent / "small", ENOUGH) as disk:
        yield disk


@pytest.fixture(scope="module")
def trivial(disk) -> Iterator[Trivial]:
    with closing(Trivial(disk.inside)) as process:
        yield process


@pytest.fixture(scope="module")
def database(spec) -> Path:
    """An empty database of MLflow, which takes seconds to create."""
    file = spec.parent / "empty.db"
    create_database(file)
    return file


@pytest.fixture(scope="module")
def calm(spec, trivial, database) -> Path:
    """The store of an undisturbed run."""
    store = new_store(spec.parent / "calm", database)
    done = trivial.run("run", spec, "--store", store)
    assert done.returncode == 0, done.stderr
    return store


def new_store(folder: Path, database: Path) -> Path:
    folder.mkdir()
    shutil.copy(database, folder / "mlflow.db")
    return folder


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_a_sweep_killed_at_any_event_and_resumed_has_the_results_of_an_undisturbed_one(
    spec, calm, trivial, database, tmp_path, every
):
    count = len(events(calm, "chaos"))
    assert count > 40
    expected, expected_runs = results(calm), in_mlflow(calm)
    assert {"trial_done", "trial_reused"} == {*outcomes(calm).values()}
    for number in range(count, 0, -1 if every else -(count // FEW)):
        store = new_store(tmp_path / str(number), database)
        when = f"killed at event {number}"
        done = trivial.run("run", spec, "--store", store, **{CRASH_AT: f"event:{number}"})
        assert done.returncode == -9, (when, done.stderr)
        done = trivial.run("run", spec, "--store", store, **{CRASH_AT: ""})
        assert done.returncode == 0, (when, done.stderr)
        assert results(store) == expected, when
        assert in_mlflow(store) == expected_runs, when
        assert_worked_once(store, calm, when)
        shutil.rmtree(store)


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_a_sweep_on_a_full_disk_stops_and_resumes_to_the_results_of_an_undisturbed_one(
    spec, calm, trivial, disk, tmp_path, every
):
    alone = tmp_path / "untracked"
    done = trivial.run("run", spec, "--store", alone, *UNTRACKED)
    assert done.returncode == 0, done.stderr
    expected = results(calm)
    files = [file for file in alone.rglob("*") if file.is_file()]
    whole = sum(-(-file.stat().st_size // PAGE) for file in files)
    sizes = range(2, whole - 8, whole // (30 if every else 3))
    for pages in sizes:
        when, store = f"disk full after {pages} pages", disk.place
        disk.resize(pages * PAGE)
        done = trivial.run("run", spec, "--store", store, *UNTRACKED)
        assert done.returncode == 1, (when, done.stderr)
        last = done.stderr.splitlines()[-1]
        message = f"airsweep: no space left on the disk of the store {store} "
        assert last.startswith(message), when
        assert "run the same command again to resume" in last
        half = [file for file in disk.seen.rglob(".*") if file.name != ".driver.lock"]
        assert half == [], when
        ends = [e for e in events(disk.seen, "chaos") if e["event"] == "sweep_ended"]
        codes = [end["exit_code"] for end in ends]
        assert codes in ([], [1]), when  # [] if the disk is too full for the event

        disk.resize(ENOUGH)
        done = trivial.run("run", spec, "--store", store, *UNTRACKED)
        assert done.returncode == 0, (when, done.stderr)
        assert results(disk.seen) == expected, when
        assert_worked_once(disk.seen, calm, when, redone=1)
        disk.clear()


COSTS = ("time/",)


def in_mlflow(store: Path) -> list[Any]:
    """MLflow's runs without times, to check that none is lost, doubled or unfinished."""
    return sorted(
        (
            run.data.tags["air.kind"],
            run.data.tags.get("air.slot") or run.data.tags.get("air.point", ""),
            run.info.status,
            sorted(run.data.params.items()),
            sorted(m for m in run.data.metrics.items() if not m[0].startswith(COSTS)),
        )
        for run in all_runs(store)
    )


def studies(store: Path) -> dict[str, list[tuple[Any, ...]]]:
    """State, settings and objective of each point, by cell; the log has each point once."""
    asked = [(e["cell"], e["point"]) for e in events(store, "chaos") if e["event"] == "point_asked"]
    assert len(asked) == len({*asked})
    of_cells = {cell: api.study("chaos", cell, store=store) for cell, _ in sorted(asked)}
    return {
        cell: [(t.state.name, t.params, t.value) for t in study.trials]
        for cell, study in of_cells.items()
    }


def outcomes(store: Path) -> dict[str, str]:
    ended = ("trial_done", "trial_reused", "trial_failed")
    return {e["slot"]: e["event"] for e in events(store, "chaos") if e["event"] in ended}


def results(store: Path) -> tuple[Any, ...]:
    """The results of a sweep, which do not depend on how often it was resumed."""
    ended = outcomes(store)
    failed = sorted(slot for slot, end in ended.items() if end == "trial_failed")
    return table(store, "chaos"), studies(store), sorted(ended), failed


def assert_worked_once(store: Path, calm: Path, when: str, redone: int = 0) -> None:
    """
    Args:
        redone: how many pieces of work may have been started twice.
    """
    trials, prepared = begun_twice(store / "built.log", calm / "built.log")
    assert trials.total() <= redone, (when, trials)
    assert prepared.total() <= redone, (when, prepared)

"""Searches suggest points in rounds, and the same points after a kill at any time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.planning.history import read_history
from orchestrator.planning.search import CellSearch
from orchestrator.plugins import use_plugins
from orchestrator.spec import Dimension, cells_of, load_sweep, notes_of
from orchestrator.spec import SweepSpec as Sweep
from orchestrator.spec.cells import computation_of
from orchestrator.spec.space import study_name
from orchestrator.spec.sweep import Search
from orchestrator.store import EventLog
from tests.helpers.plugins import SEARCH
from tests.helpers.sweeps import write_sweep

COUNTS = Dimension(key="images_per_class", values=(0, 20, 40))
WEIGHTS = Dimension(key="fusion_weight", min=0.0, max=1.0)
STEPS = Dimension(key="train.steps", min=1, max=1000, log=True)
K = Dimension(key="pseudo_labels.k", values=(4, 8, 16))  # only methods of a fixed number read it
SPACE = (COUNTS, WEIGHTS)

Played = list[tuple[int, dict[str, Any], float]]  # number, settings, objective


def sweep(
    sampler: Any = "tpe",
    space: tuple[Dimension, ...] = SPACE,
    points: int = 5,
    width: int = 2,
    seed: int = 0,
    **fixed: Any,
) -> Sweep:
    search = Search(sampler=sampler, points=points, width=width, seed=seed, space=space)
    return Sweep(name="x", fixed={"method": "air", **fixed}, search=search)


def value(params: Mapping[str, Any]) -> float:
    """An objective with one best point."""
    weight = params.get("fusion_weight", 0.0)
    return params.get("images_per_class", 0) / 100 - (weight - 0.3) ** 2


class Log:
    """The points of a search in the event log, as the trial scheduler writes them."""

    def __init__(self, folder: Path) -> None:
        self.event_log = EventLog(folder)
        folder.mkdir(parents=True)

    def open(self, spec: Sweep) -> CellSearch:
        (cell,) = cells_of(spec)
        assert spec.search is not None
        suggested = read_history(self.event_log).suggested.get(study_name(cell, spec.search), {})
        return CellSearch(cell, spec.search, suggested)

    def play(self, spec: Sweep, most: int = 99) -> Played:
        """Run a search to its end, or until `most` further points are in the event log."""
        searching = self.open(spec)
        study = study_name(searching.cell, searching.search)
        played: Played = []
        while points := searching.next_round():
            for point in points:
                if point.number not in read_history(self.event_log).suggested.get(study, {}):
                    if not most:
                        return played
                    most -= 1
                    facts = {"point": point.number, "params": dict(point.params)}
                    self.event_log.append("point_asked", cell="c", study=study, **facts)
            values = {point.number: value(point.params) for point in points}
            played += [(p.number, dict(p.params), values[p.number]) for p in points]
            searching.record_round(values)
        return played


@pytest.fixture
def log(tmp_path) -> Log:
    return Log(tmp_path / "log")


def params(played: Played) -> list[dict[str, Any]]:
    return [point for _, point, _ in played]


SWEEPS = {
    "tpe": sweep("tpe"),
    "random": sweep("random", (COUNTS, STEPS)),
    "unused": sweep("random", (K, WEIGHTS)),
    "grid": sweep("grid", (COUNTS, Dimension(key="auxiliary.kind", values=("lda", "prototype")))),
}


# ---------------------------------------------------------------- points


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_the_points_depend_on_the_seed(tmp_path, sampler):
    first, again, other = (
        params(Log(tmp_path / name).play(sweep(sampler, seed=seed)))
        for name, seed in [("a", 0), ("b", 0), ("c", 1)]
    )
    assert first == again
    assert first[0] == other[0]  # the default
    assert first[1:] != other[1:]


def test_cells_have_different_points():
    spec = sweep("random")
    spec = Sweep(name="x", grid={"method": ("air", "air_grip")}, search=spec.search)
    one, two = (CellSearch(cell, spec.search, {}).next_round() for cell in cells_of(spec))
    assert one[0].params == two[0].params
    assert one[1].params != two[1].params


def test_integer_ranges_give_integers_and_log_scales_favour_small_values(log):
    points = params(log.play(sweep("random", (STEPS,), points=41, width=41)))
    steps = [point["train.steps"] for point in points[1:]]
    assert all(type(step) is int and 1 <= step <= 1000 for step in steps)
    assert 10 < sum(step < 32 for step in steps) < 30  # half of the range on a log scale


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_points_that_compute_the_same_are_not_both_suggested(log, sampler):
    """Without images the weight has no effect: the space has four different computations."""
    weights = Dimension(key="fusion_weight", values=(0.25, 0.5, 0.75))
    spec = sweep(sampler, (Dimension(key="images_per_class", values=(0, 20)), weights), points=4)
    (cell,) = cells_of(spec)
    found = {computation_of({**cell.flat, **point}) for point in params(log.play(spec))}
    assert len(found) == 4


def test_a_cell_searches_the_keys_that_its_method_reads(log):
    search = sweep(space=(K, STEPS)).search
    spec = Sweep(name="x", grid={"method": ("fpl", "cpl", "zero_shot")}, search=search)
    assert [cell.space for cell in cells_of(spec)] == [(K, STEPS), (STEPS,), ()]
    note = f"search.space.{K.key} is not searched with cpl, zero_shot: pinned, without effect"
    assert any(each.startswith(note) for each in notes_of(spec))
    # A key that has an effect in another point only, and a single value that is not the default.
    spec = sweep(space=(WEIGHTS, replace(STEPS, min=7, max=7)), images_per_class=0)
    assert [d.key for d in cells_of(spec)[0].space] == ["train.steps"]
    assert cells_of(sweep(images_per_class=0))[0].space == SPACE


# ---------------------------------------------------------------- kills


@pytest.mark.parametrize("sampler", SWEEPS)
def test_every_prefix_of_the_event_log_resumes_with_the_same_points(tmp_path, sampler):
    """A killed driver leaves a prefix of the event log; the store has the objectives."""
    spec = SWEEPS[sampler]
    spec = replace(spec, search=replace(spec.search, width=3, points=7 if sampler != "grid" else 6))
    uninterrupted = Log(tmp_path / "whole").play(spec)
    for count in range(len(uninterrupted) + 1):
        log = Log(tmp_path / f"killed after {count}")
        log.play(spec, most=count)
        assert len(read_history(log.event_log).suggested.get(study_of(spec), {})) == count
        assert log.play(spec) == uninterrupted, f"killed after {count} points"


def study_of(spec: Sweep) -> str:
    (cell,) = cells_of(spec)
    return study_name(cell, spec.search)


def test_a_resumed_search_keeps_logged_points_that_its_sampler_would_not_suggest(log):
    spec = sweep("random", (COUNTS, STEPS))
    for number in (0, 1, 2):
        point = {"images_per_class": 20, "train.steps": 7 + number}
        facts = {"study": study_of(spec), "point": number, "params": point}
        log.event_log.append("point_asked", cell="c", **facts)
    assert [point["train.steps"] for point in params(log.play(spec))[:3]] == [7, 8, 9]


# ---------------------------------------------------------------- edited and failed


def test_the_first_round_of_another_run_has_all_complete_rounds(log):
    """So points that failed, and seeds that were added, run side by side."""
    first = log.play(sweep())
    searching = log.open(sweep())
    assert [point.number for point in searching.next_round()] == [0, 1, 2, 3]
    searching.record_round({number: value for number, _, value in first[:4]})
    assert [dict(point.params) for point in searching.next_round()] == params(first)[4:]
    assert searching.next_round() == []


# ---------------------------------------------------------------- plugins


def test_a_plugin_adds_a_sampler(command, tmp_path):
    (tmp_path / "mine.py").write_text(SEARCH)
    assert command("plugin", "check", tmp_path / "mine.py")[0] == 0
    search = "{sampler: mine, points: 4, width: 2, space: {fusion_weight: {min: 0, max: 1}}}"
    body = f"plugins: [mine.py]\nfixed: {{method: air}}\nsearch: {search}\n"
    spec = load_sweep(write_sweep(tmp_path, "mine", body))
    played = Log(tmp_path / "log").play(spec)
    weights = [point["fusion_weight"] for point in params(played)]
    assert weights[:2] == [0.8, 0.0]  # the default; a plugin that repeats itself is left out
    assert all(0.0 < weight < 1.0 for weight in weights[2:])
    use_plugins([])

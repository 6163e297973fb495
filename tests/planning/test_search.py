"""Points of a cell, round after round, and the same ones after any kill."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from orchestrator.planning.search import CellSearch, open_storage
from orchestrator.planning.studies import Searches, searches
from orchestrator.spec import Dimension, cells_of
from orchestrator.spec import SweepSpec as Sweep
from orchestrator.spec.space import Point, study_name
from orchestrator.spec.sweep import Search
from orchestrator.store import EventLog

COUNTS = Dimension(key="images_per_class", values=(0, 20, 40))
WEIGHTS = Dimension(key="fusion_weight", min=0.0, max=1.0, when="images_per_class > 0")
STEPS = Dimension(key="train.steps", min=1, max=1000, log=True)
SPACE = (COUNTS, WEIGHTS)


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
    """What the dispatcher writes of a search into the event log."""

    def __init__(self, folder: Path) -> None:
        self.event_log = EventLog(folder)
        folder.mkdir(parents=True)

    def open(self, spec: Sweep) -> CellSearch:
        (cell,) = cells_of(spec)
        assert spec.search is not None
        return CellSearch(cell, spec.search, searches(self.event_log))

    def play(
        self, spec: Sweep, objective: Callable[[Point], float | None] | None = None, most: int = 99
    ) -> CellSearch:
        """Run a search to its end, or until so many events are written."""
        searching = self.open(spec)
        study = study_name(searching.cell, searching.search)
        while points := searching.next_round():
            values = {p.number: objective(p) if objective else value(p.params) for p in points}
            known = searches(self.event_log).asked.get(study, {})
            lines: list[tuple[str, dict[str, Any]]] = [
                ("point_asked", {"study": study, "point": p.number, "params": dict(p.params)})
                for p in points
                if p.number not in known
            ]
            lines.append(("round_told", {"values": {str(n): v for n, v in values.items()}}))
            for event, facts in lines[:most]:
                self.event_log.append(event, cell=searching.cell.id, **facts)
            most -= len(lines)
            if most <= 0:
                break
            searching.tell_round(values)
        return searching


@pytest.fixture
def log(tmp_path) -> Log:
    return Log(tmp_path / "log")


def found(searching: CellSearch) -> list[tuple[int, dict[str, Any], float | None]]:
    """(number, parameters, value) of all points."""
    trials = searching.study.get_trials(deepcopy=False)
    asked = [t for t in trials if "point" in t.user_attrs]
    return [(t.user_attrs["point"], dict(t.params), t.value) for t in asked]


def params(searching: CellSearch) -> list[dict[str, Any]]:
    return [point for _, point, _ in found(searching)]


def unfinished(searching: CellSearch) -> list[TrialState]:
    states = [trial.state for trial in searching.study.get_trials(deepcopy=False)]
    return [state for state in states if not state.is_finished()]


SAMPLERS = ["tpe", "random", "grid"]
SWEEPS = {
    "tpe": sweep("tpe"),
    "random": sweep("random", (COUNTS, STEPS)),
    "grid": sweep("grid", (COUNTS, Dimension(key="auxiliary.kind", values=("lda", "prototype")))),
}


# ---------------------------------------------------------------- points


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_search_has_as_many_points_as_it_asks_for_and_tells_them_all(log, sampler):
    searching = log.play(SWEEPS[sampler])
    assert [number for number, _, _ in found(searching)] == [0, 1, 2, 3, 4]
    assert [told for _, _, told in found(searching)] == [value(p) for p in params(searching)]
    assert unfinished(searching) == []
    assert searching.next_round() == []


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_the_default_point_comes_first(log, sampler):
    searching = log.open(sweep(sampler))
    assert searching.next_round()[0] == Point(0, {"images_per_class": 40, "fusion_weight": 0.5})


def test_rounds_are_as_wide_as_asked_and_the_last_one_is_what_is_left(log):
    widths: list[int] = []
    searching = log.open(sweep(points=8, width=3))
    while points := searching.next_round():
        widths.append(len(points))
        searching.tell_round({point.number: 0.0 for point in points})
    assert widths == [3, 3, 2]


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_the_same_seed_gives_the_same_points_another_seed_others(tmp_path, sampler):
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
    assert spec.search is not None
    one, two = (CellSearch(cell, spec.search, Searches()).next_round() for cell in cells_of(spec))
    assert one[0].params == two[0].params
    assert one[1].params != two[1].params


def test_a_range_of_whole_numbers_gives_whole_numbers_on_a_log_scale_few_large_ones(log):
    points = params(log.play(sweep("random", (STEPS,), points=41, width=41)))
    steps = [point["train.steps"] for point in points[1:]]
    assert all(type(step) is int and 1 <= step <= 1000 for step in steps)
    assert 10 < sum(step < 32 for step in steps) < 30  # half of them, by magnitude


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_no_point_is_asked_twice_while_there_are_others(log, sampler):
    kinds = Dimension(key="auxiliary.kind", values=("lda", "prototype", "knn"))
    spec = sweep(sampler, (COUNTS, kinds), points=6, width=3)
    asked = params(log.play(spec))
    assert all(asked.count(point) == 1 for point in asked)


def test_a_space_that_holds_no_more_points_is_asked_on_to_the_end(log):
    assert len(params(log.play(sweep("tpe", (COUNTS,), points=5)))) == 5


# ---------------------------------------------------------------- pruned


def test_a_pruned_point_is_never_the_best_and_uses_up_patience(log):
    spec = sweep("tpe", points=9, width=3)
    assert spec.search is not None
    spec = replace(spec, search=replace(spec.search, patience=4))
    searching = log.open(spec)
    study = study_name(searching.cell, searching.search)
    for point in searching.next_round():
        asked = {"study": study, "point": point.number, "params": dict(point.params)}
        log.event_log.append("point_asked", cell=searching.cell.id, **asked)
    reached = {"0": 0.0, "1": 9.0, "2": 8.0}  # before the end all looked good
    log.event_log.append("rung_decided", study=study, rung=2, values=reached, pruned=[1, 2])
    searching.tell_round({0: 1.0}, {1: (2, 9.0), 2: (2, 8.0)})
    log.event_log.append("round_told", cell=searching.cell.id, values={"0": 1.0}, pruned=[1, 2])
    again = log.open(spec)
    for one in (searching, again):
        trials = [t for t in one.study.get_trials(deepcopy=False) if "point" in t.user_attrs]
        assert [trial.state.name for trial in trials] == ["COMPLETE", "PRUNED", "PRUNED"]
        assert [trial.value for trial in trials] == [1.0, 9.0, 8.0]
        assert [trial.intermediate_values for trial in trials] == [{}, {2: 9.0}, {2: 8.0}]
    assert [(p.number, p.told) for p in again.next_round()] == [(0, True), (1, True), (2, True)]
    again.tell_round({0: 1.0}, {1: (2, 9.0), 2: (2, 8.0)})
    more = again.next_round()
    assert [(p.number, p.told) for p in more] == [(3, False), (4, False), (5, False)]
    again.tell_round({3: 0.5, 4: 0.5, 5: 0.5})
    assert again.next_round() == []  # five points after the best, two of them pruned


# ---------------------------------------------------------------- kills


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_search_killed_anywhere_goes_on_to_the_points_of_an_undisturbed_one(tmp_path, sampler):
    """A killed driver leaves a beginning of the event log: here every one."""
    spec = SWEEPS[sampler]
    undisturbed = found(Log(tmp_path / "whole").play(spec))
    for count in range(1, 9):  # five points in three rounds
        log = Log(tmp_path / f"killed after {count}")
        log.play(spec, most=count)
        resumed = log.play(spec)
        assert found(resumed) == undisturbed, f"killed after event {count}"
        assert unfinished(resumed) == []


def test_points_that_no_sampler_would_ask_again_stay_as_they_were_asked(log):
    spec = sweep("random", (COUNTS, STEPS))
    (cell,) = cells_of(spec)
    for number in (0, 1, 2):
        asked = {"images_per_class": 20, "train.steps": 7 + number}
        study = study_name(cell, spec.search)
        log.event_log.append("point_asked", cell=cell.id, study=study, point=number, params=asked)
    assert [point["train.steps"] for point in params(log.play(spec))[:3]] == [7, 8, 9]


def test_what_is_told_is_copied_for_others_to_read(tmp_path, log):
    spec = sweep("tpe")
    (cell,) = cells_of(spec)
    assert spec.search is not None
    log.play(spec)
    for _ in range(2):  # a run starts the copy anew
        storage = open_storage(tmp_path / "j")
        searching = CellSearch(cell, spec.search, searches(log.event_log), storage, "team/")
        [name] = optuna.get_all_study_names(open_storage(tmp_path / "j"))
        copy = optuna.load_study(study_name=name, storage=open_storage(tmp_path / "j"))
        assert name.startswith("team/digits-ul-text-air")
        assert [(t.params, t.value) for t in copy.trials] == [
            (point, told) for _, point, told in found(searching)
        ]


# ---------------------------------------------------------------- edited and failed


def test_another_run_begins_with_the_points_that_were_told(log):
    """So that a seed that was added later reaches them too; values that were told stay."""
    first = log.play(sweep())
    again = log.open(sweep())
    points = again.next_round()
    assert [(p.number, dict(p.params)) for p in points] == [(n, p) for n, p, _ in found(first)]
    again.tell_round({point.number: -1.0 for point in points})
    assert again.next_round() == []
    assert found(again) == found(first)


def test_more_points_go_on_where_the_search_stood(tmp_path, log):
    few = found(log.play(sweep(points=4)))
    more = found(log.play(sweep(points=6)))
    assert more[:4] == few
    assert more == found(Log(tmp_path / "undisturbed").play(sweep(points=6)))


def test_fewer_points_ask_for_no_more_than_those(log):
    log.play(sweep(points=6))
    fewer = log.open(sweep(points=3))
    assert [point.number for point in fewer.next_round()] == [0, 1, 2]


@pytest.mark.parametrize("kill", [False, True])
def test_a_failed_point_counts_and_is_tried_again_by_the_next_run(log, kill):
    def fails(point: Point) -> float | None:
        return None if point.number == 1 else value(point.params)

    failed = log.play(sweep(), fails)
    assert [number for number, _, _ in found(failed)] == [0, 1, 2, 3, 4]
    assert [number for number, _, told in found(failed) if told is None] == [1]
    if kill:  # before anything came of it
        log.open(sweep()).next_round()
    asked: list[int] = []

    def counts(point: Point) -> float:
        asked.append(point.number)
        return value(point.params)

    mended = log.play(sweep(), counts)
    assert asked.count(1) == 1
    assert len(found(mended)) == 5
    assert values_of(mended) == sorted(value(p) for p in params(mended))
    # A run after that has nothing left to mend.
    assert values_of(log.play(sweep())) == values_of(mended)


def values_of(searching: CellSearch) -> list[float]:
    """Values that the study knows."""
    trials = searching.study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    return sorted(trial.value for trial in trials)


def test_a_point_that_fails_again_stays_failed(log):
    for _ in range(2):
        searching = log.play(sweep(), lambda point: None)
    assert [told for _, _, told in found(searching)] == [None] * 5
    assert unfinished(searching) == []


def test_another_space_starts_its_own_study(log):
    log.play(sweep())
    wider = Dimension(key="images_per_class", values=(0, 20, 40, 80))
    other = log.open(sweep(space=(wider, WEIGHTS)))
    assert found(other) == []
    assert other.next_round()[0] == Point(0, {"images_per_class": 80, "fusion_weight": 0.5})
    assert len(params(log.play(sweep()))) == 5  # the old one is as it was


def test_values_by_which_points_were_told_are_what_the_next_points_follow(tmp_path):
    """Two searches that heard other values ask other points from then on."""
    upward = params(Log(tmp_path / "a").play(sweep(points=10), lambda p: value(p.params)))
    downward = params(Log(tmp_path / "b").play(sweep(points=10), lambda p: -value(p.params)))
    assert upward[:4] == downward[:4]  # at random, up to here
    assert upward != downward


# ---------------------------------------------------------------- carried


def test_carried_points_count_and_come_after_the_default(log):
    spec = sweep("tpe", points=8)
    (cell,) = cells_of(spec)
    assert spec.search is not None
    carried = [{"images_per_class": 20, "fusion_weight": weight} for weight in (0.1, 0.9)]
    log.event_log.append(
        "study_opened",
        cell=cell.id,
        study=study_name(cell, spec.search),
        carried=[{"params": point, "value": 0.5} for point in carried],
    )
    first, second = log.open(spec).next_round()
    assert [(first.number, second.number), (first.told, second.told)] == [(1, 2), (True, True)]
    whole = found(log.play(spec))
    assert whole[:2] == [(1, carried[0], 0.5), (2, carried[1], 0.5)]
    assert sorted(number for number, _, _ in whole) == [*range(8)]
    assert found(log.open(spec)) == whole

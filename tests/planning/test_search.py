"""Searches suggest points in rounds, and the same points after a kill at any time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from orchestrator.planning.search import CellSearch
from orchestrator.planning.studies import Searches, read_searches
from orchestrator.plugins import use_plugins
from orchestrator.spec import Dimension, SpecError, cells_of, load_sweep
from orchestrator.spec import SweepSpec as Sweep
from orchestrator.spec.space import Point, study_name
from orchestrator.spec.sweep import Search, computation_of
from orchestrator.store import EventLog
from tests.helpers.plugins import SEARCH
from tests.helpers.sweeps import write_sweep

COUNTS = Dimension(key="images_per_class", values=(0, 20, 40))
WEIGHTS = Dimension(key="fusion_weight", min=0.0, max=1.0)
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
    """The events of a search in the event log, as the trial scheduler writes them."""

    def __init__(self, folder: Path) -> None:
        self.event_log = EventLog(folder)
        folder.mkdir(parents=True)

    def open(self, spec: Sweep) -> CellSearch:
        (cell,) = cells_of(spec)
        return CellSearch(cell, spec.search, read_searches(self.event_log))

    def play(
        self, spec: Sweep, objective: Callable[[Point], float | None] | None = None, most: int = 99
    ) -> CellSearch:
        """Run a search to its end, or until `most` events are written."""
        searching = self.open(spec)
        study = study_name(searching.cell, searching.search)
        while points := searching.next_round():
            values = {p.number: objective(p) if objective else value(p.params) for p in points}
            known = read_searches(self.event_log).suggested.get(study, {})
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
            searching.record_round(values)
        return searching


@pytest.fixture
def log(tmp_path) -> Log:
    return Log(tmp_path / "log")


def ended_points(searching: CellSearch) -> list[tuple[int, dict[str, Any], float | None]]:
    """(number, parameters, value) of all points."""
    trials = searching.study.get_trials(deepcopy=False)
    points = [t for t in trials if "point" in t.user_attrs]
    return [(t.user_attrs["point"], dict(t.params), t.value) for t in points]


def params(searching: CellSearch) -> list[dict[str, Any]]:
    return [point for _, point, _ in ended_points(searching)]


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
def test_a_search_has_the_configured_number_of_points_and_records_all(log, sampler):
    searching = log.play(SWEEPS[sampler])
    assert [number for number, _, _ in ended_points(searching)] == [0, 1, 2, 3, 4]
    assert [objective for _, _, objective in ended_points(searching)] == [
        value(p) for p in params(searching)
    ]
    assert unfinished(searching) == []
    assert searching.next_round() == []


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_the_default_point_comes_first(log, sampler):
    searching = log.open(sweep(sampler))
    assert searching.next_round()[0] == Point(0, {"images_per_class": 40, "fusion_weight": 0.8})


def test_rounds_have_the_configured_width_and_the_last_round_has_the_rest(log):
    widths: list[int] = []
    searching = log.open(sweep(points=8, width=3))
    while points := searching.next_round():
        widths.append(len(points))
        searching.record_round({point.number: 0.0 for point in points})
    assert widths == [3, 3, 2]


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
    one, two = (CellSearch(cell, spec.search, Searches()).next_round() for cell in cells_of(spec))
    assert one[0].params == two[0].params
    assert one[1].params != two[1].params


def test_integer_ranges_give_integers_and_log_scales_favour_small_values(log):
    points = params(log.play(sweep("random", (STEPS,), points=41, width=41)))
    steps = [point["train.steps"] for point in points[1:]]
    assert all(type(step) is int and 1 <= step <= 1000 for step in steps)
    assert 10 < sum(step < 32 for step in steps) < 30  # half of the range on a log scale


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_no_point_is_suggested_twice_while_new_points_exist(log, sampler):
    kinds = Dimension(key="auxiliary.kind", values=("lda", "prototype", "knn"))
    spec = sweep(sampler, (COUNTS, kinds), points=6, width=3)
    points = params(log.play(spec))
    assert all(points.count(point) == 1 for point in points)


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_points_that_compute_the_same_are_not_both_suggested(log, sampler):
    """Without images the weight has no effect: the space has four different computations."""
    weights = Dimension(key="fusion_weight", values=(0.25, 0.5, 0.75))
    space = (Dimension(key="images_per_class", values=(0, 20)), weights)
    searching = log.play(sweep(sampler, space, points=4))
    found = {computation_of({**searching.cell.flat, **point}) for point in params(searching)}
    assert len(found) == 4


def test_a_search_repeats_points_when_its_space_has_no_new_points(log):
    assert len(params(log.play(sweep("tpe", (COUNTS,), points=5)))) == 5


# ---------------------------------------------------------------- kills


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_search_killed_at_any_event_resumes_with_the_same_points(tmp_path, sampler):
    """A killed driver leaves a prefix of the event log; this test tries every prefix."""
    spec = SWEEPS[sampler]
    uninterrupted = ended_points(Log(tmp_path / "whole").play(spec))
    for count in range(1, 9):  # five points in three rounds
        log = Log(tmp_path / f"killed after {count}")
        log.play(spec, most=count)
        resumed = log.play(spec)
        assert ended_points(resumed) == uninterrupted, f"killed after event {count}"
        assert unfinished(resumed) == []


def test_a_resumed_search_keeps_logged_points_that_its_sampler_would_not_suggest(log):
    spec = sweep("random", (COUNTS, STEPS))
    (cell,) = cells_of(spec)
    for number in (0, 1, 2):
        point = {"images_per_class": 20, "train.steps": 7 + number}
        study = study_name(cell, spec.search)
        log.event_log.append("point_asked", cell=cell.id, study=study, point=number, params=point)
    assert [point["train.steps"] for point in params(log.play(spec))[:3]] == [7, 8, 9]


# ---------------------------------------------------------------- edited and failed


def test_another_run_starts_with_the_recorded_points(log):
    """So they also run for seeds that were added since; recorded objectives do not change."""
    first = log.play(sweep())
    again = log.open(sweep())
    points = again.next_round()
    assert [(p.number, dict(p.params)) for p in points] == [
        (n, p) for n, p, _ in ended_points(first)
    ]
    again.record_round({point.number: -1.0 for point in points})
    assert again.next_round() == []
    assert ended_points(again) == ended_points(first)


def test_more_points_continue_the_search(tmp_path, log):
    few = ended_points(log.play(sweep(points=4)))
    more = ended_points(log.play(sweep(points=6)))
    assert more[:4] == few
    assert more == ended_points(Log(tmp_path / "uninterrupted").play(sweep(points=6)))


def test_fewer_points_repeat_only_the_first_points(log):
    log.play(sweep(points=6))
    fewer = log.open(sweep(points=3))
    assert [point.number for point in fewer.next_round()] == [0, 1, 2]


@pytest.mark.parametrize("kill", [False, True])
def test_a_failed_point_counts_and_is_repeated_by_the_next_run(log, kill):
    def fails(point: Point) -> float | None:
        return None if point.number == 1 else value(point.params)

    failed = log.play(sweep(), fails)
    assert [number for number, _, _ in ended_points(failed)] == [0, 1, 2, 3, 4]
    assert [number for number, _, objective in ended_points(failed) if objective is None] == [1]
    if kill:  # before any event of the round
        log.open(sweep()).next_round()
    repeated: list[int] = []

    def counts(point: Point) -> float:
        repeated.append(point.number)
        return value(point.params)

    complete = log.play(sweep(), counts)
    assert repeated.count(1) == 1
    assert len(ended_points(complete)) == 5
    assert values_of(complete) == sorted(value(p) for p in params(complete))
    # Another run has no failed point left.
    assert values_of(log.play(sweep())) == values_of(complete)


def values_of(searching: CellSearch) -> list[float]:
    """Objectives of the completed points in the study."""
    trials = searching.study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    return sorted(trial.value for trial in trials)


def test_a_point_that_fails_again_stays_failed(log):
    for _ in range(2):
        searching = log.play(sweep(), lambda point: None)
    assert [objective for _, _, objective in ended_points(searching)] == [None] * 5
    assert unfinished(searching) == []


def test_another_space_starts_a_new_study(log):
    log.play(sweep())
    wider = Dimension(key="images_per_class", values=(0, 20, 40, 80))
    other = log.open(sweep(space=(wider, WEIGHTS)))
    assert ended_points(other) == []
    assert other.next_round()[0] == Point(0, {"images_per_class": 80, "fusion_weight": 0.8})
    assert len(params(log.play(sweep()))) == 5  # the first study is unchanged


def test_later_points_depend_on_recorded_objectives(tmp_path):
    """Two searches with opposite objectives suggest different points after the random ones."""
    upward = params(Log(tmp_path / "a").play(sweep(points=10), lambda p: value(p.params)))
    downward = params(Log(tmp_path / "b").play(sweep(points=10), lambda p: -value(p.params)))
    assert upward[:4] == downward[:4]  # random points
    assert upward != downward


# ---------------------------------------------------------------- carried


def test_carried_points_count_and_come_after_the_default(log):
    spec = sweep("tpe", points=8)
    (cell,) = cells_of(spec)
    carried = [{"images_per_class": 20, "fusion_weight": weight} for weight in (0.1, 0.9)]
    log.event_log.append(
        "study_opened",
        cell=cell.id,
        study=study_name(cell, spec.search),
        carried=[{"params": point, "value": 0.5} for point in carried],
    )
    first, second = log.open(spec).next_round()
    assert (first.number, second.number) == (1, 2)
    points = ended_points(log.play(spec))
    assert points[:2] == [(1, carried[0], 0.5), (2, carried[1], 0.5)]
    assert sorted(number for number, _, _ in points) == [*range(8)]
    assert ended_points(log.open(spec)) == points


def test_a_plugin_adds_a_sampler(command, tmp_path):
    (tmp_path / "mine.py").write_text(SEARCH)
    code, out, err = command("plugin", "check", tmp_path / "mine.py")
    assert (code, "search.sampler" in out) == (0, True), err
    body = """plugins: [mine.py]
fixed: {method: air}
search:
  sampler: mine
  points: 4
  width: 2
  space: {fusion_weight: {min: 0, max: 1}}
"""
    spec = load_sweep(write_sweep(tmp_path, "mine", body))
    searching = Log(tmp_path / "log").play(spec)
    assert type(searching.study.sampler).__name__ == "Mine"
    wrong = write_sweep(tmp_path, "wrong", body.replace(": mine", ": mien"))
    with pytest.raises(
        SpecError, match=r":6:12: .* did you mean \w+\? allowed: tpe, random, grid, mine"
    ):
        load_sweep(wrong)
    use_plugins([])

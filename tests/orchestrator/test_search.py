"""Points of a cell, round after round, and the same ones after any kill."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from orchestrator.search import CellSearch, open_storage
from orchestrator.space import Point
from orchestrator.studies import Carried
from orchestrator.sweep import Dimension, Search, cells_of
from orchestrator.sweep import SweepSpec as Sweep

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


def opened(journal: Path, spec: Sweep, carried: Sequence[Carried] = ()) -> CellSearch:
    (cell,) = cells_of(spec)
    assert spec.search is not None
    return CellSearch(cell, spec.search, open_storage(journal), carried)


def play(
    journal: Path,
    spec: Sweep,
    objective: Callable[[Point], float | None] | None = None,
    carried: Sequence[Carried] = (),
) -> CellSearch:
    """Run a search to its end."""
    searching = opened(journal, spec, carried)
    while points := searching.next_round():
        searching.tell_round(
            {p.number: objective(p) if objective else value(p.params) for p in points}
        )
    return searching


def found(searching: CellSearch) -> list[tuple[int, dict[str, Any], float | None]]:
    """(number, parameters, value) of all points."""
    trials = searching.study.get_trials(deepcopy=False)
    return [
        (t.user_attrs["point"], dict(t.params), t.value) for t in trials if "point" in t.user_attrs
    ]


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
def test_a_search_has_as_many_points_as_it_asks_for_and_tells_them_all(tmp_path, sampler):
    searching = play(tmp_path / "j", SWEEPS[sampler])
    assert [number for number, _, _ in found(searching)] == [0, 1, 2, 3, 4]
    assert [told for _, _, told in found(searching)] == [value(p) for p in params(searching)]
    assert unfinished(searching) == []
    assert searching.next_round() == []


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_the_default_point_comes_first(tmp_path, sampler):
    searching = opened(tmp_path / "j", sweep(sampler))
    assert searching.next_round()[0] == Point(0, {"images_per_class": 40, "fusion_weight": 0.5})


def test_rounds_are_as_wide_as_asked_and_the_last_one_is_what_is_left(tmp_path):
    widths: list[int] = []
    searching = opened(tmp_path / "j", sweep(points=8, width=3))
    while points := searching.next_round():
        widths.append(len(points))
        searching.tell_round({point.number: 0.0 for point in points})
    assert widths == [3, 3, 2]


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_the_same_seed_gives_the_same_points_another_seed_others(tmp_path, sampler):
    first, again, other = (
        params(play(tmp_path / name, sweep(sampler, seed=seed)))
        for name, seed in [("a", 0), ("b", 0), ("c", 1)]
    )
    assert first == again
    assert first[0] == other[0]  # the default
    assert first[1:] != other[1:]


def test_cells_have_different_points(tmp_path):
    spec = sweep("random")
    spec = Sweep(name="x", grid={"method": ("air", "air_grip")}, search=spec.search)
    storage = open_storage(tmp_path / "j")
    assert spec.search is not None
    one, two = (CellSearch(cell, spec.search, storage).next_round() for cell in cells_of(spec))
    assert one[0].params == two[0].params
    assert one[1].params != two[1].params


def test_a_range_of_whole_numbers_gives_whole_numbers_on_a_log_scale_few_large_ones(tmp_path):
    points = params(play(tmp_path / "j", sweep("random", (STEPS,), points=41, width=41)))
    steps = [point["train.steps"] for point in points[1:]]
    assert all(type(step) is int and 1 <= step <= 1000 for step in steps)
    assert 10 < sum(step < 32 for step in steps) < 30  # half of them, by magnitude


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_no_point_is_asked_twice_while_there_are_others(tmp_path, sampler):
    kinds = Dimension(key="auxiliary.kind", values=("lda", "prototype", "knn"))
    spec = sweep(sampler, (COUNTS, kinds), points=6, width=3)
    asked = params(play(tmp_path / "j", spec))
    assert all(asked.count(point) == 1 for point in asked)


def test_a_space_that_holds_no_more_points_is_asked_on_to_the_end(tmp_path):
    assert len(params(play(tmp_path / "j", sweep("tpe", (COUNTS,), points=5)))) == 5


# ---------------------------------------------------------------- pruned


def test_a_pruned_point_is_never_the_best_and_uses_up_patience(tmp_path):
    spec = sweep("tpe", points=9, width=3)
    search = replace(spec.search, patience=4)
    searching = opened(tmp_path / "j", replace(spec, search=search))
    first, second, third = searching.next_round()
    stopped = {second.number: (2, 9.0), third.number: (2, 8.0)}  # before the end all looked good
    searching.tell_round({first.number: 1.0}, stopped)
    states = [t.state for t in searching.study.get_trials(deepcopy=False)]
    assert states == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.PRUNED]
    again = opened(tmp_path / "j", replace(spec, search=search))
    assert [(p.number, p.told) for p in again.next_round()] == [(0, True), (1, True), (2, True)]
    again.tell_round({0: 1.0}, stopped)
    more = again.next_round()
    assert [(p.number, p.told) for p in more] == [(3, False), (4, False), (5, False)]
    again.tell_round({3: 0.5, 4: 0.5, 5: 0.5})
    assert again.next_round() == []  # five points after the best, two of them pruned


# ---------------------------------------------------------------- kills


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_search_killed_anywhere_goes_on_to_the_points_of_an_undisturbed_one(tmp_path, sampler):
    """A killed driver leaves a beginning of the journal: here every one, with half a line more."""
    spec = SWEEPS[sampler]
    undisturbed = found(play(tmp_path / "whole", spec))
    lines = (tmp_path / "whole").read_bytes().splitlines(keepends=True)
    for count in range(len(lines)):
        journal = tmp_path / f"killed after {count}"
        journal.write_bytes(b"".join(lines[:count]) + lines[count][: len(lines[count]) // 2])
        resumed = play(journal, spec)
        assert found(resumed) == undisturbed, f"killed after line {count}"
        assert unfinished(resumed) == []


def test_what_a_killed_driver_left_beside_the_journal_does_not_stop_the_next(tmp_path):
    """The lock of the journal, taken by a process that is no more."""
    journal = tmp_path / "j"
    opened(journal, sweep()).next_round()
    Path(f"{journal}.lock").symlink_to(journal)
    assert len(found(play(journal, sweep()))) == 5


# ---------------------------------------------------------------- edited and failed


def test_another_run_begins_with_the_points_that_were_told(tmp_path):
    """So that a seed that was added later reaches them too; values that were told stay."""
    first = play(tmp_path / "j", sweep())
    again = opened(tmp_path / "j", sweep())
    points = again.next_round()
    assert [(p.number, dict(p.params)) for p in points] == [(n, p) for n, p, _ in found(first)]
    again.tell_round({point.number: -1.0 for point in points})
    assert again.next_round() == []
    assert found(again) == found(first)


def test_more_points_go_on_where_the_search_stood(tmp_path):
    few = found(play(tmp_path / "j", sweep(points=4)))
    more = found(play(tmp_path / "j", sweep(points=6)))
    assert more[:4] == few
    assert more == found(play(tmp_path / "undisturbed", sweep(points=6)))


def test_fewer_points_ask_for_no_more_than_those(tmp_path):
    play(tmp_path / "j", sweep(points=6))
    fewer = opened(tmp_path / "j", sweep(points=3))
    assert [point.number for point in fewer.next_round()] == [0, 1, 2]


@pytest.mark.parametrize("kill", [False, True])
def test_a_failed_point_counts_and_is_tried_again_by_the_next_run(tmp_path, kill):
    def fails(point: Point) -> float | None:
        return None if point.number == 1 else value(point.params)

    failed = play(tmp_path / "j", sweep(), fails)
    assert [number for number, _, _ in found(failed)] == [0, 1, 2, 3, 4]
    assert [number for number, _, told in found(failed) if told is None] == [1]
    if kill:  # before anything came of it
        opened(tmp_path / "j", sweep()).next_round()
    asked: list[int] = []

    def counts(point: Point) -> float:
        asked.append(point.number)
        return value(point.params)

    mended = play(tmp_path / "j", sweep(), counts)
    assert asked.count(1) == 1
    assert len(found(mended)) == 5
    assert values_of(mended) == sorted(value(p) for p in params(mended))
    # A run after that has nothing left to mend.
    assert values_of(play(tmp_path / "j", sweep())) == values_of(mended)


def values_of(searching: CellSearch) -> list[float]:
    """Values that the study knows."""
    trials = searching.study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    return sorted(trial.value for trial in trials)


def test_a_point_that_fails_again_stays_failed(tmp_path):
    for _ in range(2):
        searching = play(tmp_path / "j", sweep(), lambda point: None)
    assert [told for _, _, told in found(searching)] == [None] * 5
    assert unfinished(searching) == []


def test_another_space_starts_its_own_study(tmp_path):
    play(tmp_path / "j", sweep())
    wider = Dimension(key="images_per_class", values=(0, 20, 40, 80))
    other = opened(tmp_path / "j", sweep(space=(wider, WEIGHTS)))
    assert found(other) == []
    assert other.next_round()[0] == Point(0, {"images_per_class": 80, "fusion_weight": 0.5})
    assert len(params(play(tmp_path / "j", sweep()))) == 5  # the old one is as it was


def test_values_by_which_points_were_told_are_what_the_next_points_follow(tmp_path):
    """Two searches that heard other values ask other points from then on."""
    upward = params(play(tmp_path / "a", sweep(points=10), lambda p: value(p.params)))
    downward = params(play(tmp_path / "b", sweep(points=10), lambda p: -value(p.params)))
    assert upward[:4] == downward[:4]  # at random, up to here
    assert upward != downward


# ---------------------------------------------------------------- studies that were lost


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("known", [0, 1, 3, 5])
def test_a_study_that_was_lost_is_asked_again_as_the_ledger_knows_it(tmp_path, sampler, known):
    spec = SWEEPS[sampler]
    whole = found(play(tmp_path / "whole", spec))
    (cell,) = cells_of(spec)
    assert spec.search is not None
    asked = {number: params for number, params, _ in whole[:known]}
    again = CellSearch(cell, spec.search, open_storage(tmp_path / "again"), asked=asked)
    while points := again.next_round():
        again.tell_round({p.number: value(p.params) for p in points})
    assert found(again) == whole


def test_points_that_no_sampler_would_ask_again_are_asked_as_they_were(tmp_path):
    spec = sweep("random", (COUNTS, STEPS))
    (cell,) = cells_of(spec)
    assert spec.search is not None
    asked = {n: {"images_per_class": 20, "train.steps": 7 + n} for n in (1, 2)}
    searching = CellSearch(cell, spec.search, open_storage(tmp_path / "j"), asked=asked)
    while points := searching.next_round():
        searching.tell_round({p.number: value(p.params) for p in points})
    assert params(searching)[1:3] == [asked[1], asked[2]]
    assert len(params(searching)) == 5


def test_what_was_carried_into_a_lost_study_keeps_its_numbers(tmp_path):
    spec = sweep("tpe", points=8)
    (cell,) = cells_of(spec)
    assert spec.search is not None
    carried = [
        Carried({"images_per_class": 20, "fusion_weight": weight}, weight) for weight in (0.1, 0.9)
    ]
    first = opened(tmp_path / "j", spec)
    points = first.next_round()
    first.tell_round({p.number: value(p.params) for p in points})
    whole = found(play(tmp_path / "j", spec, carried=carried))
    assert [number for number, p, _ in whole if p == carried[0].params] == [2]
    asked = {number: params for number, params, _ in whole}
    again = CellSearch(cell, spec.search, open_storage(tmp_path / "k"), carried, asked=asked)
    while points := again.next_round():
        again.tell_round({p.number: value(p.params) for p in points})
    assert sorted(found(again), key=lambda point: point[0]) == whole

"""Which point next: one Optuna study per cell, asked in rounds. Knows no Ray.

A round's points are asked before any of it is told, each by a sampler seeded with the search
seed, the cell, the round and the place in it; results are told in the order of the points. So a
sweep that was killed anywhere goes on with the points of an undisturbed one.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial

from air_core.specs import trial_keys
from orchestrator.keys import digest
from orchestrator.ledger import mend_lines
from orchestrator.space import Point, applies, default_params, grid_points, point_count
from orchestrator.sweep import Cell, Dimension, Search

STARTUP_POINTS = 4  # of TPE below 30 points; its own default of 10 would leave little to model


def open_storage(path: Path) -> JournalStorage:
    """The studies of one sweep. Call it only as the sweep's one driver.

    A killed driver may have left half a line or the lock of the journal; both are removed.
    """
    mend_lines(path)
    Path(f"{path}.lock").unlink(missing_ok=True)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return JournalStorage(JournalFileBackend(str(path)))


class CellSearch:
    """The points of one cell, round after round."""

    def __init__(self, cell: Cell, search: Search, storage: JournalStorage) -> None:
        self.cell, self.search = cell, search
        self.study = optuna.create_study(
            study_name=study_name(cell, search),
            storage=storage,
            direction="maximize",
            load_if_exists=True,
        )
        first = default_params(cell)
        if search.sampler != "grid" and first and not self._trials():
            self.study.enqueue_trial(first)
        # Points that failed for good in an earlier run are tried again, once, before new ones.
        self._again = [_point(t) for t in self._asked() if t.state == TrialState.FAIL]
        mended = {t.user_attrs["mends"] for t in self._trials() if "mends" in t.user_attrs}
        self._again = [point for point in self._again if point.number not in mended]

    def next_round(self) -> list[Point]:
        """The points of the next round, those that a killed driver had asked among them; empty
        when the cell has had all its points."""
        if self._again:
            return list(self._again)
        told = [t for t in self._asked() if t.state.is_finished()]
        wanted = min(self.search.width, self._total() - len(told))
        running = [t for t in self._trials() if t.state == TrialState.RUNNING]
        for half in (t for t in running if "point" not in t.user_attrs):
            self.study.tell(half.number, state=TrialState.FAIL)
        points = [_point(t) for t in running if "point" in t.user_attrs]
        for place in range(len(points), wanted):
            points.append(self._ask(len(told) + place, len(told) // self.search.width, place))
        return points

    def tell_round(self, values: Mapping[int, float | None]) -> None:
        """Objectives by point number; None: the point failed."""
        for trial in self._asked():
            number = trial.user_attrs["point"]
            if number not in values:
                continue
            value = values[number]
            if trial.state == TrialState.RUNNING:
                state = TrialState.FAIL if value is None else TrialState.COMPLETE
                self.study.tell(trial.number, value, state=state)
            elif trial.state == TrialState.FAIL and value is not None:
                self.study.add_trial(
                    create_trial(
                        params=trial.params,
                        distributions=trial.distributions,
                        value=value,
                        user_attrs={"mends": number},
                    )
                )
        self._again = []

    def _ask(self, number: int, round_index: int, place: int) -> Point:
        # A sampler's state is not stored: seed every ask by where it stands.
        words = f"{self.search.seed}/{self.cell.id}/{round_index}/{place}"
        self.study.sampler = make_sampler(self.search, zlib.crc32(words.encode()))
        if self.search.sampler == "grid":
            self.study.enqueue_trial(grid_points(self.cell)[number])
        trial = self.study.ask()
        params: dict[str, Any] = {}
        for dimension in self.cell.space:
            if applies(dimension, self.cell.flat | params):
                params[dimension.key] = _suggest(trial, dimension)
        trial.set_user_attr("point", number)  # from here on the point is whole
        return Point(number, params)

    def _total(self) -> int:
        return point_count(self.cell, self.search)

    def _trials(self) -> list[FrozenTrial]:
        return list(self.study.get_trials(deepcopy=False))

    def _asked(self) -> list[FrozenTrial]:
        return [t for t in self._trials() if "point" in t.user_attrs]


def make_sampler(search: Search, seed: int) -> BaseSampler:
    """The sampler of one ask."""
    match search.sampler:
        case "tpe":
            startup = STARTUP_POINTS if search.points < 30 else 10
            return TPESampler(seed=seed, n_startup_trials=startup)
        case _:
            return RandomSampler(seed=seed)


def study_name(cell: Cell, search: Search) -> str:
    """Another space is another study."""
    space = [[d.key, d.values, d.min, d.max, d.log, d.when] for d in cell.space]
    return f"{cell.id}/{digest([space, search.sampler, search.seed, search.objective])[:8]}"


def _suggest(trial: optuna.Trial, dimension: Dimension) -> Any:
    key, low, high = dimension.key, dimension.min, dimension.max
    if dimension.values is not None:
        return trial.suggest_categorical(key, list(dimension.values))
    assert low is not None
    assert high is not None
    if trial_keys()[key].type is int:
        return trial.suggest_int(key, int(low), int(high), log=dimension.log)
    return trial.suggest_float(key, low, high, log=dimension.log)


def _point(trial: FrozenTrial) -> Point:
    return Point(trial.user_attrs["point"], dict(trial.params))

"""Which point next: one Optuna study per cell, asked in rounds. Knows no Ray.

A round's points are asked before any of it is told, each by a sampler seeded with the search
seed, the cell, the round and the place in it; results are told in the order of the points. So a
sweep that was killed anywhere goes on with the points of an undisturbed one.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import optuna
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial

from air_core.flat import trial_keys
from orchestrator.ledger import mend_lines
from orchestrator.space import (
    Point,
    applies,
    default_params,
    grid_points,
    point_count,
    study_name,
)
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
        self._drop_half_points()
        # What earlier runs have told comes first. A point that failed is tried again, once; one
        # that lacks trials (there is a new seed) gets them; the rest is in the store.
        told = [_point(trial) for trial in self._asked() if trial.state.is_finished()]
        self._earlier = [point for point in told if point.number < self._total()]

    def next_round(self) -> list[Point]:
        """The points of the next round, those that a killed driver had asked among them; empty
        when the cell has had all its points."""
        if self._earlier:
            return list(self._earlier)
        asked = self._asked()
        points = [_point(trial) for trial in asked if trial.state == TrialState.RUNNING]
        # A round that a killed driver has told in part is still that round.
        first = points[0].number if points else len(asked)
        end = min((first // self.search.width + 1) * self.search.width, self._total())
        return points + [self._ask(number) for number in range(len(asked), end)]

    def tell_round(self, values: Mapping[int, float | None]) -> None:
        """Objectives by point number; None: the point failed."""
        mended = {trial.user_attrs.get("mends") for trial in self._trials()}
        for trial in self._asked():
            number = trial.user_attrs["point"]
            if number not in values:
                continue
            value = values[number]
            if trial.state == TrialState.RUNNING:
                state = TrialState.FAIL if value is None else TrialState.COMPLETE
                self.study.tell(trial.number, value, state=state)
            elif trial.state == TrialState.FAIL and value is not None and number not in mended:
                self.study.add_trial(
                    create_trial(
                        params=trial.params,
                        distributions=trial.distributions,
                        value=value,
                        user_attrs={"mends": number},
                    )
                )
        self._earlier = []

    def _ask(self, number: int) -> Point:
        # A sampler's state is not stored: seed every ask by where it stands.
        round_index, place = divmod(number, self.search.width)
        words = f"{self.search.seed}/{self.cell.id}/{round_index}/{place}"
        self.study.sampler = make_sampler(self.search, zlib.crc32(words.encode()))
        settled = self._settled(number)
        if settled:
            self.study.enqueue_trial(settled)
        trial = self.study.ask()
        params: dict[str, Any] = {}
        for dimension in self.cell.space:
            if applies(dimension, self.cell.flat | params):
                params[dimension.key] = _suggest(trial, dimension)
        trial.set_user_attr("point", number)  # from here on the point is whole
        return Point(number, params)

    def _settled(self, number: int) -> dict[str, Any]:
        """Points that no sampler chooses: all of a grid; else the default, which comes first."""
        if self.search.sampler == "grid":
            return grid_points(self.cell)[number]
        return {} if number else default_params(self.cell)

    def _drop_half_points(self) -> None:
        """Fail what a killed driver was in the middle of asking."""
        for half in self._trials():
            if half.state == TrialState.WAITING:
                self.study.ask()  # takes it off the queue: there is never more than one
            elif half.state != TrialState.RUNNING or "point" in half.user_attrs:
                continue
            self.study.tell(half.number, state=TrialState.FAIL)

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


def _suggest(trial: optuna.Trial, dimension: Dimension) -> Any:
    key, low, high = dimension.key, dimension.min, dimension.max
    if dimension.values is not None:
        return trial.suggest_categorical(key, list(dimension.values))
    assert low is not None
    assert high is not None
    kind = trial_keys()[key].type
    if int in (kind, *get_args(kind)):  # also where it may be null
        return trial.suggest_int(key, int(low), int(high), log=dimension.log)
    return trial.suggest_float(key, low, high, log=dimension.log)


def _point(trial: FrozenTrial) -> Point:
    return Point(trial.user_attrs["point"], dict(trial.params))

"""Search: suggests the points of a cell in rounds. Uses no Ray.

The state of a search is its points in the event log and their objectives in the store. A point
depends on the search seed, the cell, its position and the objectives of earlier rounds. So a sweep
that is killed at any time resumes with the points that it would have had without the kill.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from statistics import fmean
from typing import Any, get_args

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from air_core.settings import TrialSettings
from air_core.settings.flat import trial_keys
from orchestrator.components import SAMPLERS
from orchestrator.planning.history import RESULT_STATES
from orchestrator.planning.ledger import Ledger, Slot
from orchestrator.planning.plan import Plan
from orchestrator.spec import Cell, Dimension
from orchestrator.spec.cells import computation_of
from orchestrator.spec.space import Point, default_params, grid_points, point_count, study_name
from orchestrator.spec.sweep import Search
from orchestrator.store import ArtifactStore, read_trial

ATTEMPTS = 8  # to sample a point that is new
STARTUP_POINTS = 4  # random points of TPE in searches below 30 points; Optuna's default is 10

optuna.logging.set_verbosity(optuna.logging.ERROR)


def open_searches(plan: Plan) -> dict[str, CellSearch]:
    """Open a search for each cell that has a search space."""
    search, suggested = plan.sweep.search, plan.history.suggested
    assert search is not None
    return {
        cell.id: CellSearch(cell, search, suggested.get(study_name(cell, search), {}))
        for cell in plan.cells
        if cell.space
    }


class CellSearch:
    """The search of one cell.

    Args:
        suggested: settings of the points that the event log has, by number.
    """

    def __init__(self, cell: Cell, search: Search, suggested: Mapping[int, dict[str, Any]]) -> None:
        self.cell, self.search = cell, search
        self._sampler = SAMPLERS.load(search.sampler)
        self._grid = grid_points(cell)
        self._total = point_count(cell, search)
        self._suggested = dict(suggested)
        self._computations: set[TrialSettings] = set()  # of the points of the rounds so far
        self._values: dict[int, float] = {}  # their objectives, without failed points
        self._next = 0  # number of the first point of the next round

    def next_round(self) -> list[Point]:
        """The points of the next round; none after the last one.

        The first round also has all later rounds of which the event log has every point. The store
        has most of their trials; those that failed, and those of added seeds, run side by side.
        """
        first, width = self._next, self.search.width
        end = first - first % width + width
        if first == 0:
            end = max(end, len(self._suggested) // width * width)
        self._next = min(end, self._total)
        return [self._point(number) for number in range(first, self._next)]

    def record_round(self, values: Mapping[int, float | None]) -> None:
        """Record the objectives of the points of a round by number; None: the point failed."""
        self._values |= {number: value for number, value in values.items() if value is not None}

    def _point(self, number: int) -> Point:
        """The point of the event log or of the grid, the default as number 0, or a sampled one."""
        is_grid = self.search.sampler == "grid"
        params = self._suggested.get(number) or (self._grid[number] if is_grid else {})
        if not params and number == 0:
            params = default_params(self.cell)
        params = self._suggested[number] = params or self._sample(number)
        self._computations.add(self._computation(params))
        return Point(number, params)

    def _sample(self, number: int) -> dict[str, Any]:
        """Sample a point that computes something new, or take one of the grid; of a range, it may
        repeat after ATTEMPTS attempts."""
        round_index, index = divmod(number, self.search.width)
        words = f"{self.search.seed}/{self.cell.id}/{round_index}/{index}"
        earlier = [
            _frozen_trial(self.cell, self._suggested[other], value=value)
            for other, value in sorted(self._values.items())
            if other < round_index * self.search.width
        ]
        params: dict[str, Any] = {}
        for attempt in range(ATTEMPTS):
            # A study and a sampler for each attempt: no state but the objectives has an effect.
            seed = zlib.crc32((f"{words}/{attempt}" if attempt else words).encode())
            # A sampler that keeps suggesting the same point is replaced by a random one.
            stuck = attempt >= ATTEMPTS // 2
            sampler = RandomSampler(seed=seed) if stuck else self._sampler(self.search, seed)
            study = optuna.create_study(direction="maximize", sampler=sampler)
            study.add_trials(earlier)
            params = study.ask({each.key: _distribution(each) for each in self.cell.space}).params
            if self._computation(params) not in self._computations:
                return params
        new = (each for each in self._grid if self._computation(each) not in self._computations)
        return next(new, params)

    def _computation(self, params: Mapping[str, Any]) -> TrialSettings:
        return computation_of({**self.cell.flat, **params})


def study_of(ledger: Ledger, store: ArtifactStore, cell: str | None) -> optuna.Study:
    """The points of one cell as a study in memory; trial i is point i.

    A point is COMPLETE with the objective that its search sees, FAIL if one of its trials failed,
    RUNNING from its start to its end, else WAITING.

    Args:
        cell: id of the cell; None: the only one that is searched.

    Raises:
        ValueError: the sweep does not search this cell, or several and `cell` is None.
    """
    searched = {each.id: each for each in ledger.cells if each.space}
    if not searched:
        raise ValueError(f"{ledger.about.name} has no search: its file has no `search.space`")
    names = [*searched] if cell is None else [cell]
    if len(names) > 1 or names[0] not in searched:
        found = f"no searched cell {cell!r}" if cell else f"{len(searched)} searched cells"
        raise ValueError(
            f"{ledger.about.name} has {found}; give `cell`; allowed: {', '.join(searched)}"
        )
    points: dict[int, list[Slot]] = {}
    for slot in ledger.slots:
        if slot.cell.id == names[0]:
            points.setdefault(slot.point, []).append(slot)
    study = optuna.create_study(study_name=names[0], direction="maximize")
    for _, slots in sorted(points.items()):
        states, value = {ledger.states[slot.id] for slot in slots}, None
        if states <= RESULT_STATES.keys():
            objectives = [read_trial(slot.key, store).objectives for slot in slots]
            state = TrialState.COMPLETE
            value = fmean(each[str(ledger.about.objective)] for each in objectives)
        elif "failed" in states:
            state = TrialState.FAIL
        else:
            is_started = any(slot.id in ledger.history.started for slot in slots)
            is_started |= states != {"waiting"}
            state = TrialState.RUNNING if is_started else TrialState.WAITING
        study.add_trial(_frozen_trial(slots[0].cell, slots[0].params, state=state, value=value))
    return study


def _frozen_trial(cell: Cell, params: Mapping[str, Any], **outcome: Any) -> FrozenTrial:
    distributions = {d.key: _distribution(d) for d in cell.space if d.key in params}
    return create_trial(params=dict(params), distributions=distributions, **outcome)


@SAMPLERS.add("tpe", summary="Optuna's TPE")
def tpe(search: Search, seed: int) -> BaseSampler:
    """Optuna's TPE, which starts with random points."""
    startup = STARTUP_POINTS if search.points < 30 else 10
    return TPESampler(seed=seed, n_startup_trials=startup)


@SAMPLERS.add("random", summary="random values")
@SAMPLERS.add("grid", summary="every combination of values")
def at_random(search: Search, seed: int) -> BaseSampler:
    """A sampler that suggests independent random points."""
    return RandomSampler(seed=seed)


def _distribution(dimension: Dimension) -> BaseDistribution:
    if dimension.values is not None:
        return CategoricalDistribution(dimension.values)
    low, high = dimension.min, dimension.max
    assert low is not None
    assert high is not None
    known = trial_keys().get(dimension.key)  # a plugin that is not in use may have declared it
    kind = known.type if known else type(low)
    if int in (kind, *get_args(kind)):  # also for an optional integer
        return IntDistribution(int(low), int(high), log=dimension.log)
    return FloatDistribution(low, high, log=dimension.log)

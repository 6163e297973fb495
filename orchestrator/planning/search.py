"""Search: one Optuna study per cell, which suggests points in rounds. Uses no Ray.

All points of a round are suggested before any objective of the round is recorded. The sampler of
each point is seeded with the search seed, the cell, the round and the index in the round, and
objectives are recorded in the order of the points. So a sweep that is killed at any time resumes
with the points that it would have had without the kill. A study of a changed space starts with the
points that are carried into it (`orchestrator.planning.studies`).

A study is kept in memory and rebuilt from the event log when a run starts.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
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

from air_core.specs import TrialSpec
from air_core.specs.flat import trial_keys
from orchestrator.components import SAMPLERS
from orchestrator.planning.plan import Plan, Slot
from orchestrator.planning.studies import Searches, read_searches
from orchestrator.spec import Cell, Dimension, SweepSpec
from orchestrator.spec.space import (
    Point,
    default_params,
    grid_points,
    point_count,
    study_name,
)
from orchestrator.spec.sweep import Search, computation_of
from orchestrator.store import ArtifactStore, EventLog, read_trial

ATTEMPTS = 8  # to sample a point that is new
STARTUP_POINTS = 4  # random points of TPE in searches below 30 points; Optuna's default is 10

optuna.logging.set_verbosity(optuna.logging.ERROR)


def open_searches(plan: Plan, event_log: EventLog) -> dict[str, CellSearch]:
    """Open a search for each cell that has a search space.

    Only the driver that holds the lock of the sweep may call this function: it writes to the event
    log. The carried points of a study are logged before the study uses them.
    """
    search = plan.sweep.search
    assert search is not None
    searched = [cell for cell in plan.cells if cell.space]
    state = read_searches(event_log)
    for cell in searched:
        start = plan.study_starts.get(cell.id)
        if start is not None:
            event_log.append(
                "study_opened",
                cell=cell.id,
                study=start.study,
                method=cell.method,
                sampler=search.sampler,
                seed=search.seed,
                settings=cell.flat,
                carried=[asdict(point) for point in start.carried],
                left_out=start.left_out,
            )
        elif state.current.get(cell.id, study := study_name(cell, search)) != study:
            event_log.append("study_resumed", cell=cell.id, study=study)
    state = read_searches(event_log)
    return {cell.id: CellSearch(cell, search, state) for cell in searched}


class CellSearch:
    """The search of one cell: suggests points in rounds and records their objectives.

    Args:
        state: searches of the sweep so far, from the event log.
        sampler: returns the sampler of one point, given its seed.
    """

    def __init__(
        self,
        cell: Cell,
        search: Search,
        state: Searches,
        sampler: Callable[[Search, int], BaseSampler] | None = None,
    ) -> None:
        self.cell, self.search = cell, search
        self._sampler = sampler or SAMPLERS.load(search.sampler)
        self.study = optuna.create_study(direction="maximize")  # only has points that ended
        self._params: dict[int, dict[str, Any]] = {}  # settings of all suggested points
        self._open: list[int] = []  # points that have not ended
        self._values: dict[int, float] = {}  # objectives of points that ran to their end
        self._carried: set[int] = set()
        # The first round repeats all points of earlier runs: failed points run once more, and
        # points run for seeds that were added since. The store has all their other trials.
        self._earlier: list[Point] = []
        self._restore(state)

    def next_round(self) -> list[Point]:
        """Suggest the points of the next round.

        The round includes points that a killed driver had suggested.

        Returns:
            No points once the cell has had all its points, or `patience` has run out.
        """
        if self._earlier:
            return list(self._earlier)
        total = self._total()
        points = [Point(number, self._params[number]) for number in self._open if number < total]
        if not points and self._patience_exhausted():
            return []
        # A killed driver may have recorded a part of a round; the rest belongs to the same round.
        first = points[0].number if points else len(self._params)
        end = min((first // self.search.width + 1) * self.search.width, total)
        return points + [self._suggest(number) for number in range(len(self._params), end)]

    def record_round(self, values: Mapping[int, float | None]) -> None:
        """Record the end of the points of a round; a recorded objective never changes.

        Args:
            values: objectives by point number; None: the point failed.
        """
        for number in list(self._open):
            if number in values:
                self._end(number, values[number])
        self._earlier = []

    def _restore(self, state: Searches) -> None:
        """Rebuild the study from the event log, in the order in which points ended."""
        study = study_name(self.cell, self.search)
        values = state.values.get(study, {})
        known = state.known_points(self.cell, self.search, None)
        for number in range(max(known, default=-1) + 1):
            if number in known:
                self._params[number] = known[number]
                self._open.append(number)
            else:  # number 0: the carried points do not include the default
                self._suggest(number)
        for point in state.carried.get(study, ()):
            number = next(n for n, params in known.items() if params == point.params)
            self._carried.add(number)
            if number in self._open:
                self._end(number, point.value)
        for number, value in values.items():
            if value is not None and number in self._open:
                self._end(number, value)
        self._earlier = [
            Point(number, params)
            for number, params in self._params.items()
            if number < self._total() and (number in values or number in self._carried)
        ]

    def _end(self, number: int, value: float | None) -> None:
        """Add a point that ended to the study."""
        if value is not None:
            self._values[number] = value
        self._open.remove(number)
        params = self._params[number]
        attributes = {"point": number} | ({"carried": True} if number in self._carried else {})
        state = TrialState.FAIL if value is None else TrialState.COMPLETE
        self.study.add_trial(
            _frozen_trial(self.cell, params, state=state, value=value, user_attrs=attributes)
        )

    def _patience_exhausted(self) -> bool:
        """Whether none of the last `patience` points of this study improved the best objective."""
        if self.search.patience is None:
            return False
        values = {number: v for number, v in self._values.items() if number < self._total()}
        best = max(values, key=lambda number: (values[number], -number), default=-1)
        after = [number for number in self._params if number > best]
        return len(set(after) - self._carried) >= self.search.patience

    def _suggest(self, number: int) -> Point:
        """Suggest a point: of the grid, the default as number 0, or from the sampler."""
        if self.search.sampler == "grid":
            params = grid_points(self.cell)[number]
        else:
            params = {} if number else default_params(self.cell)
        self._params[number] = params or self._sample(number)
        self._open.append(number)
        return Point(number, self._params[number])

    def _sample(self, number: int) -> dict[str, Any]:
        """Sample a new point; it may repeat an earlier point after ATTEMPTS attempts."""
        round_index, index = divmod(number, self.search.width)
        words = f"{self.search.seed}/{self.cell.id}/{round_index}/{index}"
        params: dict[str, Any] = {}
        known = {self._computation(other) for other in self._params.values()}
        for attempt in range(ATTEMPTS):
            # Samplers keep no state between points, so the seed depends on the point's position.
            seed = zlib.crc32((f"{words}/{attempt}" if attempt else words).encode())
            # A sampler that keeps suggesting the same point is replaced by a random one.
            stuck = attempt >= ATTEMPTS // 2
            sampler = RandomSampler(seed=seed) if stuck else self._sampler(self.search, seed)
            self.study.sampler = sampler
            trial = self.study.ask()
            params = {each.key: _suggest_value(trial, each) for each in self.cell.space}
            self.study.tell(trial.number, state=TrialState.FAIL)  # `_end` adds the point
            if self._computation(params) not in known:
                break
        return params

    def _computation(self, params: Mapping[str, Any]) -> TrialSpec:
        return computation_of({**self.cell.flat, **params})

    def _total(self) -> int:
        return point_count(self.cell, self.search)


def study_of(
    plan: Plan, store: ArtifactStore, event_log: EventLog, cell: str | None
) -> optuna.Study:
    """The points of one cell as a study in memory; trial i is point i.

    A point is COMPLETE with the objective that its search sees, FAIL if one of its trials failed,
    RUNNING from its start to its end, else WAITING.

    Args:
        cell: id of the cell; None: the only one that is searched.

    Raises:
        ValueError: the sweep does not search this cell, or several and `cell` is None.
    """
    searched = {each.id: each for each in plan.cells if each.space}
    if not searched:
        raise ValueError(f"{plan.sweep.name} has no search: its file has no `search.space`")
    names = [*searched] if cell is None else [cell]
    if len(names) > 1 or names[0] not in searched:
        found = f"no searched cell {cell!r}" if cell else f"{len(searched)} searched cells"
        raise ValueError(
            f"{plan.sweep.name} has {found}; give `cell`; allowed: {', '.join(searched)}"
        )
    points: dict[int, list[Slot]] = {}
    for slot in plan.slots:
        if slot.cell.id == names[0]:
            points.setdefault(slot.point, []).append(slot)
    events = list(event_log.events())
    failed = {event["slot"] for event in events if event["event"] == "trial_failed"}
    started = {
        slot for event in events if event["event"] == "trials_started" for slot in event["slots"]
    }
    study = optuna.create_study(study_name=names[0], direction="maximize")
    for _, slots in sorted(points.items()):
        value, ids = _stored_objective(slots, plan.sweep, store), {s.id for s in slots}
        if value is not None:
            state = TrialState.COMPLETE
        elif ids & failed:
            state = TrialState.FAIL
        else:
            state = TrialState.RUNNING if ids & started else TrialState.WAITING
        study.add_trial(_frozen_trial(slots[0].cell, slots[0].params, state=state, value=value))
    return study


def _stored_objective(
    slots: Sequence[Slot], sweep: SweepSpec, store: ArtifactStore
) -> float | None:
    """Mean objective of the trials of a point; None if a trial or its objective is missing."""
    assert sweep.search is not None
    if not all(store.has(slot.spec) for slot in slots):
        return None
    values = [read_trial(slot.spec, store).objectives[sweep.search.objective] for slot in slots]
    return fmean(values) if None not in values else None


def _frozen_trial(cell: Cell, params: Mapping[str, Any], **outcome: Any) -> FrozenTrial:
    distributions = {d.key: _distribution(d) for d in cell.space if d.key in params}
    return create_trial(params=dict(params), distributions=distributions, **outcome)


def at_random(search: Search, seed: int) -> BaseSampler:
    """A sampler that suggests independent random points."""
    return RandomSampler(seed=seed)


def tpe(search: Search, seed: int) -> BaseSampler:
    """Optuna's TPE, which starts with random points."""
    startup = STARTUP_POINTS if search.points < 30 else 10
    return TPESampler(seed=seed, n_startup_trials=startup)


def _suggest_value(trial: optuna.Trial, dimension: Dimension) -> Any:
    key = dimension.key
    match _distribution(dimension):
        case CategoricalDistribution(choices=choices):
            return trial.suggest_categorical(key, choices)
        case IntDistribution(low=low, high=high, log=log):
            return trial.suggest_int(key, low, high, log=log)
        case FloatDistribution(low=low, high=high, log=log):
            return trial.suggest_float(key, low, high, log=log)


def _distribution(dimension: Dimension) -> BaseDistribution:
    if dimension.values is not None:
        return CategoricalDistribution(dimension.values)
    low, high = dimension.min, dimension.max
    assert low is not None
    assert high is not None
    kind = trial_keys()[dimension.key].type
    if int in (kind, *get_args(kind)):  # also for an optional integer
        return IntDistribution(int(low), int(high), log=dimension.log)
    return FloatDistribution(low, high, log=dimension.log)

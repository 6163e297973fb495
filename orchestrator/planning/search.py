"""Which point next: one Optuna study per cell, asked in rounds. Knows no Ray.

A round's points are asked before any of it is told, each by a sampler seeded with the search
seed, the cell, the round and the place in it; results are told in the order of the points. So a
sweep that was killed anywhere goes on with the points of an undisturbed one. A study of a changed
space starts with the points that are carried into it (`orchestrator.planning.studies`).

A study is in memory. It is made from the event log when a run starts, and what it is told is copied
for `optuna-dashboard` to a file of the sweep or a team's Postgres, which no search reads.
"""

from __future__ import annotations

import logging
import time
import uuid
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args
from urllib.parse import urlsplit

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.exceptions import StorageInternalError
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState, create_trial

from air_core.flat import trial_keys
from orchestrator.errors import StudiesAway
from orchestrator.planning.plan import Plan
from orchestrator.planning.studies import Searches, searches
from orchestrator.spec import Cell, Dimension
from orchestrator.spec.space import (
    Point,
    applies,
    default_params,
    grid_points,
    point_count,
    study_name,
)
from orchestrator.spec.sweep import JOURNAL, Search
from orchestrator.store import EventLog

TRIES = 8  # at a point that was not asked before: one that was has nothing new to tell
STARTUP_POINTS = 4  # of TPE below 30 points; its own default of 10 would leave little to model

optuna.logging.set_verbosity(optuna.logging.ERROR)
log = logging.getLogger(__name__)


def open_storage(path: Path) -> JournalStorage:
    """The file of a sweep's studies."""
    return JournalStorage(JournalFileBackend(str(path)))


# Mistakes of the user; anything else may pass by itself.
MISTAKES = ("authentication failed", "no password supplied", "does not exist", "permission denied")


def open_database(uri: str) -> RDBStorage:
    """The studies of a team.

    A driver holds one connection while it copies a round, and none while trials run.

    Args:
        uri: `postgresql://...` without a password; libpq looks for one in PGPASSWORD, PGPASSFILE
            and ~/.pgpass.

    Raises:
        ValueError: it rejects the login, or does not exist.
        StudiesAway: it does not answer.
    """
    from sqlalchemy.exc import DBAPIError

    # With the driver named: which one is meant without depends on the version of SQLAlchemy.
    address = uri.replace("postgresql://", "postgresql+psycopg://", 1)
    options = {"pool_size": 1, "max_overflow": 1, "connect_args": {"connect_timeout": 10}}
    for attempt in range(TRIES):
        try:
            storage = RDBStorage(address, engine_kwargs=options)
            storage.engine.dispose()
            return storage
        except ImportError as missing:
            raise ValueError(
                "search.storage needs psycopg, which is not here: pip install 'airsweep[postgres]'"
            ) from missing
        except (StorageInternalError, DBAPIError) as error:
            said = _last_line(error)
            # Two drivers that make the tables at the same time: one of them finds them made.
            if "already exists" in f"{error}" or "duplicate key" in f"{error}":
                time.sleep(0.2 * (attempt + 1))
                continue
            if any(words in f"{error}" for words in MISTAKES):
                raise ValueError(
                    f"the studies' database {place_of_database(uri)} rejects the login ({said}); "
                    "set PGPASSWORD or write ~/.pgpass, and check that the database exists"
                ) from error
            raise StudiesAway(_away(uri, said)) from error
    raise StudiesAway(_away(uri, "others are making its tables"))


def place_of_database(uri: str) -> str:
    """Server and database of a URI, for messages.

    >>> place_of_database("postgresql://ada@db.example:5432/studies?sslmode=require")
    'db.example:5432/studies'
    """
    parts = urlsplit(uri)
    return f"{parts.netloc.rpartition('@')[2]}{parts.path}"


def _away(uri: str, said: str) -> str:
    return f"the studies' database {place_of_database(uri)} does not answer ({said})"


def _last_line(error: BaseException) -> str:
    """What libpq says; what is around it is SQLAlchemy's."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line.strip() for line in f"{cause}".strip().splitlines() if line.strip()]
    return (lines[0] if lines else type(cause).__name__)[:200]


def open_searches(
    plan: Plan, event_log: EventLog, journal: Path, owner: tuple[str, ...] = ()
) -> dict[str, CellSearch]:
    """A search for each cell that has a space. Call it only as the sweep's one driver.

    What a study takes over is in the ledger before the study is fed.

    Args:
        journal: where studies are copied to that are in no database.
        owner: store, project and sweep; tells apart the studies of a database.
    """
    search = plan.sweep.search
    assert search is not None
    searched = [cell for cell in plan.cells if cell.space]
    found = searches(event_log)
    for cell in searched:
        starts = plan.openings.get(cell.id)
        if starts is not None:
            event_log.append(
                "study_opened",
                cell=cell.id,
                study=starts.study,
                method=cell.method,
                sampler=search.sampler,
                seed=search.seed,
                settings=cell.flat,
                carried=[asdict(one) for one in starts.carried],
                left_out=starts.left_out,
            )
        elif found.current.get(cell.id, study := study_name(cell, search)) != study:
            event_log.append("study_resumed", cell=cell.id, study=study)
    found, prefix = searches(event_log), ""
    if search.storage == JOURNAL:
        for earlier in (journal, Path(f"{journal}.lock")):
            earlier.unlink(missing_ok=True)
        storage: BaseStorage = open_storage(journal)
    else:
        storage = open_database(search.storage)
        prefix = f"{_own_name(event_log, owner)}/"
    return {cell.id: CellSearch(cell, search, found, storage, prefix) for cell in searched}


def _own_name(event_log: EventLog, owner: tuple[str, ...]) -> str:
    """What the studies of this sweep begin with in a database that many share.

    A sweep that was removed and starts again, and a copy of a store, have a name of their own:
    their studies are made from their ledger under it.
    """
    for event in event_log.events():
        if event["event"] == "studies_named" and event["owner"] == list(owner):
            return str(event["name"])
    name = "/".join([*owner[1:], uuid.uuid4().hex[:8]])
    event_log.append("studies_named", owner=list(owner), name=name)
    return name


class CellSearch:
    """The points of one cell, round after round.

    Args:
        found: what the event log knows of searches.
        storage: takes a copy of the points and their values.
        prefix: of the study's name in a storage that sweeps share.
        sampler: makes the sampler of one ask from its seed.
    """

    def __init__(
        self,
        cell: Cell,
        search: Search,
        found: Searches,
        storage: BaseStorage | None = None,
        prefix: str = "",
        sampler: Callable[[Search, int], BaseSampler] | None = None,
    ) -> None:
        self.cell, self.search = cell, search
        self._sampler = sampler or make_sampler
        self._storage, self._name = storage, prefix + study_name(cell, search)
        self._copy: optuna.Study | None = None
        self.study = optuna.create_study(direction="maximize")  # of points that ended
        self._params: dict[int, dict[str, Any]] = {}  # of all points that were asked
        self._open: list[int] = []  # those that have not ended
        self._values: dict[int, float] = {}  # objectives of those that ran to their end
        self._carried: set[int] = set()
        # What earlier runs have told comes first. A point that failed is tried again, once; one
        # that lacks trials (there is a new seed) gets them; the rest is in the store.
        self._earlier: list[Point] = []
        self._restore(found)
        self._share()

    def next_round(self) -> list[Point]:
        """The points of the next round, those that a killed driver had asked among them; empty
        when the cell has had all its points, or `patience` is at its end."""
        if self._earlier:
            return list(self._earlier)
        total = self._total()
        points = [Point(number, self._params[number]) for number in self._open if number < total]
        if not points and self._exhausted():
            return []
        # A round that a killed driver has told in part is still that round.
        first = points[0].number if points else len(self._params)
        end = min((first // self.search.width + 1) * self.search.width, total)
        return points + [self._ask(number) for number in range(len(self._params), end)]

    def tell_round(
        self,
        values: Mapping[int, float | None],
        stopped: Mapping[int, tuple[int, float]] = MappingProxyType({}),
    ) -> None:
        """What became of the points of a round; values that were told before stay.

        Args:
            values: objectives by point number; None: the point failed.
            stopped: points that were pruned: after which iteration, and their objective there.
        """
        for number in list(self._open):
            if number in stopped:
                self._prune(number, *stopped[number])
            elif number in values:
                self._end(number, values[number])
        self._earlier = []
        self._share()

    def _restore(self, found: Searches) -> None:
        """The study as the event log knows it, in the order in which points ended."""
        study = study_name(self.cell, self.search)
        told, pruned = found.told.get(study, {}), found.pruned.get(study, {})
        known = found.known(self.cell, self.search, None)
        for number in range(max(known, default=-1) + 1):
            if number in known:
                self._params[number] = known[number]
                self._open.append(number)
            else:  # the default, where points are carried
                self._ask(number)
        for one in found.carried.get(study, ()):
            number = next(n for n, params in known.items() if params == one.params)
            self._carried.add(number)
            if number in self._open:
                self._end(number, one.value)
        for number, value in told.items():
            if value is not None and number in self._open:
                self._end(number, value)
            elif number in pruned and number in self._open:
                self._prune(number, pruned[number].rung, pruned[number].value)
        self._earlier = [
            Point(number, params, told=True)
            for number, params in self._params.items()
            if number < self._total() and (number in told or number in self._carried)
        ]

    def _end(self, number: int, value: float | None) -> None:
        if value is not None:
            self._values[number] = value
        state = TrialState.FAIL if value is None else TrialState.COMPLETE
        self._add(number, state=state, value=value)

    def _prune(self, number: int, rung: int, value: float) -> None:
        rungs = {rung: value}
        self._add(number, state=TrialState.PRUNED, value=value, intermediate_values=rungs)

    def _add(self, number: int, **outcome: Any) -> None:
        """Let the study know of a point that ended."""
        self._open.remove(number)
        params = self._params[number]
        distributions = {d.key: _distribution(d) for d in self.cell.space if d.key in params}
        attributes = {"point": number} | ({"carried": True} if number in self._carried else {})
        trial = create_trial(
            params=params, distributions=distributions, user_attrs=attributes, **outcome
        )
        self.study.add_trial(trial)

    def _share(self) -> None:
        """Copy the points and their values. A database that does not answer gets them after a
        later round."""
        if not isinstance(self._storage, RDBStorage):
            self._copy_told()
            return
        from sqlalchemy.exc import DBAPIError

        try:
            self._copy_told()
            self._storage.engine.dispose()  # trials have no need of the connection
        except (StorageInternalError, DBAPIError) as error:
            self._copy = None  # what came through is not known
            log.warning(
                "%s; the search goes on, and its next round is copied with what is missing",
                _away(self.search.storage, _last_line(error)),
            )

    def _copy_told(self) -> None:
        if self._storage is None:
            return
        if self._copy is None:
            with suppress(KeyError):
                optuna.delete_study(study_name=self._name, storage=self._storage)
            self._copy = optuna.create_study(
                study_name=self._name, storage=self._storage, direction="maximize"
            )
        there = {t.user_attrs["point"] for t in self._copy.get_trials(deepcopy=False)}
        for trial in self.study.get_trials(deepcopy=False):
            if trial.user_attrs.get("point", -1) not in {-1, *there}:
                self._copy.add_trial(trial)

    def _exhausted(self) -> bool:
        """Were the last `patience` points that this study asked all no better than one before?"""
        if self.search.patience is None:
            return False
        values = {number: v for number, v in self._values.items() if number < self._total()}
        best = max(values, key=lambda number: (values[number], -number), default=-1)
        after = [number for number in self._params if number > best]
        return len(set(after) - self._carried) >= self.search.patience

    def _ask(self, number: int) -> Point:
        """All points of a grid are settled; and the default, which comes first."""
        if self.search.sampler == "grid":
            settled = grid_points(self.cell)[number]
        else:
            settled = {} if number else default_params(self.cell)
        self._params[number] = settled or self._drawn(number)
        self._open.append(number)
        return Point(number, self._params[number])

    def _drawn(self, number: int) -> dict[str, Any]:
        """A point that was not asked before, unless the space seems to hold no other."""
        round_index, place = divmod(number, self.search.width)
        words = f"{self.search.seed}/{self.cell.id}/{round_index}/{place}"
        params: dict[str, Any] = {}
        for attempt in range(TRIES):
            # A sampler's state is not kept: seed every ask by where it stands.
            seed = zlib.crc32((f"{words}/{attempt}" if attempt else words).encode())
            # One that keeps to its favourite point is helped by chance.
            stuck = attempt >= TRIES // 2
            sampler = RandomSampler(seed=seed) if stuck else self._sampler(self.search, seed)
            self.study.sampler = sampler
            trial, params = self.study.ask(), {}
            for dimension in self.cell.space:
                if applies(dimension, self.cell.flat | params):
                    params[dimension.key] = _suggest(trial, dimension)
            self.study.tell(trial.number, state=TrialState.FAIL)  # it is added when it ends
            if params not in self._params.values():
                break
        return params

    def _total(self) -> int:
        return point_count(self.cell, self.search)


def make_sampler(search: Search, seed: int) -> BaseSampler:
    """The sampler of one ask."""
    match search.sampler:
        case "tpe":
            startup = STARTUP_POINTS if search.points < 30 else 10
            return TPESampler(seed=seed, n_startup_trials=startup)
        case _:
            return RandomSampler(seed=seed)


def importances(
    space: Sequence[Dimension], points: Sequence[tuple[Mapping[str, Any], float]]
) -> dict[str, float]:
    """Which dimensions the objective depends on, by functional ANOVA (Hutter et al. 2014).

    Args:
        points: settings and objective of each point.

    Returns:
        Shares that sum to 1, the largest first; empty where they cannot be told: fewer than four
        points, all of one value, or no dimension that all points have.
    """
    values = {value for _, value in points}
    shared = [d for d in space if all(d.key in settings for settings, _ in points)]
    if len(points) < 4 or len(values) < 2 or not shared:
        return {}
    study = optuna.create_study(direction="maximize")
    for settings, value in points:
        params = {d.key: settings[d.key] for d in shared}
        distributions = {d.key: _distribution(d) for d in shared}
        study.add_trial(create_trial(params=params, distributions=distributions, value=value))
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def _suggest(trial: optuna.Trial, dimension: Dimension) -> Any:
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
    if int in (kind, *get_args(kind)):  # also where it may be null
        return IntDistribution(int(low), int(high), log=dimension.log)
    return FloatDistribution(low, high, log=dimension.log)

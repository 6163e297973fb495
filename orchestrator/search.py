"""Which point next: one Optuna study per cell, asked in rounds. Knows no Ray.

A round's points are asked before any of it is told, each by a sampler seeded with the search
seed, the cell, the round and the place in it; results are told in the order of the points. So a
sweep that was killed anywhere goes on with the points of an undisturbed one. A study of a changed
space starts with the points that are carried into it (`orchestrator.studies`).

Studies are in a file of the sweep or in a team's Postgres. Either may lack what the other was
told: points that the ledger knows are asked again as they were, and their results are in the store.
"""

from __future__ import annotations

import os
import time
import uuid
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import wraps
from pathlib import Path
from types import MappingProxyType
from typing import Any, Concatenate, ParamSpec, TypeVar, get_args
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
from optuna.trial import FrozenTrial, TrialState, create_trial

from air_core.flat import trial_keys
from orchestrator.ledger import JOURNAL_REMEDY, Ledger, mend_lines
from orchestrator.plan import Plan
from orchestrator.space import (
    Point,
    applies,
    default_params,
    grid_points,
    point_count,
    study_name,
)
from orchestrator.studies import Carried, StudiesAway, searches
from orchestrator.sweep import JOURNAL, Cell, Dimension, Search

TRIES = 8  # at a point that was not asked before: one that was has nothing new to tell
STARTUP_POINTS = 4  # of TPE below 30 points; its own default of 10 would leave little to model


def open_storage(path: Path) -> JournalStorage:
    """The studies of one sweep. Call it only as the sweep's one driver.

    A killed driver may have left half a line or the lock of the journal; both are removed.

    Raises:
        ValueError: the journal is damaged.
    """
    mend_lines(path)
    Path(f"{path}.lock").unlink(missing_ok=True)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        return JournalStorage(JournalFileBackend(str(path)))
    except (ValueError, LookupError, TypeError) as problem:
        raise ValueError(f"{path} is damaged ({problem}); {JOURNAL_REMEDY}") from problem


# Seconds for which a database that does not answer in mid-run is asked again and again.
PATIENCE = ("AIRSWEEP_STUDIES_SECONDS", 30.0)
# What people get wrong; all else may pass by itself.
MISTAKES = ("authentication failed", "no password supplied", "does not exist", "permission denied")


def open_database(uri: str) -> RDBStorage:
    """The studies of a team.

    A driver holds one connection while it asks or tells a round, and none while trials run.

    Args:
        uri: `postgresql://...` without a password; libpq looks for one in PGPASSWORD, PGPASSFILE
            and ~/.pgpass.

    Raises:
        ValueError: it lets us not in, or there is no such database.
        StudiesAway: it does not answer.
    """
    from sqlalchemy.exc import DBAPIError

    optuna.logging.set_verbosity(optuna.logging.ERROR)
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
                    f"the studies' database {place_of_database(uri)} lets us not in ({said}); set "
                    "PGPASSWORD or write ~/.pgpass, and see that the database is there and yours"
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
    plan: Plan, ledger: Ledger, journal: Path, owner: tuple[str, ...] = ()
) -> dict[str, CellSearch]:
    """A search for each cell that has a space. Call it only as the sweep's one driver.

    What a study takes over is in the ledger before the study is fed.

    Args:
        journal: where studies are that are in no database.
        owner: store, project and sweep; tells apart the studies of a database.
    """
    search = plan.sweep.search
    assert search is not None
    searched = [cell for cell in plan.cells if cell.space]
    for cell in searched:
        starts = plan.openings.get(cell.id)
        if starts is not None:
            ledger.append(
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
    found = searches(ledger)
    if search.storage == JOURNAL:
        storage: BaseStorage = open_storage(journal)
        prefix = ""
    else:
        storage = open_database(search.storage)
        prefix = f"{_own_name(ledger, owner)}/"
    return {
        cell.id: CellSearch(
            cell,
            search,
            storage,
            found.carried.get(study_name(cell, search), ()),
            asked=found.asked.get(study_name(cell, search), {}),
            prefix=prefix,
        )
        for cell in searched
    }


def _own_name(ledger: Ledger, owner: tuple[str, ...]) -> str:
    """What the studies of this sweep begin with in a database that many share.

    A sweep that was removed and starts again, and a copy of a store, have a name of their own:
    what their ledger knows is asked again under it.
    """
    for event in ledger.events():
        if event["event"] == "studies_named" and event["owner"] == list(owner):
            return str(event["name"])
    name = "/".join([*owner[1:], uuid.uuid4().hex[:8]])
    ledger.append("studies_named", owner=list(owner), name=name)
    return name


Args = ParamSpec("Args")
Result = TypeVar("Result")


def _patiently(
    work: Callable[Concatenate[CellSearch, Args], Result],
) -> Callable[Concatenate[CellSearch, Args], Result]:
    """Again, where a database has not answered: what was half asked is dropped first."""

    @wraps(work)
    def tried(search: CellSearch, /, *args: Args.args, **options: Args.kwargs) -> Result:
        if search.search.storage == JOURNAL:
            return work(search, *args, **options)
        from sqlalchemy.exc import DBAPIError

        deadline = time.monotonic() + float(os.environ.get(*map(str, PATIENCE)))
        wait = 0.0
        while True:
            try:
                if wait:
                    search._open_study()
                result = work(search, *args, **options)
                search._rest()
                return result
            except (StorageInternalError, DBAPIError) as error:
                wait = min(max(1.0, 2 * wait), 15.0)
                if time.monotonic() + wait > deadline:
                    raise StudiesAway(_away(search.search.storage, _last_line(error))) from error
            time.sleep(wait)

    return tried


class CellSearch:
    """The points of one cell, round after round.

    Args:
        carried: points of earlier studies, in the order in which they were carried into this one.
        sampler: makes the sampler of one ask from its seed.
        asked: points that the ledger knows, by number. Those that the study lacks are asked as
            they were.
        prefix: of the study's name in a storage that sweeps share.
    """

    def __init__(
        self,
        cell: Cell,
        search: Search,
        storage: BaseStorage,
        carried: Sequence[Carried] = (),
        sampler: Callable[[Search, int], BaseSampler] | None = None,
        *,
        asked: Mapping[int, Mapping[str, Any]] = MappingProxyType({}),
        prefix: str = "",
    ) -> None:
        self.cell, self.search = cell, search
        self._sampler = sampler or make_sampler
        self._known = {number: dict(params) for number, params in asked.items()}
        self._carried, self._storage = carried, storage
        self._name = prefix + study_name(cell, search)
        self._open()

    def _open_study(self) -> None:
        self.study = optuna.create_study(
            study_name=self._name,
            storage=self._storage,
            direction="maximize",
            load_if_exists=True,
        )
        self._drop_half_points()

    @_patiently
    def _open(self) -> None:
        self._open_study()
        self._take_over(self._carried)
        # What earlier runs have told comes first. A point that failed is tried again, once; one
        # that lacks trials (there is a new seed) gets them; the rest is in the store.
        told = [trial for trial in self._asked() if trial.state.is_finished()]
        points = [replace(_point(trial), told=True) for trial in told]
        self._earlier = [point for point in points if point.number < self._total()]

    def _rest(self) -> None:
        """Let the connection go, of which trials have no need."""
        if isinstance(self._storage, RDBStorage):
            self._storage.engine.dispose()

    @_patiently
    def next_round(self) -> list[Point]:
        """The points of the next round, those that a killed driver had asked among them; empty
        when the cell has had all its points, or `patience` is at its end."""
        if self._earlier:
            return list(self._earlier)
        asked = self._asked()
        points = [_point(trial) for trial in asked if trial.state == TrialState.RUNNING]
        if not points and self._exhausted():
            return []
        # A round that a killed driver has told in part is still that round.
        first = points[0].number if points else len(asked)
        end = min((first // self.search.width + 1) * self.search.width, self._total())
        return points + [self._ask(number) for number in range(len(asked), end)]

    @_patiently
    def tell_round(
        self,
        values: Mapping[int, float | None],
        stopped: Mapping[int, tuple[int, float]] = MappingProxyType({}),
    ) -> None:
        """What became of the points of a round.

        Args:
            values: objectives by point number; None: the point failed.
            stopped: points that were pruned: after which iteration, and their objective there.
        """
        mended = {trial.user_attrs.get("mends") for trial in self._trials()}
        for trial in self._asked():
            number = trial.user_attrs["point"]
            if number in stopped and trial.state == TrialState.RUNNING:
                rung, reached = stopped[number]
                if rung not in trial.intermediate_values:  # else a killed driver has said it
                    # Optuna has no other way to a trial that an earlier process asked.
                    optuna.Trial(self.study, trial._trial_id).report(reached, rung)
                self.study.tell(trial.number, state=TrialState.PRUNED)
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

    def _exhausted(self) -> bool:
        """Were the last `patience` points that this study asked all no better than one before?"""
        if self.search.patience is None:
            return False
        values = self._values()
        best = max(values, key=lambda number: (values[number], -number), default=-1)
        own = [t.user_attrs["point"] for t in self._asked() if "carried" not in t.user_attrs]
        return len([number for number in own if number > best]) >= self.search.patience

    def _values(self) -> dict[int, float]:
        """What is known, by point number; a point that failed and was mended is among it."""
        found = {}
        for trial in self._trials():
            number = trial.user_attrs.get("point", trial.user_attrs.get("mends"))
            if number is None or number >= self._total() or trial.state != TrialState.COMPLETE:
                continue  # a pruned one has the value of its rung
            assert trial.value is not None
            found[number] = trial.value
        return found

    def _take_over(self, carried: Sequence[Carried]) -> None:
        """Add what is carried and not here yet. The first point stays the default."""
        there = {trial.user_attrs.get("carried") for trial in self._trials()}
        for index, one in enumerate(carried):
            if index in there:
                continue
            first = 0 if one.params == default_params(self.cell) else 1
            own = [number for number, params in self._known.items() if params == one.params]
            number = own[0] if own else max(self._known, default=first - 1) + 1
            while len(self._asked()) < number:
                self._ask(len(self._asked()))
            dimensions = [d for d in self.cell.space if d.key in one.params]
            self.study.add_trial(
                create_trial(
                    params=one.params,
                    distributions={d.key: _distribution(d) for d in dimensions},
                    value=one.value,
                    user_attrs={"point": len(self._asked()), "carried": index},
                )
            )

    def _ask(self, number: int) -> Point:
        """A point that was not asked before, unless the space seems to hold no other."""
        settled = self._settled(number)
        known = [trial.params for trial in self._asked()]
        for attempt in range(TRIES):
            trial, params = self._draw(number, attempt, settled)
            if settled or params not in known or attempt == TRIES - 1:
                break
            self.study.tell(trial.number, state=TrialState.FAIL)
        trial.set_user_attr("point", number)  # from here on the point is whole
        return Point(number, params)

    def _draw(
        self, number: int, attempt: int, settled: Mapping[str, Any]
    ) -> tuple[optuna.Trial, dict[str, Any]]:
        # A sampler's state is not stored: seed every ask by where it stands.
        round_index, place = divmod(number, self.search.width)
        words = f"{self.search.seed}/{self.cell.id}/{round_index}/{place}"
        seed = zlib.crc32((f"{words}/{attempt}" if attempt else words).encode())
        # One that keeps to its favourite point is helped by chance.
        stuck = attempt >= TRIES // 2
        self.study.sampler = RandomSampler(seed=seed) if stuck else self._sampler(self.search, seed)
        if settled:
            self.study.enqueue_trial(dict(settled))
        trial = self.study.ask()
        params: dict[str, Any] = {}
        for dimension in self.cell.space:
            if applies(dimension, self.cell.flat | params):
                params[dimension.key] = _suggest(trial, dimension)
        return trial, params

    def _settled(self, number: int) -> dict[str, Any]:
        """Points that no sampler chooses: all of a grid; what the ledger knows; the default, which
        comes first."""
        if self.search.sampler == "grid":
            return grid_points(self.cell)[number]
        if number in self._known:
            return self._known[number]
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
    optuna.logging.set_verbosity(optuna.logging.ERROR)
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


def _point(trial: FrozenTrial) -> Point:
    return Point(trial.user_attrs["point"], dict(trial.params))

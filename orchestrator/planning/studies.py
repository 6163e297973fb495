"""State of a sweep's searches, read from the event log, and edits of a sweep. Uses no sampler.

A changed search space starts a new study. Points of earlier studies of the sweep that lie in the
new space are carried into the new study: its sampler uses them, and they count as points. The event
log has the settings of these points, and the store has their objectives. The carried points are
logged before the study uses them, so that a driver that resumes the sweep carries the same points.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from air_core.specs import TrialSpec
from air_core.specs.flat import trial_keys
from orchestrator.keys import digest
from orchestrator.planning.resolve import Resolver
from orchestrator.spec import Cell, SweepSpec
from orchestrator.spec.space import (
    contains_value,
    default_params,
    point_count,
    study_name,
)
from orchestrator.spec.sweep import Search, computation_of
from orchestrator.store import ArtifactStore, EventLog


@dataclass(frozen=True)
class CarriedPoint:
    """A point of an earlier study that lies in the space of the new study."""

    params: dict[str, Any]
    value: float  # by the objective of the new study


@dataclass(frozen=True)
class StudyStart:
    """The start of a study: a new one, or one that an edit of the sweep file brings back."""

    study: str
    carried: tuple[CarriedPoint, ...]
    left_out: int  # earlier points that are outside the new space or have no objective


@dataclass
class Searches:
    """State of all searches of a sweep."""

    opened: dict[str, Mapping[str, Any]] = field(default_factory=dict)  # last event by study
    current: dict[str, str] = field(default_factory=dict)  # study by cell
    # Settings by study and point.
    suggested: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)
    # Objectives by study and point, in the order of their end; None: the point failed.
    values: dict[str, dict[int, float | None]] = field(default_factory=dict)
    carried: dict[str, list[CarriedPoint]] = field(default_factory=dict)  # by study
    ended: dict[str, Mapping[str, Any]] = field(default_factory=dict)  # by patience; event by study

    def points(self, cell: Cell, search: Search | None) -> int:
        """Number of points of a cell over all runs; fewer than configured if patience ended it."""
        count, end = point_count(cell, search), self.ended.get(_study(cell, search))
        if search is None or end is None or end["patience"] != search.patience:
            return count
        return min(count, int(end["points"]))

    def record_round(self, study: str, values: Mapping[int, float | None]) -> None:
        """Record the objectives of a round; None: failed. None is replaced by a value."""
        recorded = self.values.setdefault(study, {})
        for number, value in sorted(values.items()):
            if number not in recorded or (recorded[number] is None and value is not None):
                recorded.pop(number, None)  # move it to the end of the order
                recorded[number] = value

    def carried_points(
        self, cell: Cell, search: Search | None, start: StudyStart | None
    ) -> list[dict[str, Any]]:
        """Settings of the points that a study has carried, or will carry at its start."""
        carried = self.carried.get(_study(cell, search), ())
        return [point.params for point in (*carried, *(start.carried if start else ()))]

    def known_points(self, cell: Cell, search: Search, start: StudyStart | None) -> dict[int, Any]:
        """Settings of the suggested and the carried points of a cell, by number.

        Carried points without a number get the next free numbers.
        """
        suggested = self.suggested.get(study_name(cell, search), {})
        carried = self.carried_points(cell, search, start)
        new = [params for params in carried if params not in suggested.values()]
        first = 0 if new and new[0] == default_params(cell) else 1  # number 0 is the default
        return suggested | dict(enumerate(new, max(suggested, default=first - 1) + 1))


def _study(cell: Cell, search: Search | None) -> str:
    """The name of a cell's study; empty if the cell is not searched."""
    return study_name(cell, search) if search is not None and cell.space else ""


def read_searches(event_log: EventLog) -> Searches:
    """Read the state of a sweep's searches from its event log."""
    state = Searches()
    for event in event_log.events():
        if "study" in event and "cell" in event:
            state.current[event["cell"]] = event["study"]
        match event["event"]:
            case "study_opened":
                study = event["study"]
                state.opened.pop(study, None)
                state.opened[study] = event
                carried = [CarriedPoint(each["params"], each["value"]) for each in event["carried"]]
                state.carried.setdefault(study, []).extend(carried)
            case "point_asked":
                study = event["study"]
                state.suggested.setdefault(study, {})[event["point"]] = event["params"]
                if event["point"] >= state.ended.get(study, {}).get("points", math.inf):
                    # A failed point was repeated with success, and the search resumed.
                    del state.ended[study]
            case "round_told":
                values = {int(number): value for number, value in event["values"].items()}
                study = state.current.get(event["cell"], "")
                state.record_round(study, values)
            case "search_ended":
                state.ended[event["study"]] = event
    return state


# ---------------------------------------------------------------- points of earlier studies


def study_start(
    cell: Cell,
    search: Search,
    current: Collection[str],
    state: Searches,
    assignments: Sequence[Mapping[str, int]],
    resolver: Resolver,
    store: ArtifactStore,
) -> StudyStart | None:
    """The start of a cell's study, with the points it carries.

    Args:
        current: studies of all cells of the sweep; these do not carry points into each other.

    Returns:
        None if the study exists and no other study was opened after it.
    """
    study = study_name(cell, search)
    order = list(state.opened)
    later = order[order.index(study) + 1 :] if study in state.opened else order
    # A user who changes the sampler or its seed wants a new set of points.
    wanted = (cell.method, search.sampler, search.seed)
    events = [state.opened[name] for name in later if name not in current]
    sources = [e for e in events if (e["method"], e["sampler"], e["seed"]) == wanted]
    if study in state.opened and not sources:
        return None
    known = [*state.suggested.get(study, {}).values()]
    known += [point.params for point in state.carried.get(study, ())]
    carried: list[CarriedPoint] = []
    seen: set[TrialSpec] = set()
    left_out = 0
    for settings in _settings(sources, state):
        computation = computation_of(settings)
        if computation in seen:
            continue
        seen.add(computation)
        params = _as_point(cell, settings, computation)
        if params is None:
            left_out += 1
        elif params not in known:
            value = _objective(cell, params, search.objective, assignments, resolver, store)
            if value is None:
                left_out += 1
            else:
                known.append(params)
                carried.append(CarriedPoint(params, value))
    default = default_params(cell)  # the first point of every study
    carried.sort(key=lambda point: point.params != default)
    return StudyStart(study, tuple(carried), left_out)


def _settings(sources: Iterable[Mapping[str, Any]], state: Searches) -> Iterator[dict[str, Any]]:
    """Settings of all points of earlier studies, in the order of their suggestion."""
    for event in sources:
        study = event["study"]
        points = [params for _, params in sorted(state.suggested.get(study, {}).items())]
        for params in [*points, *(point.params for point in state.carried.get(study, ()))]:
            yield {**event["settings"], **params}


def _as_point(cell: Cell, settings: Mapping[str, Any], computation: TrialSpec) -> Any:
    """Express settings as a point of a cell's space; None if the space does not hold them."""
    params: dict[str, Any] = {}
    for dimension in cell.space:
        value = settings.get(dimension.key, trial_keys()[dimension.key].default)
        if not contains_value(dimension, value):
            return None
        params[dimension.key] = value
    return params if computation_of({**cell.flat, **params}) == computation else None


def _objective(
    cell: Cell,
    params: Mapping[str, Any],
    objective: str,
    assignments: Sequence[Mapping[str, int]],
    resolver: Resolver,
    store: ArtifactStore,
) -> float | None:
    """The mean objective of a point over its stored trials; None if the store has none.

    A point keeps its value when the sweep gets another seed, so trials may be missing.
    """
    trials = [resolver.trial({**cell.flat, **params, **seeds}) for seeds in assignments]
    records = [store.record(spec) for spec in trials if store.has(spec)]
    values = [record["info"]["objectives"].get(objective) for record in records]
    finite = [value for value in values if value is not None and math.isfinite(value)]
    return fmean(finite) if finite else None


# ---------------------------------------------------------------- edited files


@dataclass(frozen=True)
class Edit:
    """The effect of an edited sweep file on the sweep's trials."""

    kept: int  # trials of this sweep that are still part of it
    reused: int  # other trials that the store has
    added: int  # trials to run
    dropped: int  # trials of this sweep that are no longer part of it
    carried: int  # searched points that lie in the new space, and count
    left_out: int  # searched points that do not

    def __str__(self) -> str:
        text = f"edited: keeps {self.kept} trials, reuses {self.reused}, adds {self.added}"
        if self.dropped:
            text += f"; drops {self.dropped} that are no longer part of the sweep"
        if self.carried or self.left_out:
            text += f"; of the searched points {self.carried} fit the new space and count, "
            text += f"{self.left_out} do not"
        return text


def request_digest(sweep: SweepSpec, cells: Sequence[Cell]) -> str:
    """Digest of the trials of a sweep; comments and resources in its file do not change it."""
    search = sweep.search
    studies = [study_name(c, search) if search and c.space else [c.id, c.flat] for c in cells]
    points = search.points if search else 1
    return digest([studies, points, list(sweep.seeds.assignments())])


def edit_since_last_run(
    request: str,
    present: Sequence[str],
    ready: int,
    total: int,
    starts: Iterable[StudyStart],
    event_log: EventLog,
) -> Edit | None:
    """The effect of an edit since the last run; None if the requested trials are the same.

    Args:
        request: from `request_digest`.
        present: keys of the requested trials that the store has.
        ready: number of requested trials that need not run.
        total: number of requested trials.
    """
    last_request, own = None, set()  # of the last run; keys of the trials of all runs
    for event in event_log.events():
        if event["event"] == "sweep_started":
            last_request = event.get("asks")
        elif event["event"] in ("trial_done", "trial_reused"):
            own.add(event["key"])
    if last_request in (None, request):
        return None
    kept = sum(key in own for key in present)
    starts = list(starts)
    return Edit(
        kept=kept,
        reused=len(present) - kept,
        added=total - ready,
        dropped=len(own.difference(present)),
        carried=sum(len(start.carried) for start in starts),
        left_out=sum(start.left_out for start in starts),
    )

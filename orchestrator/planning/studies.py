"""What a sweep's searches asked, and what an edited one takes over. Knows no sampler.

A changed space is a new study. What earlier studies of the sweep were told, and is a point of the
new space, is carried into it: the sampler knows it and it counts. The ledger says which points
there were, the store what they were worth; what is carried is written to the ledger before the
study is fed, so that a killed driver's successor feeds the same.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from air_core.flat import from_flat, trial_keys
from air_core.normal import normalised
from air_core.specs import TrialSpec
from orchestrator.keys import digest
from orchestrator.planning.resolve import Resolver
from orchestrator.spec import Cell, SweepSpec
from orchestrator.spec.presets import named_refs
from orchestrator.spec.space import applies, default_params, holds, point_count, study_name
from orchestrator.spec.sweep import Search
from orchestrator.store import ArtifactStore, EventLog


@dataclass(frozen=True)
class Carried:
    """A point of an earlier study that is one of the new study too."""

    params: dict[str, Any]
    value: float  # of the new study's objective


@dataclass(frozen=True)
class Opening:
    """A study that starts, or one that an earlier file had and that comes back."""

    study: str
    carried: tuple[Carried, ...]
    left_out: int  # earlier points that are none of the new space, or were never computed


@dataclass(frozen=True)
class Pruned:
    """A point that was stopped: after which iteration, and with which objective."""

    rung: int
    value: float


@dataclass
class Searches:
    """The ledger, folded."""

    opened: dict[str, Mapping[str, Any]] = field(default_factory=dict)  # by study, last one last
    current: dict[str, str] = field(default_factory=dict)  # study by cell
    asked: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)
    # Objectives by study and point, as they ended; None: it failed, or was pruned.
    told: dict[str, dict[int, float | None]] = field(default_factory=dict)
    carried: dict[str, list[Carried]] = field(default_factory=dict)
    ended: dict[str, Mapping[str, Any]] = field(default_factory=dict)  # by patience
    # Objectives by study, rung and point, where it was settled who goes on.
    rungs: dict[str, dict[int, dict[int, float]]] = field(default_factory=dict)
    pruned: dict[str, dict[int, Pruned]] = field(default_factory=dict)  # by study and point

    def points(self, cell: Cell, search: Search | None) -> int:
        """Points of a cell, over all resumes: fewer than asked for where patience ended it."""
        count = point_count(cell, search)
        if search is None or not cell.space:
            return count
        end = self.ended.get(study_name(cell, search))
        return min(count, end["points"]) if end and end["patience"] == search.patience else count

    def decide(
        self, study: str, rung: int, values: Mapping[str, float], pruned: Iterable[int]
    ) -> None:
        """Note who stopped at a rung.

        Args:
            values: objectives of all points that were compared, by number, as JSON has them.
        """
        numbered = {int(number): value for number, value in values.items()}
        self.rungs.setdefault(study, {}).setdefault(rung, {}).update(numbered)
        stopped = {number: Pruned(rung, numbered[number]) for number in pruned}
        self.pruned.setdefault(study, {}).update(stopped)

    def pruned_of(self, cell: Cell, search: Search | None) -> Mapping[int, Pruned]:
        """Points of a cell that were stopped, by number."""
        if search is None or not cell.space:
            return {}
        return self.pruned.get(study_name(cell, search), {})

    def rungs_left(
        self, cell: Cell, search: Search | None, number: int, iterations: int
    ) -> list[int]:
        """The rungs at which a point is still to be compared.

        Args:
            iterations: of its trials; after the last one they have their results.
        """
        if search is None or not cell.space:
            return []
        decided = self.rungs.get(study_name(cell, search), {})
        return [
            rung
            for rung in search.rungs
            if rung < iterations and number not in decided.get(rung, {})
        ]

    def carried_into(self, cell: Cell, search: Search | None, opening: Opening | None) -> list[Any]:
        """Settings of the points that a study took, or will take, from earlier ones."""
        if search is None or not cell.space:
            return []
        every = [
            *self.carried.get(study_name(cell, search), ()),
            *(opening.carried if opening else ()),
        ]
        return [one.params for one in every]

    def known(self, cell: Cell, search: Search, opening: Opening | None) -> dict[int, Any]:
        """What was asked and what is carried and was not asked yet, by number.

        The numbers of the latter are settled when the study is fed.
        """
        study = study_name(cell, search)
        known = dict(self.asked.get(study, {}))
        carried = self.carried_into(cell, search, opening)
        waiting = [params for params in carried if params not in known.values()]
        first = 0 if waiting and waiting[0] == default_params(cell) else 1  # 0 is the default
        return known | dict(enumerate(waiting, max(known, default=first - 1) + 1))


def searches(event_log: EventLog) -> Searches:
    """Fold the ledger."""
    found = Searches()
    for event in event_log.events():
        if "study" in event and "cell" in event:
            found.current[event["cell"]] = event["study"]
        match event["event"]:
            case "study_opened":
                study = event["study"]
                found.opened.pop(study, None)
                found.opened[study] = event
                carried = [Carried(one["params"], one["value"]) for one in event["carried"]]
                found.carried.setdefault(study, []).extend(carried)
            case "point_asked":
                study = event["study"]
                found.asked.setdefault(study, {})[event["point"]] = event["params"]
                if event["point"] >= found.ended.get(study, {}).get("points", math.inf):
                    del found.ended[study]  # a point that failed was mended: it went on
            case "round_told":
                told = found.told.setdefault(found.current.get(event["cell"], ""), {})
                values = {int(number): value for number, value in event["values"].items()}
                for number in sorted({*values, *event.get("pruned", ())}):
                    value = values.get(number)
                    if number not in told or (told[number] is None and value is not None):
                        told.pop(number, None)  # one that failed ends now
                        told[number] = value
            case "rung_decided":
                found.decide(event["study"], event["rung"], event["values"], event["pruned"])
            case "search_ended":
                found.ended[event["study"]] = event
    return found


def opening(
    cell: Cell,
    search: Search,
    current: Collection[str],
    found: Searches,
    assignments: Sequence[Mapping[str, int]],
    resolver: Resolver,
    store: ArtifactStore,
) -> Opening | None:
    """What the study of a cell starts with; None: it goes on where it stood.

    Args:
        current: the studies of all cells of the sweep; they take nothing from each other.
    """
    study = study_name(cell, search)
    order = list(found.opened)
    after = order[order.index(study) + 1 :] if study in found.opened else order
    before = [found.opened[name] for name in after if name not in current]
    before = [event for event in before if _same_search(event, cell, search)]
    if study in found.opened and not before:
        return None
    known = [*found.asked.get(study, {}).values()]
    known += [one.params for one in found.carried.get(study, ())]
    carried: list[Carried] = []
    seen: set[TrialSpec] = set()
    left_out = 0
    for settings in _settings(before, found):
        computation = _computation(settings)
        if computation in seen:
            continue
        seen.add(computation)
        params = _fitted(cell, settings, computation)
        if params is None:
            left_out += 1
        elif params not in known:
            value = _value(cell, params, search.objective, assignments, resolver, store)
            if value is None:
                left_out += 1
            else:
                known.append(params)
                carried.append(Carried(params, value))
    default = default_params(cell)  # the first point of every study
    carried.sort(key=lambda one: one.params != default)
    return Opening(study, tuple(carried), left_out)


def _same_search(event: Mapping[str, Any], cell: Cell, search: Search) -> bool:
    # Another sampler or seed asks for points of its own: that is what it was changed for.
    return (event["method"], event["sampler"], event["seed"]) == (
        cell.method,
        search.sampler,
        search.seed,
    )


def _settings(before: Iterable[Mapping[str, Any]], found: Searches) -> Iterator[dict[str, Any]]:
    """Every setting of points of earlier studies, in the order in which they were asked."""
    for event in before:
        study = event["study"]
        asked = [params for _, params in sorted(found.asked.get(study, {}).items())]
        for params in [*asked, *(one.params for one in found.carried.get(study, ()))]:
            yield {**event["settings"], **params}


def _fitted(cell: Cell, settings: Mapping[str, Any], computation: TrialSpec) -> Any:
    """Settings as a point of a cell's space; None: they are none."""
    params: dict[str, Any] = {}
    for dimension in cell.space:
        if not applies(dimension, cell.flat | params):
            continue
        value = settings.get(dimension.key, trial_keys()[dimension.key].default)
        if not holds(dimension, value):
            return None
        params[dimension.key] = value
    return params if _computation({**cell.flat, **params}) == computation else None


def _computation(settings: dict[str, Any]) -> TrialSpec:
    """The same for settings that compute the same, whatever cannot matter."""
    return normalised(from_flat(settings, named_refs(settings), ()))


def _value(
    cell: Cell,
    params: Mapping[str, Any],
    objective: str,
    assignments: Sequence[Mapping[str, int]],
    resolver: Resolver,
    store: ArtifactStore,
) -> float | None:
    """The mean objective over the runs that are there: a new seed must not make it unknown."""
    trials = [resolver.trial({**cell.flat, **params, **seeds}) for seeds in assignments]
    records = [store.record(spec) for spec in trials if store.has(spec)]
    values = [record["info"]["objectives"].get(objective) for record in records]
    found = [value for value in values if value is not None and math.isfinite(value)]
    return fmean(found) if found else None


# ---------------------------------------------------------------- edited files


@dataclass(frozen=True)
class Edit:
    """What becomes of a sweep's trials when its file has changed."""

    kept: int  # trials that this sweep has and still asks for
    reused: int  # others that are there already
    added: int  # to run
    dropped: int  # trials that are no longer asked for
    carried: int  # points of a search that are points of the new space, and count
    left_out: int  # points that are not

    def __str__(self) -> str:
        text = f"edited: keeps {self.kept} trials, reuses {self.reused}, adds {self.added}"
        if self.dropped:
            text += f"; {self.dropped} are no longer asked for"
        if self.carried or self.left_out:
            text += f"; of the points searched so far {self.carried} fit the new space and count"
            text += f", {self.left_out} do not"
        return text


def request_digest(sweep: SweepSpec, cells: Sequence[Cell]) -> str:
    """A digest of the trials that a sweep asks for: a comment or a budget changes nothing."""
    search = sweep.search
    studies = [study_name(c, search) if search and c.space else [c.id, c.flat] for c in cells]
    points = search.points if search else 1
    return digest([studies, points, list(sweep.seeds.assignments())])


def edit_of(
    asks: str,
    there: Sequence[str],
    ready: int,
    total: int,
    openings: Iterable[Opening],
    event_log: EventLog,
) -> Edit | None:
    """What becomes of a sweep's trials; None: its file asks for what it asked for before.

    Args:
        asks: from `what_it_asks`.
        there: keys of trials that are asked for and in the store.
        ready: how many of all that are asked for need not be run.
    """
    if _asked_before(event_log) in (None, asks):
        return None
    ended = ("trial_done", "trial_reused")
    own = {event["key"] for event in event_log.events() if event["event"] in ended}
    kept = sum(key in own for key in there)
    openings = list(openings)
    return Edit(
        kept=kept,
        reused=ready - kept,
        added=total - ready,
        dropped=len(own.difference(there)),
        carried=sum(len(one.carried) for one in openings),
        left_out=sum(one.left_out for one in openings),
    )


def _asked_before(event_log: EventLog) -> str | None:
    """The same of the sweep's last run."""
    starts = [event for event in event_log.events() if event["event"] == "sweep_started"]
    return starts[-1].get("asks") if starts else None

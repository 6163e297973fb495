"""The ledger of a sweep: its slots as the last run planned them, and the state of each.

The driver writes it when a run starts. Commands that show results read it, and neither the sweep
file, its plugins, its datasets nor its models. Points that a search suggests later are in the event
log.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any

from air_core.settings import Ref
from air_core.tools.seal import sealed_json
from orchestrator.keys import ArtifactKey, from_plain
from orchestrator.planning.history import RESULT_STATES, History, ResultState, read_history
from orchestrator.spec import Cell
from orchestrator.store import ArtifactStore, SweepLocation
from orchestrator.store.verification import read_written

LEDGER = "ledger.json"
# By the first 12 digits of an artifact's key: the artifact that replaces it, if there is one.
Needs = dict[str, ArtifactKey | None]


@dataclass(frozen=True)
class About:
    """What tables and screens say of a sweep beside its trials.

    Attributes:
        objective: of the search, if there is one.
        runs: of a point, one for each assignment of seeds.
        vary: keys of the seeds.
        grid: keys of the grid, with the values that the run has.
        space: searched keys.
    """

    name: str
    question: str = ""
    options: str = ""
    source: str = ""
    digest: str = ""  # of the file's text
    objective: str | None = None
    runs: int = 1
    vary: tuple[str, ...] = ("seed",)
    grid: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    space: tuple[str, ...] = ()
    is_smoke: bool = False
    reads_images: bool = False


@dataclass(frozen=True)
class Slot:
    """One trial of a sweep: a cell, a point and seeds. Several slots may share a key."""

    id: str
    cell: Cell
    point: int
    params: Mapping[str, Any]
    seeds: Mapping[str, int]
    key: ArtifactKey
    uses_seed: bool  # whether trials that differ in the seed alone are different computations

    @property
    def settings(self) -> dict[str, Any]:
        """All settings, by their dotted names, also those without effect."""
        return {**self.cell.flat, **self.params, **self.seeds}


@dataclass(frozen=True)
class Data:
    """A dataset of a sweep: its content, classes, and the artifacts of its features."""

    ref: Ref
    classnames: tuple[str, ...]
    features: tuple[ArtifactKey, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """The slots of a sweep whose point is known, with the states that event log and store have.

    Attributes:
        points: number of points of each cell, over all runs; a search suggests some during the run.
        studies: names of the cells' searches; empty without one.
        data: by the name that cells have.
        alive: whether a driver runs the sweep.
        has_result: keys with a result in the store.
        needs: what each cell reads, also cells that the options of the run left out.
    """

    about: About
    cells: tuple[Cell, ...]
    points: dict[str, int]
    studies: dict[str, str]
    slots: tuple[Slot, ...]
    data: dict[str, Data]
    history: History
    alive: bool
    has_result: frozenset[str]
    needs: Mapping[str, Needs] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Number of trials, with those of points that are not known yet."""
        return sum(self.points.values()) * self.about.runs

    @cached_property
    def states(self) -> dict[str, str]:
        """State of each slot: one of RESULT_STATES, failed, running or waiting."""
        self.history.assign({slot.id: slot.key.digest for slot in self.slots})
        return {slot.id: self._state(slot) for slot in self.slots}

    def _state(self, slot: Slot) -> str:
        if self.alive and slot.id in self.history.started:
            return "running"
        if slot.key.digest in self.has_result:
            return self.history.result(slot.id, slot.key.digest)
        failed = self.history.ended(slot.id, slot.key.digest) == "failed"
        return "failed" if failed else "waiting"

    @property
    def features(self) -> list[tuple[str, ArtifactKey]]:
        """The features of datasets, with the names of these."""
        return [(data.ref.name, key) for data in self.data.values() for key in data.features]

    def tested(self, slot: Slot) -> Data:
        """The dataset whose test images a slot has."""
        settings = slot.settings
        return self.data[settings.get("test_dataset") or settings["dataset"]]

    @property
    def counts(self) -> dict[str, int]:
        """Number of trials by state."""
        found = Counter(self.states.values())
        ended = {state: found[state] for state in (*RESULT_STATES, "failed", "running")}
        return {**ended, "waiting": self.total - sum(ended.values())}

    @cached_property
    def results(self) -> dict[ResultState, int]:
        """Number of trials that need not run, by state; of those with one key, one must run."""
        left = [slot for slot in self.slots if self.states[slot.id] not in RESULT_STATES]
        counts = self.counts
        results = {state: counts[state] for state in RESULT_STATES}
        results["shared"] += len(left) - len({slot.key for slot in left})
        return results

    @property
    def to_run(self) -> int:
        return self.total - sum(self.results.values())

    @cached_property
    def left(self) -> dict[str, int]:
        """Number of trials to run, by cell."""
        left = {cell: points * self.about.runs for cell, points in self.points.items()}
        running: set[str] = set()
        for slot in self.slots:
            key = slot.key.digest
            left[slot.cell.id] -= self.states[slot.id] in RESULT_STATES or key in running
            running.add(key)
        return left

    @property
    def removed(self) -> int:
        """Number of results that the event log has and the store does not."""
        return sum(slot.key.digest not in self.has_result for slot in self._logged())

    @property
    def ended(self) -> int:
        """Number of trials whose result event log and store have."""
        return sum(slot.key.digest in self.has_result for slot in self._logged())

    def _logged(self) -> Iterator[Slot]:
        for slot in self.slots:
            if self.history.ended(slot.id, slot.key.digest) in ("done", "reused"):
                yield slot

    @property
    def failures(self) -> dict[str, Mapping[str, Any]]:
        """The last event of each failed slot."""
        failed = (slot for slot, state in self.states.items() if state == "failed")
        return {slot: self.history.outcomes[slot] for slot in failed}


def results_in(store: ArtifactStore, slots: Sequence[Slot]) -> frozenset[str]:
    """Digests of the keys of slots whose trial the store has."""
    keys = {slot.key.digest: slot.key for slot in slots}
    store.survey(keys.values())
    return frozenset(digest for digest, key in keys.items() if store.has(key))


# ---------------------------------------------------------------- the file


@dataclass(frozen=True)
class LedgerFile:
    """The content of the file; states are in event log and store."""

    about: About
    cells: tuple[Cell, ...]
    points: dict[str, int]
    studies: dict[str, str]
    data: dict[str, Data]
    needs: dict[str, Needs]
    lines: tuple[dict[str, Any], ...]


def lines_of(slots: Iterable[Slot]) -> list[dict[str, Any]]:
    """Slots as plain data, for the file and for the event of a suggested point."""
    plain = ({f.name: getattr(slot, f.name) for f in fields(Slot)} for slot in slots)
    return [{**line, "cell": line["cell"].id, "key": asdict(line["key"])} for line in plain]


def ledger_json(ledger: Ledger, needs: dict[str, Needs]) -> bytes:
    """A ledger as a file.

    Args:
        needs: what each cell reads.
    """
    names = ("about", "cells", "points", "studies", "data")
    plain = {name: getattr(ledger, name) for name in names}
    return sealed_json(asdict(LedgerFile(**plain, needs=needs, lines=(*lines_of(ledger.slots),))))


def read_ledger(location: SweepLocation) -> Ledger:
    """Read the ledger of a sweep's last run, and the states of its slots.

    Raises:
        ValueError: the file or the event log is damaged, or the file is missing.
    """
    file, event_log = read_file(location), location.event_log()
    history = read_history(event_log)
    cells = {cell.id: cell for cell in file.cells}
    lines = {
        line["id"]: from_plain(dict, line)
        for event in history.points
        if file.studies.get(event["cell"]) == event["study"]
        for line in event["slots"]
    } | {line["id"]: line for line in file.lines}
    slots = [_slot(line, cells[line["cell"]], file.about) for line in lines.values()]
    order = {cell: index for index, cell in enumerate(cells)}
    slots.sort(key=lambda slot: (order[slot.cell.id], slot.point))
    return Ledger(
        about=file.about,
        cells=tuple(cells.values()),
        points=file.points,
        studies=file.studies,
        slots=tuple(slots),
        data=file.data,
        history=history,
        alive=event_log.is_locked(),
        has_result=results_in(location.store, slots),
        needs=file.needs,
    )


def read_file(location: SweepLocation) -> LedgerFile:
    """Read the file of a sweep's last run. Raises as `read_ledger`."""
    file = location.folder / LEDGER
    found: LedgerFile = read_written(file, lambda plain: from_plain(LedgerFile, plain))
    return found


def _slot(line: dict[str, Any], cell: Cell, about: About) -> Slot:
    # An event has its fields in another order.
    params = {d.key: line["params"][d.key] for d in cell.space if d.key in line["params"]}
    seeds = {name: line["seeds"][name] for name in about.vary}
    key = ArtifactKey(**line["key"])
    return Slot(**{**line, "cell": cell, "params": params, "seeds": seeds, "key": key})

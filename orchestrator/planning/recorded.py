"""Sweeps that a store remembers: read again as they were last run, and what each of them needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from air_core.specs import SyntheticFeaturesSpec, TrialSpec
from orchestrator.errors import StoreRefused
from orchestrator.keys import Stage, artifact_key
from orchestrator.planning.plan import (
    known_points,
    moved_slots,
    moved_trials,
    possible_trials,
    requirements_of,
    slots_of,
)
from orchestrator.planning.resolve import NotRecorded, Resolver, resolver_of
from orchestrator.planning.studies import Searches, searches
from orchestrator.spec import Cell, SweepSpec, cells_of, load_sweep
from orchestrator.spec.sweep import smoke
from orchestrator.store import ArtifactStore, SweepLocation, read_resolved, recorded_locations
from orchestrator.store.gc import Shards, StoreRequirements, SweepRequirements, merged


def read_sweep(location: SweepLocation, data_root: Path | None) -> tuple[SweepSpec, SweepLocation]:
    """A sweep as it was last run: its options then, and its inputs as they were found then.

    Raises:
        ValueError: its file does not mean anything any more.
        FileNotFoundError: it is not there.
    """
    origin = read_resolved(location)
    sweep = load_sweep(
        location.folder / "spec.yaml", sets=origin.get("sets", []), only=origin.get("only", [])
    )
    sweep = replace(sweep, source=origin.get("source", sweep.source))
    data = data_root or (Path(sweep.data_root) if sweep.data_root else None)
    location = replace(location, data_root=data, recorded=True)
    return smoke(sweep) if origin.get("smoke") else sweep, location


def refuse_running(store: ArtifactStore) -> None:
    """Nothing may be removed while a sweep runs.

    Raises:
        StoreRefused: names those that do.
    """
    busy = []
    for location in recorded_locations(store):
        busy += [f"{location.project}/{location.name}"] if location.event_log().is_locked() else []
    if busy:
        raise StoreRefused(f"{', '.join(busy)} runs in {store.root} now; wait for it, or stop it")


def all_requirements(store: ArtifactStore, data_root: Path | None) -> StoreRequirements:
    """What the recorded sweeps of a store need."""
    asked, unread = [], {}
    for location in recorded_locations(store):
        name = f"{location.project}/{location.name}"
        try:
            asked.append(SweepRequirements(name, _asked(*read_sweep(location, data_root))))
        except (ValueError, OSError) as problem:
            unread[name] = str(problem).partition("\n")[0]
    return StoreRequirements(tuple(asked), unread)


def _asked(sweep: SweepSpec, location: SweepLocation) -> dict[str, Shards]:
    """What its file asks for, and the results that its ledger says it got.

    A run with `--only` does not make the other cells less wanted. Their data may not be here; then
    it must be sure that nothing was made for them.
    """
    resolver, event_log = resolver_of(location), location.event_log()
    events = list(event_log.events())
    done = [event for event in events if event["event"] in ("trial_done", "trial_reused")]
    last = cells_of(sweep)
    run = {cell.id for cell in last} | {event["cell"] for event in done}
    known, moved = searches(event_log), moved_slots(event_log)
    found = [(event["key"][:12], frozenset[tuple[int, int]]()) for event in done]
    not_here = None
    whole = cells_of(replace(sweep, grid=sweep.axes)) if sweep.axes else ()
    for cell in (*last, *(cell for cell in whole if cell not in last)):
        try:
            found += _asked_by_cell(cell, sweep, known, moved, resolver)
        except NotRecorded:  # no run had this cell, so nothing was made for it
            continue
        except ValueError as problem:
            if cell.id in run:
                raise
            not_here = problem
    resolver.save()
    needed = merged(found)
    made = {e["key"].rpartition("-")[2] for e in events if e["event"] == "artifact_prepared"}
    if not_here is not None and made - set(needed):  # by `prepare`, perhaps for that cell
        raise not_here
    return needed


def _asked_by_cell(
    cell: Cell,
    sweep: SweepSpec,
    known: Searches,
    moved: Mapping[str, str],
    resolver: Resolver,
) -> list[tuple[str, Shards]]:
    assignments = sweep.seeds.assignments()
    found: list[tuple[str, Shards]] = []
    more: list[TrialSpec] = []
    for number, params in known_points(sweep, cell, known, None).items():
        slots = slots_of(cell, number, params, assignments, resolver, moved)
        more += moved_trials(slots, moved)
        for slot in slots:
            home = replace(slot.spec, test_dataset=None)  # a prompt that is tested elsewhere
            found += [(_place(slot.spec), frozenset()), (_place(home), frozenset())]
    for requirement in requirements_of([*possible_trials([cell], assignments, resolver), *more]):
        spec = requirement.spec
        if isinstance(spec, SyntheticFeaturesSpec):
            shards = frozenset(requirement.shards())
            found += [(_place(spec.images), shards), (_place(spec), shards)]
        else:
            found.append((_place(spec), frozenset()))
    return found


def _place(spec: Stage) -> str:
    return artifact_key(spec).digest[:12]


def computed_by(store: ArtifactStore, keys: Iterable[str], but: SweepLocation) -> Counter[str]:
    """Which other recorded sweeps computed the trials of these keys, and how many each."""
    wanted, found = set(keys), Counter[str]()
    for location in recorded_locations(store):
        if location.folder == but.folder:
            continue
        done = {e["key"] for e in location.event_log().events() if e["event"] == "trial_done"}
        found[f"{location.project}/{location.name}"] += len(done & wanted)
        wanted -= done
    return +found

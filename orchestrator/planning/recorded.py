"""Sweeps that a store has recorded: read them as of their last run, and list what they need."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from air_core.datasets.unlabelled import LABELS
from air_core.models.weights import local_path
from air_core.specs import Ref
from orchestrator.errors import StoreRefused
from orchestrator.formatting import relative_path
from orchestrator.keys import StageSpec, artifact_key
from orchestrator.planning.plan import (
    fp32_slots,
    known_points,
    logged_results,
    possible_trials,
    requirements_of,
    slots_of,
    suggested_points,
)
from orchestrator.planning.requests import run_command
from orchestrator.planning.resolve import (
    Resolver,
    resolver_of,
    with_model_defaults,
)
from orchestrator.planning.trial_checks import NotRecorded
from orchestrator.plugins import recorded_plugin
from orchestrator.spec import Cell, SweepSpec, cells_of, load_sweep
from orchestrator.spec.sweep import smoke_variant
from orchestrator.stages import TrialSpec
from orchestrator.store import ArtifactStore, SweepLocation, read_resolved, recorded_locations
from orchestrator.store.gc import StoreRequirements


def read_sweep(location: SweepLocation, data_root: Path | None) -> tuple[SweepSpec, SweepLocation]:
    """Read a sweep as of its last run, with the options of that run.

    The returned location has `recorded` set: its inputs are those that the last run resolved.

    Raises:
        ValueError: the recorded sweep file is invalid.
        FileNotFoundError: the sweep has no recorded file.
    """
    origin = read_resolved(location)
    sweep = load_sweep(
        location.folder / "spec.yaml",
        sets=origin.get("sets", []),
        only=origin.get("only", []),
        plugins=[recorded_plugin(about) for about in origin.get("plugins", [])],
    )
    sweep = replace(sweep, source=origin.get("source", sweep.source))
    data = data_root or (local_path(sweep.data_root) if sweep.data_root else None)
    location = replace(location, data_root=data, recorded=True)
    return smoke_variant(sweep) if origin.get("smoke") else sweep, location


def changed_folders(location: SweepLocation) -> Iterator[str]:
    """Sentences on the folders of images that are not as in the last run of a sweep.

    A folder is read only if a text file or the list of files changed after the run had begun.
    """
    datasets = (read_resolved(location).get("inputs") or {}).get("datasets", {})
    refs = [Ref(**entry["ref"]) for entry in datasets.values()]
    refs = [ref for ref in refs if ref.name.startswith("folder:")]
    if not refs:  # the log and the digests of files can be long
        return
    starts = (e for e in location.event_log().events() if e["event"] == "sweep_started")
    since = max((event["time"] for event in starts), default=0.0)
    resolver = Resolver(location.store.root / "digests.json", location.data_root)
    for ref in refs:
        folder, what, counts = local_path(ref.name.removeprefix("folder:")), ref.name, ""
        try:
            inside = [p for p in folder.iterdir() if p.suffix in (".csv", ".txt") or p.is_dir()]
            newest = max(path.stat().st_mtime for path in (folder, *inside))
            if newest <= since or (now := resolver.dataset_by_name(ref.name).ref) == ref:
                continue
            if ref.labelled not in (None, now.labelled):
                what = relative_path(folder / LABELS)
                counts = f" ({ref.labelled:,} -> {now.labelled:,} labelled images)"
        except (ValueError, OSError):  # the folder has no images any more
            pass
        yield f"{what} has changed since this run{counts}: `{run_command(location)}` uses it"


def refuse_running(store: ArtifactStore) -> None:
    """Refuse to remove anything while a sweep runs.

    Raises:
        StoreRefused: sweeps of the store are running; the message names them.
    """
    running = [
        location.full_name
        for location in recorded_locations(store)
        if location.event_log().is_locked()
    ]
    if running:
        verb, them = ("runs", "it") if len(running) == 1 else ("run", "them")
        raise StoreRefused(
            f"{', '.join(running)} {verb} in {store.root} now; wait for {them}, or stop {them}"
        )


def all_requirements(store: ArtifactStore, data_root: Path | None) -> StoreRequirements:
    """List the artifacts that the recorded sweeps of a store need."""
    readable, unread = {}, {}
    for location in recorded_locations(store):
        name = location.full_name
        try:
            readable[name] = _needed_by_sweep(*read_sweep(location, data_root))
        except (ValueError, OSError) as problem:
            unread[name] = str(problem).partition("\n")[0]
    return StoreRequirements(readable, unread)


def _needed_by_sweep(sweep: SweepSpec, location: SweepLocation) -> set[str]:
    """The artifacts of the cells in a sweep's file and of the results in its event log.

    Cells that the last run left out by `--only` count as well. If their data is missing, their
    artifacts cannot be listed; this is an error unless it is certain that none were built.
    """
    resolver, event_log = resolver_of(location, sweep.folders), location.event_log()
    sweep = with_model_defaults(sweep, resolver)
    events = list(event_log.events())
    done = [event for event in events if event["event"] in ("trial_done", "trial_reused")]
    last_cells = cells_of(sweep)
    cells_run = {cell.id for cell in last_cells} | {event["cell"] for event in done}
    suggested, moved = suggested_points(event_log), fp32_slots(event_log)
    needed = {event["key"][:12] for event in done}
    unlisted = None  # the error of a cell that was not run and whose data is missing
    every_cell = cells_of(replace(sweep, grid=sweep.axes)) if sweep.axes else ()
    for cell in (*last_cells, *(cell for cell in every_cell if cell not in last_cells)):
        try:
            needed |= _needed_by_cell(cell, sweep, suggested, moved, resolver, location.store)
        except NotRecorded:  # no run had this cell, so nothing was built for it
            continue
        except ValueError as problem:
            if cell.id in cells_run:
                raise
            unlisted = problem
    resolver.save()
    built = {e["key"].rpartition("-")[2] for e in events if e["event"] == "artifact_prepared"}
    if unlisted is not None and built - needed:  # `prepare` may have built it for that cell
        raise unlisted
    return needed


def _needed_by_cell(
    cell: Cell,
    sweep: SweepSpec,
    suggested: Mapping[str, Mapping[int, dict[str, Any]]],
    moved: Mapping[str, str],
    resolver: Resolver,
    store: ArtifactStore,
) -> set[str]:
    assignments = sweep.seeds.assignments()
    needed: set[str] = set()
    repeated: list[TrialSpec] = []
    for number, params in known_points(sweep, cell, suggested).items():
        slots = slots_of(cell, number, params, assignments, resolver, moved)
        repeated += [slot.spec for slot in slots if slot.id in moved]
        for slot in slots:
            # A trial with another test dataset reads the prompt of the trial without it.
            trained = replace(slot.spec, test_dataset=None)
            needed |= {_digest(slot.spec), _digest(trained)}
    trials = [*possible_trials([cell], assignments, resolver), *repeated]
    for requirement in requirements_of(trials):
        if not requirement.is_replaced(store):
            needed |= {_digest(each) for each in requirement.rows or (requirement.spec,)}
    return needed


def _digest(spec: StageSpec) -> str:
    return artifact_key(spec).digest[:12]


def count_by_sweep(store: ArtifactStore, keys: Iterable[str], but: SweepLocation) -> Counter[str]:
    """Count the trials of `keys` by the recorded sweep that computed them.

    Args:
        but: a sweep to leave out.
    """
    remaining, counts = set(keys), Counter[str]()
    for location in recorded_locations(store):
        if location.folder == but.folder:
            continue
        first = logged_results(location.event_log()).first
        done = {key for key, (_, state) in first.items() if state in ("done", "recovered")}
        counts[location.full_name] += len(done & remaining)
        remaining -= done
    return +counts

"""Finds a finished trial in a store by its key or slot. Imports no torch."""

from __future__ import annotations

from typing import Any

from orchestrator.keys import ArtifactKey
from orchestrator.planning.history import read_history
from orchestrator.reporting.selection import SelectedTrial, trial_spec
from orchestrator.stages import TrialSpec
from orchestrator.store import ArtifactStore, SweepLocation, read_trial, recorded_locations

MIN_DIGITS = 6  # of a key


def named_trial(
    name: str, store: ArtifactStore, location: SweepLocation | None = None
) -> SelectedTrial:
    """Find a trial by its slot, its key or the first digits of its key, and read its record.

    Args:
        location: the sweep that the trial must be part of. None: any sweep.

    Raises:
        ValueError: no trial or several trials match, the trial is not part of the sweep, or another
            version of the code computed it.
    """
    slots = {} if location is None else _finished_slots(location)
    record = read_trial(_key_of(_record_of(slots.get(name, name), store)), store)
    spec = trial_spec(record)
    if location is None:
        return SelectedTrial(spec, record, None, None)
    matches = [slot for slot, key in slots.items() if key == record.key]
    if not matches:
        raise ValueError(
            f"{record.path.name} is not a finished trial of the sweep {location.full_name}; omit "
            "--sweep, or give the sweep of the trial"
        )
    slot = name if name in matches else matches[0]
    return SelectedTrial(spec, record, location.full_name, slot)


def _key_of(record: dict[str, Any]) -> ArtifactKey:
    stage, recipe, folder = record["key"].split("/")
    return ArtifactKey(stage, int(recipe[1:]), record["digest"], folder.rpartition("-")[0])


def _record_of(name: str, store: ArtifactStore) -> dict[str, Any]:
    """The record of a trial in the store.

    Raises:
        ValueError: no trial or several trials match.
    """
    key = _key_of_slot(name, store) if "/" in name else name
    records = store.find_by_digest(TrialSpec, key) if key and len(key) >= MIN_DIGITS else []
    if len(records) > 1:
        raise ValueError(
            f"the keys of several trials in {store.name} start with {name!r}; give more digits"
        )
    if records:
        return records[0]
    if "/" in name:
        raise ValueError(
            f"no slot {name!r} has a finished trial in {store.name}; a slot is CELL/POINT/SEEDS, "
            "as in the event log and the tag air.slot"
        )
    raise ValueError(
        f"no trial key in {store.name} starts with {name!r}; give at least {MIN_DIGITS} digits of "
        "a key, or a slot CELL/POINT/SEEDS; `airsweep logs NAME` shows both"
    )


def _key_of_slot(slot: str, store: ArtifactStore) -> str | None:
    """The last key of a slot; None if no sweep has finished it.

    Raises:
        ValueError: sweeps of the store have different trials in this slot.
    """
    slots = {each.full_name: _finished_slots(each) for each in recorded_locations(store)}
    keys = {sweep: finished[slot] for sweep, finished in slots.items() if slot in finished}
    if len(set(keys.values())) > 1:
        found = ", ".join(f"{key[:12]} of {sweep}" for sweep, key in keys.items())
        raise ValueError(
            f"several sweeps have other trials in the slot {slot!r}; give a key: {found}"
        )
    return next(iter(keys.values()), None)


def _finished_slots(location: SweepLocation) -> dict[str, str]:
    """The last key of each finished slot of a sweep."""
    outcomes = read_history(location.event_log()).outcomes.items()
    return {slot: event["key"] for slot, event in outcomes if event["event"] != "trial_failed"}

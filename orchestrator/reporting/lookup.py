"""Finds a finished trial in a store by its key or slot. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from air_core.components import REGISTRIES
from air_core.methods import EMBEDDED
from air_core.specs import Ref
from air_core.specs.flat import OWN, REFS, trial_keys
from air_core.specs.normal import normalised
from orchestrator.keys import artifact_key
from orchestrator.plugins import recorded_plugin, use_plugins
from orchestrator.reporting.selection import SelectedTrial
from orchestrator.stages import TrialSpec, trial_of
from orchestrator.store import ArtifactStore, SweepLocation, read_trial, recorded_locations
from orchestrator.store.location import read_resolved

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
    spec = _recorded_spec(_record_of(slots.get(name, name), store), store)
    record = read_trial(spec, store)
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


def _recorded_spec(record: dict[str, Any], store: ArtifactStore) -> TrialSpec:
    """The spec of a recorded trial.

    Raises:
        ValueError: another version of the code computed it.
    """
    flat = dict(_flattened(record["spec"], ""))
    refs = {
        name: Ref(name=flat.pop(name), digest=flat.pop(f"{name}.digest"))
        for name in REFS
        if f"{name}.digest" in flat
    }
    _use_plugins(flat | {name: ref.name for name, ref in refs.items()}, store)
    known = trial_keys().keys() - {*REFS}  # a setting of another version may be without effect
    settings = {key: value for key, value in flat.items() if key in known}
    spec = trial_of(settings, refs, tuple(flat["classnames"]))
    versions = tuple((part, version) for part, version in flat.get("versions", ()))
    spec = normalised(replace(spec, versions=versions))
    if artifact_key(spec).digest == record["digest"]:
        return spec
    raise ValueError(
        f"{record['key'].rpartition('/')[2]} was computed by another version of the code, with "
        f"which its prompt may not be compatible; check out commit {record.get('commit')}"
    )


def _flattened(spec: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """The items of a record's nested spec, by dotted name."""
    for name, value in spec.items():
        if isinstance(value, Mapping) and value.keys() >= {"name", "digest"}:
            yield prefix + name, value["name"]
            yield f"{prefix}{name}.digest", value["digest"]
        elif isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{name}.")
        elif name == OWN:
            yield from ((prefix + own, setting) for own, setting in value)
        else:
            yield prefix + name, value


def _use_plugins(flat: Mapping[str, Any], store: ArtifactStore) -> None:
    """Add the recorded components of plugins that a trial names; their code does not run."""
    named = [*((key, key) for key in REGISTRIES), ("dataset", "test_dataset")]
    wanted = {(key, flat[name]) for key, name in named if flat.get(name) is not None}
    own = {
        (k, n) for k, registry in REGISTRIES.items() for n, c in registry.items() if not c.source
    }
    for location in recorded_locations(store) if wanted - own - {*EMBEDDED.items()} else ():
        try:
            described = read_resolved(location).get("plugins", ())
        except (FileNotFoundError, ValueError):  # another sweep, never run or with a damaged file
            continue
        added = {(one["key"], one["name"]) for about in described for one in about["components"]}
        if added & wanted:
            use_plugins([recorded_plugin(about) for about in described])
            break


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
    events = location.event_log().events()
    return {e["slot"]: e["key"] for e in events if e["event"] in ("trial_done", "trial_reused")}

"""Finds past trials in the store or in MLflow: settings, inputs, code and metrics.

`airsweep repro` and `airsweep diff` work on these. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from air_core.components import REGISTRIES
from air_core.datasets import get_dataset
from air_core.methods import EMBEDDED
from air_core.specs import CodeVersions, Ref, TrialSpec
from air_core.specs.flat import DERIVED, OWN, from_flat, trial_keys
from air_core.specs.normal import normalised
from orchestrator.keys import artifact_key
from orchestrator.planning.recorded import code_of
from orchestrator.planning.resolve import REFS
from orchestrator.plugins import recorded_plugin, use_plugins
from orchestrator.reporting.selection import SelectedTrial
from orchestrator.store import ArtifactStore, SweepLocation, read_trial, recorded_locations
from orchestrator.store.backends import RECORD
from orchestrator.store.location import read_resolved
from orchestrator.store.records import PROVENANCE
from orchestrator.store.verification import read_record
from orchestrator.tracking._child_runs import SPEC

NO_REF = Ref(name="", digest="")
MIN_DIGITS = 6  # of a key or a run id in a search


@dataclass(frozen=True)
class PastTrial:
    """A trial that ran earlier, read from the store or from MLflow."""

    label: str
    key: str  # when the trial ran
    flat: Mapping[str, Any]  # settings by dotted name; inputs by name
    digests: Mapping[str, str]  # of inputs (dataset, backbone, generator), by setting
    provenance: Mapping[str, Any]  # user, commit, dirty, code, host, device, versions, files
    metrics: Mapping[str, float] = field(default_factory=dict)
    classnames: tuple[str, ...] = ()  # not part of an MLflow run
    code: CodeVersions = ()  # not part of an MLflow run

    def spec(self) -> TrialSpec:
        """The spec of the trial.

        Raises:
            ValueError: this version does not support one of its settings or its dataset.
        """
        unknown = sorted(set(self.flat) - set(trial_keys()))
        if unknown:
            raise ValueError(
                f"{self.label} has settings that this version does not support: "
                f"{', '.join(unknown)}; check out commit {self.provenance.get('commit')}"
            )
        refs = {
            name: Ref(name=self.flat[name] or "", digest=self.digests.get(name, ""))
            for name in REFS
            if self.flat.get(name) is not None
        }
        plain = {name: value for name, value in self.flat.items() if name not in REFS}
        classnames = self.classnames or get_dataset(str(self.flat["dataset"])).classnames
        spec = from_flat(plain, {"generator": NO_REF, **refs}, classnames)
        return replace(spec, code=self.code)

    def has_current_key(self) -> bool:
        """Whether this version gives the trial the key that it had when it ran."""
        return artifact_key(self.spec()).digest.startswith(self.key)


def find_trial(
    name: str,
    store: ArtifactStore,
    uri: str | None,
    to_run: bool = False,
    allow_plugins: bool = False,
) -> PastTrial:
    """Find a trial by its key, its slot or its run id in MLflow. The first digits of an id suffice.

    Args:
        to_run: load the code of its plugins, not only their description.
        allow_plugins: also that of a sweep of another user.

    Raises:
        ValueError: no trial or several trials match.
        TrackerUnreachable: the store has no such trial, and MLflow does not answer.
        Refused: another user recorded its plugins.
    """
    trial = _found_trial(name, store, uri)
    named = [*((key, key) for key in REGISTRIES), ("dataset", "test_dataset")]
    wanted = {(key, trial.flat[name]) for key, name in named if trial.flat.get(name) is not None}
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
            plugins = [recorded_plugin(about) for about in described]
            use_plugins(code_of(plugins, location, allow_plugins) if to_run else plugins)
            break
    return trial


def _found_trial(name: str, store: ArtifactStore, uri: str | None) -> PastTrial:
    key = _key_of_slot(name, store) if "/" in name else name
    records = store.find_by_digest(TrialSpec, key) if key and len(key) >= MIN_DIGITS else []
    if len(records) > 1:
        raise ValueError(
            f"the keys of several trials in {store.name} start with {name!r}; give more digits"
        )
    if records:
        return trial_of_record(records[0])
    if "/" in name:
        raise ValueError(
            f"no slot {name!r} has a finished trial in {store.name}; a slot is CELL/POINT/SEEDS, "
            "as in the event log and the tag air.slot"
        )
    try:
        return trial_of_run(name, store.root, uri)
    except ValueError as error:
        raise ValueError(f"no trial key in {store.name} starts with {name!r}; {error}") from None


def trial_of_run(run_id: str, root: Path, uri: str | None) -> PastTrial:
    """Read a finished trial from its MLflow run.

    Raises:
        ValueError: no run has this id, or it is not a finished trial of airsweep.
    """
    if len(run_id) < MIN_DIGITS or not set(run_id) <= set("0123456789abcdef"):
        raise ValueError(
            f"{run_id!r} is not a run id; give at least the first {MIN_DIGITS} hex digits of the "
            "id on the run's page in MLflow"
        )
    from orchestrator.tracking._runs import read_run  # seconds to import

    run, text = read_run(uri, root, run_id, SPEC)
    tags = run.data.tags
    problem = {
        "sweep": "is a sweep run; give the id of a trial run",
        "point": f"is a setting run over {tags.get('air.runs')} trials; give the id of a trial "
        "run, which the query on its page finds",
        "trial": "",
    }.get(tags.get("air.kind", ""), "is not a trial run of airsweep")
    state = tags.get("air.state")
    if state in ("failed", "pruned"):
        why = f" ({tags.get('air.failure_class')})" if state == "failed" else ""
        problem = f"has no result: {state}{why}"
    if not problem and (text is None or state is None):
        problem = f"has no {SPEC} yet: run `airsweep mlflow reconcile`"
    if problem or text is None:
        raise ValueError(f"{run_id} ({run.info.run_name}) {problem}")
    flat, digests = _settings_and_digests(json.loads(text))
    lists = ("versions", "files")  # tags that contain JSON
    made: dict[str, Any] = {name: tags.get(f"air.{name}", "") for name in (*PROVENANCE, "device")}
    made |= {name: json.loads(made[name] or "{}") for name in lists}
    key = tags["air.trial_key"]
    return PastTrial(run.info.run_name, key, flat, digests, made, run.data.metrics)


def trial_of_record(path: Path) -> PastTrial:
    """Read a finished trial from its record in a store."""
    record = read_record(path / RECORD)
    flat, digests = _settings_and_digests(dict(_flattened(record["spec"], "")))
    made = {name: record.get(name, "") for name in PROVENANCE}
    made["device"] = record["info"].get("device", "")
    classnames = tuple(record["spec"]["classnames"])
    metrics = record["info"]["metrics"]
    code = tuple((part, version) for part, version in record["spec"].get("code", ()))
    return PastTrial(path.name, record["digest"], flat, digests, made, metrics, classnames, code)


def _settings_and_digests(resolved: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Split the content of `spec.json` into settings and digests of inputs."""
    names = {f"{name}.digest": name for name in REFS}
    digests = {names[key]: value for key, value in resolved.items() if key in names and value}
    left_out = {"key", *DERIVED, *names}
    return {key: value for key, value in resolved.items() if key not in left_out}, digests


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


def named_trial(
    name: str, store: ArtifactStore, location: SweepLocation | None, uri: str | None
) -> SelectedTrial:
    """Find a trial by name, as `find_trial` does, and read its record from the store.

    Args:
        location: the sweep that the trial must be part of. None: any sweep.

    Raises:
        ValueError: no trial or several trials match, or the trial is not part of the sweep.
        TrackerUnreachable: the store has no such trial, and MLflow does not answer.
    """
    slots = {} if location is None else _finished_slots(location)
    trial = find_trial(slots.get(name, name), store, uri)
    if not trial.has_current_key():
        raise ValueError(
            f"{trial.label} was computed by another version of the code, with which its prompt may "
            f"not be compatible; check out commit {trial.provenance.get('commit')}"
        )
    spec = normalised(trial.spec())
    if not store.has(spec):
        raise ValueError(
            f"the record of {trial.label} is not in {store.name}; give the --store that has it, or "
            "run its sweep again"
        )
    record = read_trial(spec, store)
    if location is None:
        return SelectedTrial(spec, record, None, None)
    matches = [slot for slot, key in slots.items() if key == record.key]
    if not matches:
        raise ValueError(
            f"{trial.label} is not a finished trial of the sweep "
            f"{location.full_name}; omit --sweep, or give the sweep of the trial"
        )
    slot = name if name in matches else matches[0]
    return SelectedTrial(spec, record, location.full_name, slot)

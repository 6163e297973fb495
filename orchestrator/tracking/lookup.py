"""A trial as a tracker or the store remembers it: settings, inputs, code and numbers.

What `repro` computes again and `diff` compares. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from air_core.datasets import get_dataset
from air_core.flat import from_flat, trial_keys
from air_core.normal import normalised
from air_core.specs import CodeVersions, Ref, TrialSpec
from orchestrator.keys import artifact_key
from orchestrator.planning.inputs import REFS
from orchestrator.reporting.bundles import SelectedTrial
from orchestrator.store import ArtifactStore, SweepLocation, read_trial, recorded_locations
from orchestrator.store.backends import RECORD
from orchestrator.store.records import MADE
from orchestrator.store.verification import read_record
from orchestrator.tracking._child_runs import SPEC

NO_REF = Ref(name="", digest="")
SHORTEST = 6  # hex digits of a key or run id that are looked for


@dataclass(frozen=True)
class PastTrial:
    """One trial, from wherever it was found."""

    label: str
    key: str  # as it was when the trial ran
    flat: Mapping[str, Any]  # every setting by its dotted name; outside things by name
    digests: Mapping[str, str]  # of outside things, by setting
    made: Mapping[str, Any]  # user, commit, dirty, code, host, device, versions, files
    metrics: Mapping[str, float] = field(default_factory=dict)
    classnames: tuple[str, ...] = ()  # an MLflow run does not list them
    code: CodeVersions = ()  # nor these

    def spec(self) -> TrialSpec:
        """
        Raises:
            ValueError: it has settings that this version does not know, or its dataset.
        """
        unknown = sorted(set(self.flat) - set(trial_keys()))
        if unknown:
            raise ValueError(
                f"{self.label} has settings that this version does not know: "
                f"{', '.join(unknown)}; use the code of commit {self.made.get('commit')}"
            )
        refs = {
            name: Ref(name=self.flat[name] or "", digest=self.digests.get(name, ""))
            for name in REFS
            if self.flat.get(name) is not None
        }
        plain = {name: value for name, value in self.flat.items() if name not in REFS}
        classnames = self.classnames or get_dataset(str(self.flat["dataset"])).classnames
        found = from_flat(plain, {"generator": NO_REF, **refs}, classnames)
        return replace(found, code=self.code)

    def same_key(self) -> bool:
        """Whether what is computed here for these settings has the key of then."""
        return artifact_key(self.spec()).digest.startswith(self.key)


def find_trial(name: str, store: ArtifactStore, uri: str | None) -> PastTrial:
    """A trial by its key or the beginning of it, its slot, or its run id in MLflow.

    Raises:
        ValueError: there is none, or several.
        TrackerAway: it can only be an MLflow run, and MLflow does not answer.
    """
    key = _key_of_slot(name, store) if "/" in name else name
    found = store.named(TrialSpec, key) if key and len(key) >= SHORTEST else []
    if len(found) > 1:
        raise ValueError(
            f"several trials in {store.name} begin with {name!r}; give more of the key"
        )
    if found:
        return of_record(found[0])
    if "/" in name:
        raise ValueError(
            f"no slot {name!r} was done in {store.name}; slots are CELL/POINT/SEEDS as the "
            "ledger and the tag air.slot have them"
        )
    return of_run(name, store.root, uri)


def of_run(run_id: str, root: Path, uri: str | None) -> PastTrial:
    """A done trial from tracking data alone.

    Raises:
        ValueError: there is no such run, or it is no done trial of ours.
    """
    if len(run_id) < SHORTEST or not set(run_id) <= set("0123456789abcdef"):
        raise ValueError(
            f"{run_id!r} is no run id: at least {SHORTEST} of its hex digits are needed, as the "
            "run's page in MLflow shows them"
        )
    from orchestrator.tracking._runs import read_run  # seconds to import

    run, text = read_run(uri, root, run_id, SPEC)
    tags = run.data.tags
    problem = {
        "sweep": "is a sweep; give the run of one of its trials",
        "point": f"is a setting over {tags.get('air.runs')} runs; give the run of one of its "
        "trials, which the query on its page finds",
        "trial": "",
    }.get(tags.get("air.kind", ""), "is not a trial of airsweep")
    state = tags.get("air.state")
    if state in ("failed", "pruned"):
        why = f" ({tags.get('air.failure_class')})" if state == "failed" else ""
        problem = f"{state}{why} and has no result"
    if not problem and (text is None or state is None):
        problem = f"has no {SPEC} yet: run `airsweep mlflow reconcile`"
    if problem or text is None:
        raise ValueError(f"{run_id} ({run.info.run_name}) {problem}")
    flat, digests = _parted(json.loads(text))
    lists = ("versions", "files")  # tags that hold JSON
    made: dict[str, Any] = {name: tags.get(f"air.{name}", "") for name in (*MADE, "device")}
    made |= {name: json.loads(made[name] or "{}") for name in lists}
    key = tags["air.trial_key"]
    return PastTrial(run.info.run_name, key, flat, digests, made, run.data.metrics)


def of_record(path: Path) -> PastTrial:
    """A done trial from its record in a store."""
    record = read_record(path / RECORD)
    flat, digests = _parted(dict(_flattened(record["spec"], "")))
    made = {name: record.get(name, "") for name in MADE}
    made["device"] = record["info"].get("device", "")
    classnames = tuple(record["spec"]["classnames"])
    metrics = record["info"]["metrics"]
    code = tuple((part, version) for part, version in record["spec"].get("code", ()))
    return PastTrial(path.name, record["digest"], flat, digests, made, metrics, classnames, code)


def _parted(resolved: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """`spec.json` as settings, and digests of the outside things."""
    names = {f"{name}.digest": name for name in REFS}
    digests = {names[key]: value for key, value in resolved.items() if key in names and value}
    left_out = {"key", "classnames", "code", *names}
    return {key: value for key, value in resolved.items() if key not in left_out}, digests


def _flattened(spec: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """A record's nested spec by dotted names."""
    for name, value in spec.items():
        if isinstance(value, Mapping) and value.keys() == {"name", "digest"}:
            yield prefix + name, value["name"]
            yield f"{prefix}{name}.digest", value["digest"]
        elif isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _key_of_slot(slot: str, store: ArtifactStore) -> str | None:
    """The key that a slot had last; slots of different sweeps may have one name and one key."""
    found = None
    for location in recorded_locations(store):
        for event in location.event_log().events():
            if event.get("slot") == slot and event["event"] in ("trial_done", "trial_reused"):
                found = str(event["key"])
    return found


ALLOWED = "best, a trial key or 6 digits of it, a slot CELL/POINT/SEEDS, or a run id of MLflow"


def named_trial(
    name: str, store: ArtifactStore, location: SweepLocation | None, uri: str | None
) -> SelectedTrial:
    """A trial by its key or the beginning of it, its slot, or its run id in MLflow.

    Args:
        place: the sweep that it should be of; None: any.

    Raises:
        ValueError: there is none, several, or it is of another sweep.
        TrackerAway: it can only be an MLflow run, and MLflow does not answer.
    """
    slots = {} if location is None else _done_slots(location)
    try:
        found = find_trial(slots.get(name, name), store, uri)
    except ValueError as problem:
        raise ValueError(f"{problem}; allowed: {ALLOWED}") from None
    if not found.same_key():
        raise ValueError(
            f"{found.label}: this version computes these settings in another way, so its prompt "
            f"may mean something else here; use the code of commit {found.made.get('commit')}"
        )
    spec = normalised(found.spec())
    if not store.has(spec):
        raise ValueError(
            f"{found.label} is tracked, but its record is not in {store.name}; give the --store "
            "that has it, or run its sweep again"
        )
    record = read_trial(spec, store)
    if location is None:
        return SelectedTrial(spec, record, None, None)
    of = [slot for slot, key in slots.items() if key == record.key]
    if not of:
        raise ValueError(
            f"{found.label} is no done trial of the sweep {location.project}/{location.name}; "
            "leave --sweep out, or give the one that it is of"
        )
    slot = name if name in of else of[0]
    return SelectedTrial(spec, record, f"{location.project}/{location.name}", slot)


def _done_slots(location: SweepLocation) -> dict[str, str]:
    """The key that each slot of a sweep had last."""
    done = ("trial_done", "trial_reused")
    return {e["slot"]: e["key"] for e in location.event_log().events() if e["event"] in done}

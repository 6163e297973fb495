"""An outcome as a tracker's child: names, tags, numbers, and where it came from.

What a child says of its making is what the record says: who really computed it, with which code.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from air_core.flat import to_flat
from air_core.normal import normalised
from air_core.specs import Ref, TrialSpec
from orchestrator.dataset_text import tested_classes
from orchestrator.dispatch import Outcome
from orchestrator.lineage import UNKNOWN
from orchestrator.points import name_of_world, point_id, times_of, varied_keys
from orchestrator.results import flat_of, settings_of
from orchestrator.store import ArtifactStore
from orchestrator.sweep import SweepSpec
from orchestrator.tracking import SweepRun, TrialRun

SPEC = "spec.json"
REFS = ("dataset", "test_dataset", "backbone", "generator")


class Children:
    """Makes the children of one sweep.

    Args:
        folder: for files that are made on demand.
    """

    def __init__(
        self, sweep: SweepSpec, parent: SweepRun, folder: Path, store: ArtifactStore
    ) -> None:
        self.parent, self.folder, self._store = parent, folder, store
        self._objective = sweep.search.objective if sweep.search else ""
        self._varied = varied_keys(sweep)

    def child(self, outcome: Outcome, at: float | None, maker: Mapping[str, Any]) -> TrialRun:
        """
        Args:
            at: seconds since the epoch; when an outcome without a record was noted.
            maker: who ran what has no record: user, commit, dirty.
        """
        slot, record = outcome.slot, outcome.record
        spec = normalised(slot.spec)
        seed = slot.seeds.get("seed", slot.spec.seed)
        noted = int((at or 0.0) * 1000)
        started, ended = times_of(record) if record else (noted, noted)
        values = {**settings_of(slot), **flat_of(slot), "method": slot.cell.method}
        return TrialRun(
            slot=slot.id,
            name=f"{name_of_world(slot)}-s{seed}-{slot.key.digest[:8]}",
            state=outcome.state,
            failure_class=outcome.failure_class,
            tags={
                "air.dataset": slot.spec.dataset.name,
                "air.paradigm": spec.paradigm,
                "air.modality": spec.modality,
                "air.method": slot.cell.method,
                "air.seed": str(seed),
                "air.split_seed": str(slot.spec.split_seed),
                "air.trial_key": slot.key.digest,
                "air.cell": slot.cell.id,
                "air.point": point_id(slot),
                "air.message": outcome.message,
                "air.pruned_after": str(outcome.pruned.rung) if outcome.pruned else "",
                **self._lineage(spec, record.made if record else maker),
            },
            params={key: str(value) for key, value in values.items() if key in self._varied},
            metrics=record.metrics if record else self._of_pruned(outcome),
            curves=record.curves if record else {},
            started=started,
            ended=ended,
            artifacts=self._artifacts(outcome),
        )

    def _of_pruned(self, outcome: Outcome) -> dict[str, float]:
        """The mean objective by which its point was pruned."""
        if outcome.pruned is None:
            return {}
        return {f"rung/{self._objective}": outcome.pruned.value}

    def _lineage(self, spec: TrialSpec, made: Mapping[str, Any]) -> dict[str, str]:
        """Tags that say which inputs and which code gave this result."""
        known = {name: str(made.get(name, "")) for name in ("user", "commit", "dirty", "code")}
        if known["user"] in ("", UNKNOWN):
            known["user"] = self.parent.user
        known |= {name: str(made.get(name, "")) for name in ("host", "device")}
        known |= {name: json.dumps(made[name]) for name in ("versions", "files") if made.get(name)}
        known["spec_hash"] = self.parent.spec_hash
        known["seeds"] = json.dumps(
            {key: value for key, value in to_flat(spec).items() if key.endswith("seed")}
        )
        digests = {f"{name}_digest": ref.digest for name, ref in refs_of(spec).items()}
        return {f"air.{name}": value for name, value in {**known, **digests}.items()}

    def _artifacts(self, outcome: Outcome) -> Mapping[str, Path]:
        """Small files for people: the resolved spec and a confusion matrix."""
        makers = {SPEC: lambda: spec_json(outcome.slot.spec, str(outcome.slot.key)).encode()}
        if outcome.record is not None:
            makers["confusion_matrix.png"] = lambda: _confusion(outcome, self._store)
        return FilesOnDemand(self.folder / outcome.slot.key.digest, makers)


class FilesOnDemand(Mapping[str, Path]):
    """Files that are written when somebody wants them.

    Of a sweep that is gone on with, most outcomes were told before; pictures of them would take
    minutes and go nowhere.
    """

    def __init__(self, folder: Path, makers: Mapping[str, Callable[[], bytes]]) -> None:
        self._folder, self._makers = folder, makers

    def __getitem__(self, name: str) -> Path:
        path = self._folder / name
        if not path.exists():
            content = self._makers[name]()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return path

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def refs_of(spec: TrialSpec) -> dict[str, Ref]:
    """The outside things that a trial reads, by their setting."""
    found = {name: getattr(spec, name) for name in REFS}
    return {name: ref for name, ref in found.items() if ref is not None and ref.digest}


def spec_json(spec: TrialSpec, key: str) -> str:
    """The trial as it was computed: every setting, and the digests behind the names.

    `orchestrator.tracked.spec_of` reads it back.
    """
    spec = normalised(spec)
    resolved: dict[str, Any] = to_flat(spec)
    for name in REFS:
        ref = getattr(spec, name)
        if ref is not None:
            resolved[f"{name}.digest"] = ref.digest
    return json.dumps({"key": key, **resolved}, indent=1, sort_keys=True)


def _confusion(outcome: Outcome, store: ArtifactStore) -> bytes:
    from orchestrator.figures import confusion

    assert outcome.record is not None
    _, predictions, labels = outcome.record.predictions()
    names = [name.replace("_", " ") for name in tested_classes(outcome.slot.spec, store)]
    return confusion(labels, predictions, names)

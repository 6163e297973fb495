"""Outcomes on their way to the tracker: one thread writes, so that nothing waits for it."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from air_core.datasets import get_dataset
from air_core.flat import to_flat
from air_core.normal import normalised
from air_core.specs import TrialSpec
from orchestrator.dispatch import Outcome
from orchestrator.results import flat_of, settings_of
from orchestrator.store import ArtifactStore
from orchestrator.sweep import SweepSpec
from orchestrator.tracking import Status, SweepRun, Tracker, TrialRun, make_tracker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

TAGS = ("dataset", "paradigm", "modality")


class Publisher:
    """Tells a tracker about one sweep, in the background.

    The tracker is opened by the first thing that is told, so a run that has nothing to say
    imports no tracker.
    """

    def __init__(
        self,
        sweep: SweepSpec,
        parent: SweepRun,
        store: ArtifactStore,
        tracking_uri: str | None,
    ) -> None:
        self.sweep, self.parent, self.store = sweep, parent, store
        self.uri = tracking_uri or sweep.tracking_uri
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tracker")
        self._told: list[Future[None]] = []
        self._tracker: Tracker | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="airsweep-")
        self._varied: frozenset[str] = frozenset(
            {*sweep.grid, *(d.key for d in sweep.space), *sweep.seeds.vary} - {"method"}
        )

    def trial(self, outcome: Outcome) -> None:
        self._told.append(self._thread.submit(self._trial, outcome))

    def finish(self, status: Status, note: Callable[[], str], artifacts: dict[str, Path]) -> None:
        """Wait for all that was told, and close the parent.

        Raises:
            Exception: what went wrong in the background, if anything did.
        """
        self._told.append(
            self._thread.submit(lambda: self._open().finish(status, note(), artifacts))
        )
        self._thread.shutdown(wait=True)
        self._folder.cleanup()
        for told in self._told:
            told.result()

    def _open(self) -> Tracker:
        if self._tracker is None:
            self._tracker = make_tracker(
                self.uri, store=self.store.root, project=self.parent.project
            )
            self._tracker.start(self.parent)
        return self._tracker

    def _trial(self, outcome: Outcome) -> None:
        self._open().trial(self._child(outcome))

    def _child(self, outcome: Outcome) -> TrialRun:
        slot, record = outcome.slot, outcome.record
        flat = flat_of(slot)
        name = "-".join(
            [slot.spec.dataset.name, slot.spec.paradigm, slot.spec.modality, slot.cell.method]
        )
        seed = slot.seeds.get("seed", slot.spec.seed)
        tags = {f"air.{name}": str(getattr(slot.spec, name)) for name in TAGS[1:]}
        tags |= {
            "air.dataset": slot.spec.dataset.name,
            "air.method": slot.cell.method,
            "air.seed": str(seed),
            "air.split_seed": str(slot.spec.split_seed),
            "air.trial_key": slot.key.digest,
            "air.cell": slot.cell.id,
            "air.user": self.parent.user,
        }
        started = int((record.started if record else time.time()) * 1000)
        return TrialRun(
            slot=slot.id,
            name=f"{name}-s{seed}-{slot.key.digest[:8]}",
            state=outcome.state,
            failure_class=outcome.failure_class,
            tags=tags,
            params={
                key: str(value)
                for key, value in {**settings_of(slot), **flat}.items()
                if key in self._varied
            },
            metrics=record.metrics if record else {},
            curves=record.curves if record else {},
            started=started,
            ended=started + int((record.seconds if record else 0.0) * 1000),
            artifacts=self._artifacts(outcome),
        )

    def _artifacts(self, outcome: Outcome) -> Mapping[str, Path]:
        """Small files for people: the resolved spec and a confusion matrix."""
        makers = {"spec.json": lambda: _spec_json(outcome).encode()}
        if outcome.record is not None:
            makers["confusion_matrix.png"] = lambda: _confusion(outcome)
        return FilesOnDemand(Path(self._folder.name) / outcome.slot.key.digest, makers)


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


def _confusion(outcome: Outcome) -> bytes:
    from orchestrator.pictures import confusion_matrix

    assert outcome.record is not None
    _, predictions, labels = outcome.record.predictions()
    names = [name.replace("_", " ") for name in _tested_classes(outcome.slot.spec)]
    return confusion_matrix(labels, predictions, names)


def _tested_classes(spec: TrialSpec) -> Sequence[str]:
    if spec.test_dataset is None:
        return spec.classnames
    return get_dataset(spec.test_dataset.name).classnames


def _spec_json(outcome: Outcome) -> str:
    """The trial as it was computed: every setting, and the digests behind the names."""
    spec = normalised(outcome.slot.spec)
    resolved: dict[str, Any] = to_flat(spec)
    for name in ("dataset", "test_dataset", "backbone", "generator"):
        ref = getattr(spec, name)
        if ref is not None:
            resolved[f"{name}.digest"] = ref.digest
    return json.dumps({"key": str(outcome.slot.key), **resolved}, indent=1, sort_keys=True)

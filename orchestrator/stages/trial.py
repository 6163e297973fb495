"""One trial: gather its inputs from the store, call the method, record what came out.

A trial only reads; what it lacks is an error that says what to run. The true labels of the pool
are looked at here, beside the method, to tell how good pseudo-labels were.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import save_file

from air_core.normal import normalised
from air_core.specs import SplitSettings, TrialSpec
from orchestrator.keys import artifact_key
from orchestrator.spec.sweep import ENCODER_BATCH
from orchestrator.store import ArtifactStore, TrialRecord, read_trial
from orchestrator.store.checkpoints import (
    START,
    Checkpoint,
    drop_checkpoint,
    keep_checkpoint,
    learned_by,
    read_checkpoint,
    rungs_of,
)
from orchestrator.store.records import PREDICTIONS, PROMPT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from air_core.backbone import Backbone
    from air_core.method import Round, Trial, TrialData, TrialState
    from air_core.types import Labelled, Metrics, TrialResult
    from orchestrator.stages.build import Target
    from orchestrator.store.artifacts import Building


@dataclass(frozen=True)
class Segments:
    """Where a trial of a search that prunes is looked at."""

    rungs: tuple[int, ...] = ()  # iterations after which its objectives are noted
    until: int | None = None  # it stops after so many; None: it runs to its end


WHOLE = Segments()


def run_trial(
    spec: TrialSpec,
    store: ArtifactStore,
    device: str = "cpu",
    share_done: Callable[[float], None] = lambda share: None,
) -> TrialRecord:
    """The trial's record; run first where it is missing.

    Args:
        share_done: told how much of the training is done, in [0, 1].

    Raises:
        MissingArtifact: an input was not prepared.
    """
    if store.writable and not store.has(spec):
        from air_core.side_by_side import learn_side_by_side

        spec = normalised(spec)
        if spec.test_dataset is not None:
            with store.locks.turn(artifact_key(spec).digest):
                if not store.has(spec):
                    with store.building(spec) as building:
                        building.info = _run_elsewhere(
                            spec, store, device, share_done, building.folder
                        )
        else:
            with open_trial(spec, store, device, share_done) as opened:
                if opened is not None:
                    run, trial = opened
                    [(_, outcome)] = learn_side_by_side([trial])
                    run.end(outcome)
    return read_trial(spec, store)


@contextmanager
def open_trial(
    spec: TrialSpec,
    store: ArtifactStore,
    device: str = "cpu",
    share_done: Callable[[float], None] = lambda share: None,
    replicas: int = 1,
    batch: int = ENCODER_BATCH,
    segments: Segments = WHOLE,
) -> Iterator[tuple[TrialRun, Trial] | None]:
    """Lock a trial, and read its inputs and its checkpoint.

    The block calls `TrialRun.end`. It receives None if another process has run the trial meanwhile.

    Args:
        replicas: number of trials that run side by side, this one included. The record contains
            it where it is above one, since the last digits may depend on it.
        batch: images at a time through a tower, where no gradient is needed.
        segments: where the trial is measured, and where it stops before it has a record.
    """
    # torch and CLIP are needed here only: reading a record must not cost their import.
    import torch

    # On one thread a CPU trial can be repeated bit for bit.
    torch.set_num_threads(1)
    spec = normalised(spec) if segments.until is None else learned_by(spec)
    with store.locks.turn(artifact_key(spec).digest):
        if is_over(spec, store, segments.until):
            yield None
        elif segments.until is not None:
            run = TrialRun(spec, store, device, share_done, batch, segments, replicas)
            yield run, run.trial()
        else:
            with store.building(spec, share=1 / replicas) as building:
                run = TrialRun(spec, store, device, share_done, batch, segments, replicas, building)
                yield run, run.trial()
            drop_checkpoint(spec, store)


def is_over(spec: TrialSpec, store: ArtifactStore, until: int | None = None) -> bool:
    """Has a trial got its record; or, with `until`, is it known how it stood there?"""
    return store.has(spec) if until is None else until in rungs_of(spec, store)[0]


class TrialRun:
    """A trial that is being run: its inputs, and its measurements as a callback of the method."""

    def __init__(
        self,
        spec: TrialSpec,
        store: ArtifactStore,
        device: str,
        share_done: Callable[[float], None],
        batch: int,
        segments: Segments,
        replicas: int,
        building: Building | None = None,
    ) -> None:
        from orchestrator.stages.build import read_target
        from orchestrator.stages.context import WorkerContext

        self.started = time.monotonic()
        self.spec, self.store, self.device, self.share_done = spec, store, device, share_done
        self.segments, self.replicas, self.building = segments, replicas, building
        self.begun = begun = read_checkpoint(spec, store)
        reader = store.read_only()
        worker = WorkerContext(reader, device=device, batch=batch)
        target = read_target(spec.features, spec.split, reader, spec.tokens)
        unseen = target.split.unseen
        synthetic = _synthetic(spec, unseen, reader) if spec.synthetic_features else None
        backbone = worker.backbone(spec.backbone, spec.precision)
        self.data = data_of(spec, target, backbone, synthetic)
        self.truth = target.labels[target.split.pool]
        self.tested = target.split.test
        self.curves = {name: list(values) for name, values in begun.curves.items()}
        self.noted: dict[int, Mapping[str, float]] = dict(begun.rungs)
        self.state = _state(begun)

    def trial(self) -> Trial:
        from air_core.method import Trial

        # Not an attribute: the trial refers to this object, and a cycle would keep its tensors.
        return Trial(self.spec, self.data, self, self.state)

    def on_step(self, progress: float) -> None:
        self.share_done(progress)

    def on_round(self, result: Round) -> None:
        """Measure a round; stop the trial at the end of its segment."""
        import torch

        from air_core.evaluation import measured, objectives
        from air_core.method import TrialStopped

        data, values = self.data, {"train/loss": result.loss}
        if self.spec.modality == "text":  # a pass of the vision tower over all test images costs
            with torch.no_grad():
                guess = result.learner.logits(data.test.batch).argmax(dim=-1)
            tested = measured(guess, data.test.labels, len(data.classnames), data.unseen)
            values |= _headlines(tested)
        selected = result.labels
        if selected is not None:
            right = (self.truth[selected.indices] == selected.labels).double().mean().item()
            values |= {"pseudo/accuracy": right, "pseudo/coverage": len(selected) / len(self.truth)}
            values["pseudo/balance"] = balance(selected.labels, data)
        for name, value in values.items():
            self.curves.setdefault(name, []).append(value)
        if result.iteration + 1 in self.segments.rungs:
            found = objectives(result.teacher, data.pool, data.validation, data.unseen)
            self.noted[result.iteration + 1] = found
        self.state = result.state
        if result.iteration + 1 == self.segments.until:
            raise TrialStopped

    def end(self, outcome: TrialResult | Exception) -> None:
        """Write the record of a finished trial, or the checkpoint of a stopped one.

        Raises:
            Exception: that of a failed trial.
        """
        from air_core.method import TrialStopped

        if isinstance(outcome, TrialStopped):
            keep_checkpoint(self.spec, self.store, self.checkpoint())
        elif isinstance(outcome, Exception):
            raise outcome
        else:
            assert self.building is not None, f"{self.segments.until} is before the end"
            self.building.info = self._write(outcome, self.building.folder)
            self.building.before = self.begun.seconds

    def checkpoint(self) -> Checkpoint:
        """Where it stands, to be kept."""
        labels = self.state.labels
        arrays = {"prompts": np.stack([prompt.numpy() for prompt in self.state.prompts])}
        if labels is not None:
            arrays |= {name: getattr(labels, name).numpy() for name in LABELS}
        return Checkpoint(
            iterations=len(self.state.prompts),
            arrays=arrays,
            curves=self.curves,
            rungs=self.noted,
            seconds=round(self._seconds(), 3),
            replicas=self._replicas(),
        )

    def _seconds(self) -> float:
        """Of this trial alone: of what ran side by side its share."""
        return self.begun.seconds + (time.monotonic() - self.started) / self.replicas

    def _replicas(self) -> int:
        return max(self.begun.replicas, self.replicas)

    def _write(self, result: TrialResult, folder: Path) -> dict[str, Any]:
        """Write predictions and prompt of a record; return its info."""
        data, curves = self.data, self.curves
        _keep_predictions(self.tested, result.test, data.test, folder)
        if result.prompt is not None:
            save_file({"prompt": result.prompt.numpy()}, folder / PROMPT)
        metrics = {name: values[-1] for name, values in curves.items()}
        believed = (result.pool_predictions.cpu() == self.truth).double().mean().item()
        if not curves:  # nothing was learned: every pool image keeps the label that it got at first
            metrics |= {"pseudo/accuracy": believed, "pseudo/coverage": 1.0}
        metrics["pool/accuracy_fused"] = believed
        metrics |= _headlines(result.test)
        metrics |= {f"test/accuracy_{name}": share for name, share in result.inference.items()}
        metrics |= {f"objective/{name}": value for name, value in result.objectives.items()}
        if data.synthetic is not None:
            metrics["synthetic/images"] = float(result.synthetic)
        metrics["time/train_s"] = round(self._seconds(), 3)
        info: dict[str, Any] = {
            "device": self.device,
            "metrics": metrics,
            "curves": curves,
            "objectives": result.objectives,
            "per_class": _recalls(result.test),
        }
        if self.noted:
            info["rungs"] = {str(rung): found for rung, found in self.noted.items()}
        if self._replicas() > 1:
            info["replicas"] = self._replicas()
        return info


def balance(labels: Tensor, data: TrialData) -> float:
    """How evenly labels (M,) spread over the classes of the pool: their entropy over its largest
    value, 1 where all classes have as many."""
    classes = len(data.classnames) if data.unseen is None else len(data.unseen)
    counts = labels.bincount(minlength=classes).double()
    shares = counts[counts > 0] / counts.sum()
    return abs(-(shares * shares.log()).sum().item()) / math.log(max(2, classes))


LABELS = ("indices", "targets", "labels")


def _state(begun: Checkpoint) -> TrialState:
    import torch

    from air_core.method import TrialState
    from air_core.types import PseudoLabels

    if begun is START:
        return TrialState()
    arrays = {name: torch.from_numpy(array) for name, array in begun.arrays.items()}
    labels = PseudoLabels(**{name: arrays[name] for name in LABELS}) if "labels" in arrays else None
    return TrialState(tuple(arrays["prompts"]), labels)


def data_of(
    spec: TrialSpec, target: Target, backbone: Backbone, synthetic: Labelled | None
) -> TrialData:
    """What the method sees of a dataset."""
    from air_core.method import TrialData

    split = target.split
    return TrialData(
        backbone=backbone,
        classnames=target.text.classnames,
        template=target.text.template,
        pool=target.batch(split.pool),
        labelled=target.labelled(split.labelled) if len(split.labelled) else None,
        unseen=split.unseen,
        validation=target.labelled(split.validation) if len(split.validation) else None,
        test=target.labelled(split.test),
        synthetic=synthetic,
    )


def _run_elsewhere(
    spec: TrialSpec,
    store: ArtifactStore,
    device: str,
    share_done: Callable[[float], None],
    folder: Path,
) -> dict[str, Any]:
    """The prompt of one dataset on another's test images, with the other's class names.

    What is learned is the trial without `test_dataset`, once for all that it is tested on; no image
    or class name of the other dataset is seen in it (CoCoOp's transfer, arXiv:2203.05557).
    """
    import torch

    from air_core.classifiers import Classifier, text_classifier
    from air_core.evaluation import measured
    from air_core.prompts import restored_learner
    from orchestrator.stages.build import read_target
    from orchestrator.stages.context import WorkerContext

    home = replace(spec, test_dataset=None)
    learned = run_trial(home, store, device, share_done)
    started = time.monotonic()
    reader = store.read_only()
    assert spec.test_features is not None
    split = SplitSettings(split_seed=spec.split_seed)
    target = read_target(spec.test_features, split, reader, spec.test_tokens)
    test = target.labelled(target.split.test)
    there = target.text
    backbone = WorkerContext(reader, device=device).backbone(spec.backbone, spec.precision)
    classifier: Classifier
    if spec.iterations == 0:
        classifier = text_classifier(backbone, there.classnames, there.template)
    else:
        prompt = torch.from_numpy(learned.prompt())
        classifier = restored_learner(
            spec.modality, spec.prompt, backbone, there.classnames, there.template, prompt
        )
    with torch.no_grad():
        guess = classifier.logits(test.batch).argmax(dim=-1)
    tested = measured(guess, test.labels, len(there.classnames))
    _keep_predictions(target.split.test, tested, test, folder)
    of_home = ("test/", "time/")
    kept = {name: of for name, of in learned.metrics.items() if not name.startswith(of_home)}
    shown = {"test/accuracy_text": tested.accuracy, "time/test_s": time.monotonic() - started}
    return {
        "device": device,
        "metrics": kept | _headlines(tested) | shown,
        "curves": {name: of for name, of in learned.curves.items() if not name.startswith(of_home)},
        "objectives": learned.objectives,
        "per_class": _recalls(tested),
    }


def _keep_predictions(index: Tensor, tested: Metrics, test: Labelled, folder: Path) -> None:
    save_file(
        {
            "index": index.numpy(),
            "predictions": tested.predictions.cpu().numpy().astype(np.int32),
            "labels": test.labels.numpy().astype(np.int32),
        },
        folder / PREDICTIONS,
    )


def _recalls(tested: Metrics) -> list[float | None]:  # NaN has no place in JSON
    return [None if math.isnan(recall) else recall for recall in tested.per_class]


def _headlines(tested: Metrics) -> dict[str, float]:
    named = {
        "test/accuracy": tested.accuracy,
        "test/seen": tested.seen,
        "test/unseen": tested.unseen,
        "test/harmonic_mean": tested.harmonic_mean,
    }
    return {name: value for name, value in named.items() if value is not None}


def _synthetic(spec: TrialSpec, unseen: Tensor | None, reader: ArtifactStore) -> Labelled:
    """The images that the trial reads: in TRZSL of unseen classes alone."""
    from orchestrator.stages.image_rows import read_synthetic

    classes = None if unseen is None else unseen.tolist()
    row, tokens = spec.synthetic_features, spec.synthetic_tokens
    assert row is not None
    return read_synthetic(row, spec.images_per_class, reader, classes, tokens)

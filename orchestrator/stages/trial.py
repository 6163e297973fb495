"""Runs one trial: reads its inputs from the store, calls the method, writes the record.

A trial makes no inputs: a missing input is an error that names the command to run. The true labels
of the pool are read here, outside the method, to measure the quality of pseudo-labels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
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
    from collections.abc import Callable

    from torch import Tensor

    from air_core.backbone import Backbone
    from air_core.method import Learning, Progress, SoFar, TrialData
    from air_core.types import Labelled, Metrics, TrialResult
    from orchestrator.stages.build import Target


@dataclass(frozen=True)
class Segments:
    """Where a trial of a search that prunes is measured and stopped."""

    rungs: tuple[int, ...] = ()  # iterations after which its objectives are recorded
    stop_after: int | None = None  # iterations; None: the trial runs to its end


WHOLE_TRIAL = Segments()


def run_trial(
    spec: TrialSpec,
    store: ArtifactStore,
    device: str = "cpu",
    report: Callable[[float], None] = lambda share: None,
) -> TrialRecord:
    """Run a trial if it has no record yet; returns the record.

    Args:
        report: called with the share of the training that is done, in [0, 1].

    Raises:
        MissingArtifact: an input was not prepared.
    """
    if store.writable and not store.has(spec):
        from air_core.method import learn_together

        [problem] = learn_together([learn_and_record(spec, store, device, report)])
        if problem is not None:
            raise problem
    return read_trial(spec, store)


def learn_and_record(
    spec: TrialSpec,
    store: ArtifactStore,
    device: str = "cpu",
    report: Callable[[float], None] = lambda share: None,
    replicas: int = 1,
    batch: int = ENCODER_BATCH,
    segments: Segments = WHOLE_TRIAL,
) -> Learning[None]:
    """A trial from its inputs, or from its checkpoint, to its record, for `learn_together`.

    Args:
        replicas: number of trials that run side by side, this one included. The record has it if
            it is more than one, since the last digits of results may depend on it.
        batch: images in one pass of a tower, where no gradient is needed.
        segments: where the trial is measured, and where it stops before it has a record.
    """
    # Imported here so that reading a record does not import torch and CLIP.
    import torch

    # A CPU trial is reproducible bit by bit on one thread only.
    torch.set_num_threads(1)
    spec = normalised(spec) if segments.stop_after is None else learned_by(spec)

    def resume(checkpoint: Checkpoint) -> _RunningTrial:
        return _RunningTrial(
            spec, store, device, report, batch, checkpoint, segments.rungs, replicas
        )

    with store.locks.exclusive(artifact_key(spec).digest):
        if is_finished(spec, store, segments.stop_after):  # another process has run it
            return
        if segments.stop_after is not None:
            running = resume(read_checkpoint(spec, store))
            result = yield from running.learning(segments.stop_after)
            assert result is None, f"{segments.stop_after} is before the end"
            keep_checkpoint(spec, store, running.checkpoint())
            return
        with store.building(spec, share=1 / replicas) as artifact:
            if spec.test_dataset is None:
                checkpoint = read_checkpoint(spec, store)
                artifact.info = yield from resume(checkpoint).run_to_end(artifact.folder)
                artifact.before = checkpoint.seconds
            else:
                artifact.info = _test_on_other_dataset(spec, store, device, report, artifact.folder)
        drop_checkpoint(spec, store)


def is_finished(spec: TrialSpec, store: ArtifactStore, stop_after: int | None = None) -> bool:
    """Whether a trial has its record or, given `stop_after`, its objectives at that rung."""
    return store.has(spec) if stop_after is None else stop_after in rungs_of(spec, store)[0]


class _RunningTrial:
    """A trial that runs: its inputs and its measurements so far."""

    def __init__(
        self,
        spec: TrialSpec,
        store: ArtifactStore,
        device: str,
        report: Callable[[float], None],
        batch: int,
        checkpoint: Checkpoint,
        rungs: tuple[int, ...],
        replicas: int,
    ) -> None:
        from orchestrator.stages.build import read_target
        from orchestrator.stages.context import WorkerContext

        self.started = time.monotonic()
        self.spec, self.device, self.report = spec, device, report
        self.resumed_from = checkpoint
        self.rungs, self.replicas = rungs, replicas
        reader = store.read_only()
        worker = WorkerContext(reader, device=device, batch=batch)
        target = read_target(spec.features, spec.split, reader, spec.tokens)
        unseen = target.split.unseen
        synthetic = _synthetic(spec, unseen, reader) if spec.synthetic_features else None
        backbone = worker.backbone(spec.backbone, spec.precision)
        self.data = data_of(spec, target, backbone, synthetic)
        self.true_labels = target.labels[target.split.pool]
        self.test_index = target.split.test
        self.curves = {name: list(values) for name, values in checkpoint.curves.items()}
        self.rung_objectives: dict[int, Mapping[str, float]] = dict(checkpoint.rungs)
        self.so_far = _so_far(checkpoint)

    def learning(self, stop_after: int | None = None) -> Learning[TrialResult | None]:
        """The method, from the checkpoint on."""
        from air_core.method import learning

        return learning(self.spec, self.data, self._measure, self.report, self.so_far, stop_after)

    def _measure(self, progress: Progress) -> None:
        """Measure the prompt and the pseudo-labels after an iteration."""
        import torch

        from air_core.evaluation import measured, objectives

        data, values = self.data, {"train/loss": progress.loss}
        if self.spec.modality == "text":  # a visual prompt would need a pass over all test images
            with torch.no_grad():
                predicted = progress.learned.logits(data.test.batch).argmax(dim=-1)
            metrics = measured(predicted, data.test.labels, len(data.classnames), data.unseen)
            values |= _test_metrics(metrics)
        selected = progress.labels
        if selected is not None:
            correct = self.true_labels[selected.indices] == selected.labels
            values |= {
                "pseudo/accuracy": correct.double().mean().item(),
                "pseudo/coverage": len(selected) / len(self.true_labels),
            }
            values["pseudo/balance"] = balance(selected.labels, data)
        for name, value in values.items():
            self.curves.setdefault(name, []).append(value)
        if progress.iteration + 1 in self.rungs:
            self.rung_objectives[progress.iteration + 1] = objectives(
                progress.teacher, data.pool, data.validation, data.unseen
            )
        self.so_far = progress.so_far

    def checkpoint(self) -> Checkpoint:
        """The state from which the trial can resume."""
        labels = self.so_far.labels
        arrays = {"prompts": np.stack([prompt.numpy() for prompt in self.so_far.prompts])}
        if labels is not None:
            arrays |= {name: getattr(labels, name).numpy() for name in LABELS}
        return Checkpoint(
            iterations=len(self.so_far.prompts),
            arrays=arrays,
            curves=self.curves,
            rungs=self.rung_objectives,
            seconds=round(self._seconds(), 3),
            replicas=self._max_replicas(),
        )

    def _seconds(self) -> float:
        """Seconds of this trial: its share of the time of all trials side by side."""
        return self.resumed_from.seconds + (time.monotonic() - self.started) / self.replicas

    def _max_replicas(self) -> int:
        return max(self.resumed_from.replicas, self.replicas)

    def run_to_end(self, folder: Path) -> Learning[dict[str, Any]]:
        """Learn, and write predictions and prompt; returns the content of the record."""
        result = yield from self.learning()
        assert result is not None, "the trial has no stop"
        data, curves = self.data, self.curves
        _write_predictions(self.test_index, result.test, data.test, folder)
        if result.prompt is not None:
            save_file({"prompt": result.prompt.numpy()}, folder / PROMPT)
        metrics = {name: values[-1] for name, values in curves.items()}
        correct = result.pool_predictions.cpu() == self.true_labels
        pool_accuracy = correct.double().mean().item()
        if not curves:  # without training, every pool image keeps its first label
            metrics |= {"pseudo/accuracy": pool_accuracy, "pseudo/coverage": 1.0}
        metrics["pool/accuracy_fused"] = pool_accuracy
        metrics |= _test_metrics(result.test)
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
        if self.rung_objectives:
            info["rungs"] = {str(rung): values for rung, values in self.rung_objectives.items()}
        if self._max_replicas() > 1:
            info["replicas"] = self._max_replicas()
        return info


def balance(labels: Tensor, data: TrialData) -> float:
    """How evenly labels (M,) spread over the classes of the pool: their entropy divided by its
    maximum, so 1 if all classes have equally many labels."""
    classes = len(data.classnames) if data.unseen is None else len(data.unseen)
    counts = labels.bincount(minlength=classes).double()
    shares = counts[counts > 0] / counts.sum()
    return abs(-(shares * shares.log()).sum().item()) / math.log(max(2, classes))


LABELS = ("indices", "targets", "labels")


def _so_far(checkpoint: Checkpoint) -> SoFar:
    import torch

    from air_core.method import NOTHING, SoFar
    from air_core.types import PseudoLabels

    if checkpoint is START:
        return NOTHING
    arrays = {name: torch.from_numpy(array) for name, array in checkpoint.arrays.items()}
    labels = PseudoLabels(**{name: arrays[name] for name in LABELS}) if "labels" in arrays else None
    return SoFar(tuple(arrays["prompts"]), labels)


def data_of(
    spec: TrialSpec, target: Target, backbone: Backbone, synthetic: Labelled | None
) -> TrialData:
    """The data that the method learns from and is tested on."""
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


def _test_on_other_dataset(
    spec: TrialSpec,
    store: ArtifactStore,
    device: str,
    report: Callable[[float], None],
    folder: Path,
) -> dict[str, Any]:
    """Test the prompt of one dataset on another dataset's test images, with its class names.

    The trial without `test_dataset` learns the prompt, once for all test datasets; it sees no image
    and no class name of them (CoCoOp's transfer, arXiv:2203.05557).
    """
    import torch

    from air_core.classifiers import Classifier, text_classifier
    from air_core.evaluation import measured
    from air_core.prompts import restored_learner
    from orchestrator.stages.build import read_target
    from orchestrator.stages.context import WorkerContext

    learned = run_trial(replace(spec, test_dataset=None), store, device, report)
    started = time.monotonic()
    reader = store.read_only()
    assert spec.test_features is not None
    split = SplitSettings(split_seed=spec.split_seed)
    target = read_target(spec.test_features, split, reader, spec.test_tokens)
    test = target.labelled(target.split.test)
    classnames, template = target.text.classnames, target.text.template
    backbone = WorkerContext(reader, device=device).backbone(spec.backbone, spec.precision)
    classifier: Classifier
    if spec.iterations == 0:
        classifier = text_classifier(backbone, classnames, template)
    else:
        prompt = torch.from_numpy(learned.prompt())
        classifier = restored_learner(
            spec.modality, spec.prompt, backbone, classnames, template, prompt
        )
    with torch.no_grad():
        predicted = classifier.logits(test.batch).argmax(dim=-1)
    metrics = measured(predicted, test.labels, len(classnames))
    _write_predictions(target.split.test, metrics, test, folder)
    replaced = ("test/", "time/")  # metrics of the dataset that was learned from
    kept = {name: value for name, value in learned.metrics.items() if not name.startswith(replaced)}
    new = {"test/accuracy_text": metrics.accuracy, "time/test_s": time.monotonic() - started}
    return {
        "device": device,
        "metrics": kept | _test_metrics(metrics) | new,
        "curves": {
            name: values for name, values in learned.curves.items() if not name.startswith(replaced)
        },
        "objectives": learned.objectives,
        "per_class": _recalls(metrics),
    }


def _write_predictions(index: Tensor, metrics: Metrics, test: Labelled, folder: Path) -> None:
    save_file(
        {
            "index": index.numpy(),
            "predictions": metrics.predictions.cpu().numpy().astype(np.int32),
            "labels": test.labels.numpy().astype(np.int32),
        },
        folder / PREDICTIONS,
    )


def _recalls(metrics: Metrics) -> list[float | None]:  # JSON has no NaN
    return [None if math.isnan(recall) else recall for recall in metrics.per_class]


def _test_metrics(metrics: Metrics) -> dict[str, float]:
    values = {
        "test/accuracy": metrics.accuracy,
        "test/seen": metrics.seen,
        "test/unseen": metrics.unseen,
        "test/harmonic_mean": metrics.harmonic_mean,
    }
    return {name: value for name, value in values.items() if value is not None}


def _synthetic(spec: TrialSpec, unseen: Tensor | None, reader: ArtifactStore) -> Labelled:
    """The images that the trial reads; in TRZSL only those of unseen classes."""
    from orchestrator.stages.image_rows import read_synthetic

    classes = None if unseen is None else unseen.tolist()
    row, tokens = spec.synthetic_features, spec.synthetic_tokens
    assert row is not None
    return read_synthetic(row, spec.images_per_class, reader, classes, tokens)

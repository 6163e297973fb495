"""Runs trials: reads their inputs from the store, calls the method, writes the records.

The time of a training step of a text prompt depends on the number of calls more than on the
arithmetic, above all on a GPU, so all seeds of a point together cost little more than one: prompts
that can share a pass of the text tower are trained side by side. Each trial keeps its own data,
random numbers, record and failure.

A trial makes no inputs: a missing input is an error that names the command to run. The true labels
of the pool are read here, outside the method, to measure the quality of pseudo-labels.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor

from air_core.bundle.arrays import fused_arrays
from air_core.classifiers import Classifier, text_classifier
from air_core.evaluation import measured
from air_core.evidence import mean_scores
from air_core.method import Callback, Round, Trial, TrialData, TrialState
from air_core.prompts import restored_learner
from air_core.settings import SplitSettings
from air_core.settings.conditions import reads_tokens
from air_core.side_by_side import learn_side_by_side
from air_core.types import Classes, Metrics, PseudoLabels, SparseTargets, TrialResult, sparse
from orchestrator.keys import artifact_key
from orchestrator.spec.resources import ENCODER_BATCH
from orchestrator.stages.context import WorkerContext, ignore, startup_seconds
from orchestrator.stages.features import known_accuracy, read_target
from orchestrator.stages.trial import TrialSpec, side_by_side
from orchestrator.stages.trial_data import read_data
from orchestrator.store import ArtifactStore, TrialRecord, read_trial
from orchestrator.store.artifacts import Building
from orchestrator.store.checkpoints import (
    START,
    Checkpoint,
    Curves,
    delete_checkpoint,
    read_checkpoint,
    write_checkpoint,
)
from orchestrator.store.records import FUSED, POOL, PREDICTIONS, PROMPT

CHECKPOINT_INTERVAL = 10.0  # seconds between two checkpoints of a trial, at least
# They receive the finished and all steps of a trial, and after each round its curves.
Reports = tuple[Callable[[int, int], None], Callable[[Curves], None]]


def run_trials(
    specs: Sequence[TrialSpec],
    worker: WorkerContext,
    report: Callable[[int, int, int], None] = lambda index, done, total: None,
    report_curves: Callable[[int, Curves], None] = lambda index, curves: None,
) -> list[TrialRecord | Exception]:
    """Run the trials that have no record yet; returns the record or the exception of each.

    A record is published as soon as its trial is finished.

    Args:
        worker: a smaller batch also means fewer trials side by side.
        report: called with the index of a trial in `specs`, and its finished and all steps.
        report_curves: called after each round with the index of a trial and its curves so far.
    """
    store = worker.store
    missing = [spec for spec in dict.fromkeys(specs) if not store.has(spec)]
    reports = {
        spec: (partial(report, specs.index(spec)), partial(report_curves, specs.index(spec)))
        for spec in missing
    }
    failed: dict[TrialSpec, Exception] = {}
    # All processes take locks in the same order, or two could wait for each other.
    missing.sort(key=lambda spec: artifact_key(spec).digest)
    for group in side_by_side(missing, worker.device, worker.batch / ENCODER_BATCH):
        problems = _run_group(group, worker, reports)
        counts = Counter(map(id, problems.values()))
        # An exception that several trials share is no trial's own, such as a lack of memory.
        shared = [spec for spec, problem in problems.items() if counts[id(problem)] > 1]
        failed |= {spec: problem for spec, problem in problems.items() if spec not in shared}
        del problems  # their tracebacks hold the tensors
        for spec in shared:
            failed |= _run_group([spec], worker, reports)
    return [failed.get(spec) or read_trial(spec, store) for spec in specs]


def _run_group(
    group: Sequence[TrialSpec],
    worker: WorkerContext,
    reports: Mapping[TrialSpec, Reports],
) -> dict[TrialSpec, Exception]:
    """Run and record trials side by side; the exception of each trial that fails."""
    problems: dict[TrialSpec, Exception] = {}
    runs: list[tuple[TrialSpec, ExitStack, TrialRun]] = []
    trials: list[Trial] = []
    with ExitStack() as group_stack:
        for spec in group:
            stack = group_stack.enter_context(ExitStack())
            try:
                if spec.test_dataset is not None:
                    test = partial(_test_on_other_dataset, spec, worker, reports[spec][0])
                    worker.store.get_or_build(spec, test)
                    continue
                opened = stack.enter_context(open_trial(spec, worker, reports[spec], len(group)))
            except Exception as problem:
                problems[spec] = problem
            else:
                if opened is not None:
                    runs.append((spec, stack, opened[0]))
                    trials.append(opened[1])
        for index, outcome in learn_side_by_side(trials):
            spec, stack, run = runs[index]
            try:
                with stack:  # publishes the record and releases the lock
                    run.end(outcome)
            except Exception as problem:
                problems[spec] = problem
    return problems


def run_trial(
    spec: TrialSpec,
    store: ArtifactStore,
    device: str = "cpu",
    report: Callable[[int, int], None] = ignore,
) -> TrialRecord:
    """As `run_trials`, for one trial; raises its exception."""
    worker = WorkerContext(store, device=device)
    [outcome] = run_trials([spec], worker, lambda _, done, total: report(done, total))
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


@contextmanager
def open_trial(
    spec: TrialSpec,
    worker: WorkerContext,
    reports: Reports,
    replicas: int,
) -> Iterator[tuple[TrialRun, Trial] | None]:
    """Lock a trial, and read its inputs and its checkpoint.

    The block calls `TrialRun.end`. It receives None if another process has run the trial meanwhile.

    Args:
        replicas: number of trials that run side by side, this one included.
    """
    # A CPU trial is reproducible bit by bit on one thread only.
    torch.set_num_threads(1)
    store = worker.store
    with store.locks.exclusive(artifact_key(spec).digest):
        if store.has(spec):
            yield None
            return
        with store.building(spec, share=1 / replicas) as building:
            run = TrialRun(spec, worker, reports, replicas, building)
            yield run, run.trial()
        delete_checkpoint(spec, store)


class TrialRun(Callback):
    """A running trial: reads its inputs, and measures each round as a callback of the method."""

    def __init__(
        self,
        spec: TrialSpec,
        worker: WorkerContext,
        reports: Reports,
        replicas: int,
        building: Building,
    ) -> None:
        self.started = self.saved = time.monotonic()  # `saved`: the last checkpoint
        self.steps: list[tuple[int, float]] = []  # the first and the last one; seconds until then
        self.spec, self.worker, (self.report, self.report_curves) = spec, worker, reports
        self.replicas, self.building = replicas, building
        self.resumed_from = begun = read_checkpoint(spec, worker.store)
        target = read_target(spec.features, spec.split, worker.store, spec.tokens)
        self.data = read_data(spec, target, worker)
        self.true_labels = target.labels[target.split.pool]
        self.test_index, self.pool_index = target.split.test, target.split.pool
        self.curves = {name: list(values) for name, values in begun.curves.items()}

    def trial(self) -> Trial:
        # Not an attribute: the trial refers to this object, and a cycle would keep its tensors.
        return Trial(self.spec, self.data, self, _state(self.resumed_from))

    def on_step(self, done: int, total: int) -> None:
        self.steps[1:] = [(done, self._seconds())]
        self.report(done, total)

    def on_round(self, result: Round) -> None:
        """Measure a round, and write a checkpoint if the last one is old."""
        data, values = self.data, {"train/loss": result.loss}
        # With image tokens, testing needs a pass of the vision tower.
        if not reads_tokens(self.spec):
            with torch.no_grad():
                guess = result.learner.logits(data.test.images).argmax(dim=-1)
            tested = measured(guess, data.test.labels, data.classes)
            values |= _test_metrics(tested)
        selected = result.labels
        if selected is not None:
            right = known_accuracy(selected.labels, self.true_labels[selected.indices])
            values |= {} if right is None else {"pseudo/accuracy": right}
            values["pseudo/coverage"] = len(selected) / len(self.true_labels)
            values["pseudo/balance"] = balance(selected.labels, data)
        for name, value in values.items():
            self.curves.setdefault(name, []).append(value)
        self.report_curves(self.curves)
        if time.monotonic() - self.saved >= CHECKPOINT_INTERVAL:
            write_checkpoint(self.spec, self.worker.store, self._checkpoint(result.state))
            self.saved = time.monotonic()

    def end(self, outcome: TrialResult | Exception) -> None:
        """Write the record of a finished trial.

        Raises:
            Exception: that of a failed trial.
        """
        if isinstance(outcome, Exception):
            raise outcome
        self.building.info = self._write(outcome, self.building.folder)
        self.building.earlier_seconds = self.resumed_from.seconds

    def _checkpoint(self, state: TrialState) -> Checkpoint:
        arrays = {"prompts": np.stack([prompt.numpy() for prompt in state.prompts])}
        if state.labels is not None:
            arrays |= _label_arrays(state.labels)
        return Checkpoint(arrays, self.curves, round(self._seconds(), 3))

    def _seconds(self) -> float:
        """Seconds of this trial: its share of the time of all trials side by side."""
        return self.resumed_from.seconds + (time.monotonic() - self.started) / self.replicas

    def _write(self, result: TrialResult, folder: Path) -> dict[str, Any]:
        """Write predictions and prompt of a record; return its info."""
        data, curves = self.data, self.curves
        tested = result.classifiers
        of = {name: (each.test.predictions, each.probability) for name, each in tested.items()}
        labels = data.test.labels.int()
        _write(folder / PREDICTIONS, self.test_index, result.test.predictions, of, labels=labels)
        of = {name: (each.pool, each.pool_probability.half()) for name, each in tested.items()}
        _write(folder / POOL, self.pool_index, result.pool_predictions, of)
        if result.prompt is not None:
            save_file({"prompt": result.prompt.numpy()}, folder / PROMPT)
        if "fused" in tested:
            _save(fused_arrays(result.fused), folder / FUSED)
        metrics = {name: values[-1] for name, values in curves.items()}
        if not curves:  # without training, every pool image keeps its first label
            metrics["pseudo/coverage"] = 1.0
        pool_accuracy = known_accuracy(result.pool_predictions.cpu(), self.true_labels)
        if pool_accuracy is not None:
            metrics |= {} if curves else {"pseudo/accuracy": pool_accuracy}
            metrics["pool/accuracy_fused"] = pool_accuracy
            if data.evidence is not None:
                metrics |= self._evidence_accuracy(data.evidence)
        metrics |= _test_metrics(result.test)
        metrics |= {f"objective/{name}": value for name, value in result.objectives.items()}
        for classifier, found in tested.items():
            metrics[f"temperature/{classifier}"] = found.temperature
            if len(data.test):
                metrics[f"test/accuracy_{classifier}"] = found.test.headline
                before, after = found.calibration_error
                metrics[f"test/calibration_error_{classifier}"] = after
                metrics[f"test/calibration_error_uncalibrated_{classifier}"] = before
            for name, value in found.objectives.items():
                metrics[f"objective/{name}_{classifier}"] = value
        if (right := self._lora_label_accuracy()) is not None:
            metrics["pseudo/accuracy_lora"] = right
        if data.synthetic is not None:
            metrics["synthetic/images"] = float(len(data.synthetic))
        if data.validation is not None:
            metrics["validation/images"] = float(len(data.validation))
        metrics["time/train_s"] = round(self._seconds(), 3)
        info: dict[str, Any] = {
            "device": self.worker.device,
            "metrics": metrics,
            "curves": curves,
            "objectives": result.objectives,
            "per_class": _recalls(result.test),
        }
        if (startup := startup_seconds(self.steps, self._seconds())) is not None:
            info["startup"] = round(max(0.0, startup), 3)
        return info

    def _lora_label_accuracy(self) -> float | None:
        """Share of right labels of the images that the LoRA, or its control, reads; None: there are
        none, or true labels are unknown."""
        adapter, store = self.spec.lora_adapter, self.worker.store
        labels = self.spec.lora_labels if adapter is None else adapter.labels
        if labels is None or not store.has(labels):
            return None
        accuracy: float | None = store.record(labels)["info"].get("accuracy")
        return accuracy

    def _evidence_accuracy(self, errors: Tensor) -> dict[str, float]:
        """Share of the scored pool images whose smallest mean error is that of the true class."""
        scores = mean_scores(errors)
        predicted = self.data.classes.numbers(scores.argmax(dim=1))
        scored = scores.isfinite().any(dim=1)
        right = known_accuracy(predicted[scored], self.true_labels[scored])
        return {} if right is None else {"pool/accuracy_evidence": right}


def balance(labels: Tensor, data: TrialData) -> float:
    """Balance of labels (M,) over the classes of the pool: their entropy divided by its maximum.
    1: all classes have equally many labels."""
    classes = len(data.classes.of_pool)
    counts = labels.bincount(minlength=classes).double()
    shares = counts[counts > 0] / counts.sum()
    return abs(-(shares * shares.log()).sum().item()) / math.log(max(2, classes))


LABELS, TARGETS = ("indices", "labels"), ("starts", "classes", "values")


def _label_arrays(labels: PseudoLabels) -> dict[str, np.ndarray]:
    """Pseudo-labels in a checkpoint."""
    targets = sparse(labels.targets)
    arrays = {name: getattr(labels, name).numpy() for name in LABELS}
    arrays |= {name: getattr(targets, name).numpy() for name in TARGETS}
    return arrays | {"sizes": np.array([targets.num_classes, targets.longest])}


def _state(begun: Checkpoint) -> TrialState:
    if begun is START:
        return TrialState()
    arrays = {name: torch.from_numpy(array) for name, array in begun.arrays.items()}
    labels = None
    if "labels" in arrays:
        num_classes, longest = arrays["sizes"].tolist()
        targets = SparseTargets(
            **{name: arrays[name] for name in TARGETS}, num_classes=num_classes, longest=longest
        )
        labels = PseudoLabels(targets=targets, **{name: arrays[name] for name in LABELS})
    return TrialState(tuple(arrays["prompts"]), labels)


def _test_on_other_dataset(
    spec: TrialSpec, worker: WorkerContext, report: Callable[[int, int], None], folder: Path
) -> dict[str, Any]:
    """Test the prompt of one dataset on another dataset's test images, with its class names.

    The trial without `test_dataset` learns the prompt, once for all test datasets; it sees no image
    and no class name of them (CoCoOp's transfer, arXiv:2203.05557).
    """
    torch.set_num_threads(1)  # as in `open_trial`, which does not run where the prompt exists
    learned = run_trial(replace(spec, test_dataset=None), worker.store, worker.device, report)
    started = time.monotonic()
    assert spec.test_features is not None
    split = SplitSettings(split_seed=spec.split_seed)
    target = read_target(spec.test_features, split, worker.store, spec.test_tokens)
    test = target.labelled(target.split.test)
    classnames, template = target.text.classnames, target.text.template
    backbone = worker.backbone(spec.backbone, spec.precision)
    classifier: Classifier
    if spec.iterations == 0:
        classifier = text_classifier(backbone, classnames, template)
    else:
        prompt = torch.from_numpy(learned.prompt())
        classifier = restored_learner(
            spec.modality, spec.prompt, backbone, classnames, template, prompt
        )
    with torch.no_grad():
        best = classifier.logits(test.images).softmax(dim=-1).max(dim=-1)
    metrics = measured(best.indices, test.labels, Classes(len(classnames)))
    of = {"text": (metrics.predictions, best.values)}
    labels = test.labels.int()
    _write(folder / PREDICTIONS, target.split.test, metrics.predictions, of, labels=labels)
    replaced = ("test/", "time/", "temperature/")  # metrics of the dataset that was learned from
    kept = {name: value for name, value in learned.metrics.items() if not name.startswith(replaced)}
    new = {"test/accuracy_text": metrics.accuracy, "time/test_s": time.monotonic() - started}
    return {
        "device": worker.device,
        "metrics": kept | _test_metrics(metrics) | new,
        "curves": {
            name: values for name, values in learned.curves.items() if not name.startswith(replaced)
        },
        "objectives": learned.objectives,
        "per_class": _recalls(metrics),
    }


def _write(
    file: Path,
    index: Tensor,
    predictions: Tensor,
    classifiers: Mapping[str, tuple[Tensor, Tensor]],
    **more: Tensor,
) -> None:
    """Write the arrays of `TrialRecord.test_arrays` or `pool_arrays`.

    Args:
        classifiers: predictions of each and their probabilities, for N images.
    """
    arrays = {"index": index, "predictions": predictions.int(), **more}
    for name, (predicted, probabilities) in classifiers.items():
        arrays |= {name: predicted.int(), f"probability_{name}": probabilities}
    _save(arrays, file)


def _save(arrays: Mapping[str, Tensor], file: Path) -> None:
    save_file({name: np.asarray(a.cpu(), order="C") for name, a in arrays.items()}, file)


def _recalls(metrics: Metrics) -> list[float | None]:  # JSON has no NaN
    return [None if math.isnan(recall) else recall for recall in metrics.per_class]


def _test_metrics(metrics: Metrics) -> dict[str, float]:
    values = {
        "test/accuracy": metrics.accuracy,
        "test/seen": metrics.seen,
        "test/unseen": metrics.unseen,
        "test/harmonic_mean": metrics.harmonic_mean,
    }
    # Without test images the accuracy is not a number.
    return {n: v for n, v in values.items() if v is not None and not math.isnan(v)}

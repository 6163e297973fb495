"""Export a trial of a store as a bundle, and verify a bundle against its test images.

A bundle contains the trial's classifier. Before a bundle is written, its predictions on the stored
test features are compared with the predictions in the trial's record.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from air_core.bundle import load_bundle
from air_core.bundle.checks import PROMPT, TEST, TEXT, test_metric
from air_core.bundle.manifest import (
    LICENCE,
    Manifest,
    check_free,
    weights_description,
    write_bundle,
)
from air_core.datasets import DATASETS, get_dataset
from air_core.paradigms import seen_unseen
from air_core.specs import Ref, TrialSpec, uses_auxiliary
from air_core.specs.normal import normalised
from orchestrator.errors import MissingArtifact
from orchestrator.formatting import format_percent, plural, show
from orchestrator.keys import artifact_key
from orchestrator.planning import Resolver, plan_of, refs_of
from orchestrator.planning.dataset_text import DatasetText, dataset_licence, recorded_text
from orchestrator.planning.requests import run_command
from orchestrator.planning.resolve import spec_json
from orchestrator.reporting.results import TABLE_COLUMNS, results_of
from orchestrator.reporting.rows import Row, is_bound, row_text, tasks_of
from orchestrator.spec import Cell, SweepSpec
from orchestrator.spec.sweep_file import only_values
from orchestrator.store import ArtifactStore, SweepLocation, TrialRecord, read_trial

BEST = "best"
RUN_BY = "mutual_information"  # an objective that uses no labels
# Provenance fields of a record that a bundle contains.
PROVENANCE_FIELDS = ("commit", "dirty", "code", "device", "versions")
CHUNK = 64  # images that are decoded at once


class PredictionsDifferError(RuntimeError):
    """The exported classifier would not predict what the trial predicted."""


def _report(line: str) -> None:
    show(line, file=sys.stderr)  # stdout contains only the folder


@dataclass(frozen=True)
class SelectedTrial:
    """A finished trial to export."""

    spec: TrialSpec
    record: TrialRecord
    sweep: str | None  # PROJECT/NAME
    slot: str | None
    selection: Mapping[str, Any] | None = None  # how `best` selected it; None: given by name


# ---------------------------------------------------------------- which trial


def best_trial(sweep: SweepSpec, location: SweepLocation, only: Sequence[str]) -> SelectedTrial:
    """The run with the highest `RUN_BY` of the row with the highest mean in the sweep's table.

    A row of a searched cell is the point that the table shows. Test labels choose neither the point
    nor the run, but they do choose the row. A message on stderr states this.

    Args:
        only: `key=value[,value]` each; restrict the rows to these cells of the grid.

    Raises:
        ValueError: no trial is finished, or the rows belong to several tasks.
    """
    store = location.store
    plan = plan_of(sweep, location)
    every = results_of(plan, store).rows
    cells = _cells(plan.cells, only_values(sweep, only))
    candidates = [row for row in every if row.cell in cells and not is_bound(row.method)]
    if not candidates:
        raise ValueError(_no_candidates(location, only, every))
    tasks = tasks_of(candidates)
    if len(tasks) > 1:
        listed = "; ".join("/".join(task) for task in tasks)
        keys = [key for key in TABLE_COLUMNS if key in sweep.grid and key != "method"] or ["method"]
        raise ValueError(
            f"{sweep.name} has no single best row, because these cannot be compared: {listed}; "
            f"give --only KEY=VALUE with {', '.join(keys)}"
        )
    row = max(candidates, key=lambda row: row.mean)  # the first of equal ones
    runs = {
        slot.key.digest: slot
        for slot in plan.slots
        if (slot.cell.id, slot.point) == (row.cell, row.point) and store.has(slot.spec)
    }
    records = [(slot, read_trial(slot.spec, store)) for slot in runs.values()]
    slot, record = max(records, key=lambda pair: pair[1].objectives[RUN_BY])
    selection = {
        "row": {"method": row.method, "settings": row.settings, "mean": row.mean, "n": row.n},
        "rows": len(candidates),
        "row_by": f"mean test {row.metric.replace('_', ' ')}",
        "run_by": RUN_BY,
        "trials_left": plan.to_run,
        "note": _caveat(len(candidates)),
    }
    reason = f"; the run with the highest {RUN_BY}, which uses no labels" if row.n > 1 else ""
    _report(
        f"best row: {row_text(row, [*row.settings])}, {selection['row_by']} "
        f"{format_percent(row.mean)} % over {plural(row.n, 'run')}"
    )
    _report(f"run:      {slot.id}, {format_percent(record.headline)} %{reason}")
    _report(f"note:     {selection['note']}")
    if plan.to_run:
        left = plural(plan.to_run, "trial")
        _report(f"note:     the sweep has {left} left to run, which may change the best row")
    spec = normalised(slot.spec)
    return SelectedTrial(spec, record, location.full_name, slot.id, selection)


def _cells(cells: Iterable[Cell], only: Mapping[str, Sequence[Any]]) -> set[str]:
    """Ids of the cells whose settings have one of these values for each key that they have."""
    ids = set()
    for cell in cells:
        flat = {**cell.flat, "method": cell.method}
        settings = cell.chosen | {key: flat.get(key) for key in TABLE_COLUMNS}
        if all(key not in settings or settings[key] in values for key, values in only.items()):
            ids.add(cell.id)
    return ids


def _no_candidates(location: SweepLocation, only: Sequence[str], every: Sequence[Row]) -> str:
    if not every:
        return f"no trial of {location.name} is done yet; run `{run_command(location)}` first"
    rows = "; ".join(dict.fromkeys(f"{'/'.join(row.task)} {row.method}" for row in every))
    return (
        f"--only {' --only '.join(only)}: no finished trial of {location.name} matches; "
        f"finished: {rows}"
    )


def _caveat(candidates: int) -> str:
    if candidates == 1:
        return "There is only one row, so test labels chose nothing."
    return (
        f"The row is the best of {candidates} on their test images, so its accuracy on new images "
        "is likely to be slightly lower; test labels chose neither its setting nor its run."
    )


# ---------------------------------------------------------------- export


def export(
    trial: SelectedTrial,
    store: ArtifactStore,
    resolver: Resolver,
    folder: Path,
    replace_bundle: bool = False,
) -> None:
    """Write the bundle of a trial to a folder.

    Args:
        replace_bundle: whether to replace a bundle in the folder.

    Raises:
        ValueError: the trial has no prompt, an input has changed, or the folder is not empty.
        PredictionsDifferError: the prompt does not reproduce the recorded predictions.
    """
    check_free(folder, replace_bundle)
    spec, record = trial.spec, trial.record
    if spec.iterations == 0 and spec.test_dataset is None:
        _refuse_fused(trial)
    tested = _tested_text(spec, store, resolver)
    _check_unchanged(spec.backbone, resolver.weights("backbone", spec.backbone.name))
    backbone, arrays = _classifier(spec, record, store, tested)
    weights = weights_description(spec.backbone.name)
    index, predictions, labels = record.predictions()
    arrays[TEST] = {"index": index, "predictions": predictions, "labels": labels}
    model = weights["open_clip"]["model_name"]
    # The bundle does not contain the path of the backbone on this machine.
    named = replace(spec, backbone=replace(spec.backbone, name=weights["name"] or model))
    content = {
        "made_by": f"airsweep {version('airsweep')}",
        "classnames": list(tested.classnames),
        "template": tested.template,
        "modality": spec.modality,
        "prompt": asdict(spec.prompt) if spec.iterations else None,
        "backbone": {
            **weights,
            "digest": spec.backbone.digest,
            "precision": spec.precision,
            "preprocess": dict(backbone.model.visual.preprocess_cfg),
        },
        # JSON has no NaN, which is the accuracy over zero images.
        "metrics": {name: v for name, v in record.metrics.items() if math.isfinite(v)},
        "test": _test(spec, tested, len(index)),
        "lineage": {
            "trial_key": record.key,
            "sweep": trial.sweep,
            "slot": trial.slot,
            "inputs": {name: asdict(ref) for name, ref in refs_of(named).items()},
            "spec": json.loads(spec_json(named, str(artifact_key(spec)))),
            **{name: record.provenance.get(name) for name in PROVENANCE_FIELDS},
        },
        "chosen": trial.selection,
        "licence": LICENCE,
        "licences": {
            ref.name: dataset_licence(ref.name)
            for ref in (spec.dataset, spec.test_dataset or spec.dataset)
        },
    }

    def check(manifest: Manifest) -> None:
        _check_predictions(manifest, backbone, trial, store)

    write_bundle(folder, content, arrays, replace_bundle, check)


def _refuse_fused(trial: SelectedTrial) -> None:
    """Refuse a trial without training whose classifier is more than a text classifier."""
    spec, name = trial.spec, trial.slot or trial.record.path.name
    if uses_auxiliary(spec):
        classifier = "the text classifier fused with an auxiliary classifier of images"
    elif spec.transduction != "none":
        classifier = "text scores refined over the whole pool"
    else:
        return
    raise ValueError(
        f"{name} learns no prompt. It tests {classifier}, which a bundle cannot contain; export a "
        "trial with iterations > 0, or zero_shot"
        + ("; with best, exclude this trial by --only method=..." if trial.selection else "")
    )


def _tested_text(spec: TrialSpec, store: ArtifactStore, resolver: Resolver) -> DatasetText:
    """The class names and template that the trial was tested with.

    They come from the record of the features or, if it has none, from the unchanged dataset.
    """
    recorded = recorded_text(spec.test_features or spec.features, store)
    if recorded is not None:
        return recorded
    recorded_ref = spec.test_dataset or spec.dataset
    dataset = get_dataset(recorded_ref.name)
    try:
        current_ref = resolver.dataset(dataset)
    except ValueError:
        _report(
            f"note:     {recorded_ref.name} is missing on this machine; using the class names that "
            "airsweep defines for it"
        )
    else:
        _check_unchanged(recorded_ref, current_ref)
    return DatasetText(dataset.classnames, dataset.template)


def _check_unchanged(recorded: Ref, current: Ref) -> None:
    """Refuse weights or a dataset that changed since the trial: the classifier would differ."""
    if recorded.digest != current.digest:
        raise ValueError(
            f"{recorded.name} has changed since the trial: its digest is {current.digest[:12]}, "
            f"the trial used {recorded.digest[:12]}; restore the old version, or run the sweep "
            "again"
        )


def _classifier(
    spec: TrialSpec, record: TrialRecord, store: ArtifactStore, tested: DatasetText
) -> tuple[Any, dict[str, dict[str, np.ndarray]]]:
    """The backbone, and the arrays of a bundle except its test arrays."""
    import torch

    from air_core.backbone.loading import load_backbone
    from air_core.classifiers import class_texts

    torch.set_num_threads(1)  # as in the trial, for bit-equal results
    trained_on = record.provenance.get("device") or "cpu"
    device = "cuda" if trained_on == "cuda" and torch.cuda.is_available() else "cpu"
    backbone = load_backbone(spec.backbone.name, device, spec.precision)
    arrays: dict[str, dict[str, np.ndarray]] = {}
    if spec.iterations:
        # The prompt of a trial with a test dataset is in the record of the trial without one.
        source = read_trial(replace(spec, test_dataset=None), store)
        arrays[PROMPT] = {"prompt": source.prompt()}
    if spec.iterations and spec.modality == "text":
        context = torch.from_numpy(arrays[PROMPT]["prompt"]).to(device)
        with torch.no_grad():
            texts = backbone.encode_context(context, tested.classnames)
    else:
        texts = class_texts(backbone, tested.classnames, tested.template)
    scale = np.array(backbone.logit_scale, dtype=np.float32)
    arrays[TEXT] = {"text_features": texts.cpu().numpy(), "logit_scale": scale}
    return backbone, arrays


def _test(spec: TrialSpec, tested: DatasetText, images: int) -> dict[str, Any]:
    ref = spec.test_dataset or spec.dataset
    unseen = None
    if spec.paradigm == "trzsl":
        unseen = list(seen_unseen(len(tested.classnames), spec.class_seed)[1])
    return {"dataset": ref.name, "digest": ref.digest, "images": images, "unseen": unseen}


def _check_predictions(
    manifest: Manifest, backbone: Any, trial: SelectedTrial, store: ArtifactStore
) -> None:
    """Compare the bundle's predictions on the trial's test features with the recorded ones."""
    import torch
    from safetensors.torch import load_file

    from air_core.bundle.classifier import Bundle

    spec = trial.spec
    features = spec.test_features or spec.features
    inputs = (spec.test_tokens if spec.test_dataset else spec.tokens) or features
    try:
        file = store.get(inputs).path / "features.safetensors"
    except MissingArtifact:
        _report(
            "note:     predictions not compared with the record, because the features of "
            f"{inputs.dataset.name} are no longer in the store; run `airsweep verify` to compare "
            "them on the images"
        )
        return
    test = manifest.arrays[TEST]
    encoded = load_file(file)["features"][torch.from_numpy(test["index"])]
    predictions = Bundle(manifest, backbone).logits_of(encoded).argmax(dim=-1).numpy()
    different = int((predictions != test["predictions"]).sum())
    if different:
        made = trial.record.provenance
        raise PredictionsDifferError(
            f"with the prompt of {trial.record.path.name}, predictions differ from the trial's on "
            f"{different} of {len(predictions)} test images, so no bundle was written. The trial "
            f"ran on {made.get('device')} with commit {made.get('commit')}: export it with these, "
            "or run the sweep again"
        )


# ---------------------------------------------------------------- verify


@dataclass(frozen=True)
class Verification:
    """A bundle scored again on the images that its trial was tested on."""

    folder: str
    dataset: str
    metric: str
    images: int
    recorded_metric: float  # the metric as recorded
    current_metric: float
    different: int  # images whose prediction differs from the recorded one
    margin: float  # largest logit difference between both predictions of such an image

    @property
    def same(self) -> bool:
        return self.recorded_metric == self.current_metric and not self.different

    def json(self) -> dict[str, Any]:
        # Names in the output, where they differ from the attributes.
        names = {
            "recorded_metric": "then",
            "current_metric": "now",
            "different": "told_otherwise",
        }
        return {"same": self.same, **{names.get(k, k): v for k, v in asdict(self).items()}}

    def lines(self) -> list[str]:
        images = f"{self.images:,} test images of {self.dataset}"
        if self.same:
            return [
                f"{self.folder}: all predictions are equal; {self.metric} "
                f"{format_percent(self.current_metric)} % on {images}"
            ]
        change = f"{100 * (self.current_metric - self.recorded_metric):+.2f} points"
        return [
            f"{self.folder}: different; {self.metric} {format_percent(self.current_metric)} % now, "
            f"{format_percent(self.recorded_metric)} % recorded ({change}), on {images}",
            f"  {plural(self.different, 'prediction')} differ, by up to "
            f"{self.margin:.2g} in logits" + (": rounding" if self.margin < 1e-3 else ""),
        ]


Watch = Callable[[Iterable[int], int], Iterable[int]]


def verify(
    folder: Path,
    resolver: Resolver,
    weights: str | None = None,
    device: str = "cpu",
    watch: Watch = lambda starts, batches: starts,
    dataset_name: str | None = None,
) -> Verification:
    """Score a bundle on the test images of its trial instead of their stored features.

    Args:
        watch: wraps the batches, to show progress.
        dataset_name: the dataset on this machine; None: the one that the bundle names. A bundle
            cannot name a folder, for security.

    Raises:
        ValueError: the folder has no valid bundle, the backbone is another one, or the dataset is
            missing or has changed.
    """
    import torch

    from air_core.evaluation import measured

    bundle = load_bundle(folder, weights, device)
    manifest = bundle.manifest
    test = manifest.content["test"]
    name = dataset_name or test["dataset"]
    if dataset_name is None and name not in DATASETS:
        raise ValueError(
            f"{folder} was tested on {name!r}. A folder that a bundle names is never opened; give "
            "--dataset folder:PATH, the folder with these images on this machine"
        )
    dataset = get_dataset(name)
    digest = resolver.dataset(dataset).digest
    if digest != test["digest"]:
        raise ValueError(
            f"{dataset.name} differs from the dataset that {folder} was tested on: its digest is "
            f"{digest[:12]}, not {test['digest'][:12]}; give the folder of the datasets with "
            "--data-root"
        )
    examples = dataset.load(resolver.data_root)
    index = manifest.arrays[TEST]["index"]
    if index.max() >= len(examples.images) or examples.labels.max() >= len(manifest.classnames):
        raise ValueError(
            f"{folder} is not a valid bundle: {dataset.name} does not have the images or classes "
            "that it was tested on; export it again"
        )
    starts = range(0, len(index), CHUNK)
    parts = []
    for start in watch(starts, len(starts)):
        chunk = index[start : start + CHUNK]
        parts.append(bundle.logits([examples.images[int(i)] for i in chunk]))
    logits = torch.cat(parts)
    predictions = logits.argmax(dim=-1)
    recorded = torch.from_numpy(manifest.arrays[TEST]["predictions"]).long()
    different = predictions != recorded
    margins = (logits.amax(dim=-1) - logits.gather(1, recorded[:, None])[:, 0])[different]
    unseen = None if test["unseen"] is None else torch.tensor(test["unseen"])
    labels = torch.from_numpy(examples.labels[index])
    scores = measured(predictions, labels, len(manifest.classnames), unseen)
    metric = test_metric(test)
    return Verification(
        folder=str(folder),
        dataset=dataset.name,
        metric=metric.removeprefix("test/").replace("_", " "),
        images=len(index),
        recorded_metric=manifest.content["metrics"][metric],
        current_metric=scores.headline,
        different=int(different.sum()),
        margin=float(margins.max()) if len(margins) else 0.0,
    )

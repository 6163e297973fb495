"""Export a trial of a store as a bundle.

A bundle contains all classifiers of the trial. Before it is written, their predictions on the
stored test features are compared with those in the trial's record.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from air_core.bundle.checks import CLASSIFIERS, FUSED, PROMPT, TEXT
from air_core.bundle.content import modalities
from air_core.bundle.manifest import (
    LICENCE,
    Manifest,
    check_free,
    weights_description,
    write_bundle,
)
from air_core.datasets import get_dataset
from air_core.paradigms import seen_unseen
from air_core.settings import Ref
from air_core.settings.conditions import has_context
from orchestrator.keys import artifact_key
from orchestrator.planning import Resolver, refs_of
from orchestrator.planning.resolve import spec_json
from orchestrator.reporting.notes import chance_caution
from orchestrator.reporting.selection import SelectedTrial, report_line
from orchestrator.stages import FeaturesSpec, TrialSpec
from orchestrator.stages.dataset_text import DatasetText, dataset_licence, recorded_text
from orchestrator.store import ArtifactStore, TrialRecord, read_trial

if TYPE_CHECKING:
    from air_core.bundle.classifier import Bundle

# Provenance fields of a record that a bundle contains.
PROVENANCE_FIELDS = ("commit", "code", "device", "versions")
CHUNK = 64  # images that are decoded at once


class PredictionsDifferError(RuntimeError):
    """The exported classifier would not predict what the trial predicted."""


def export(
    trial: SelectedTrial,
    store: ArtifactStore,
    resolver: Resolver,
    folder: Path,
    replace_bundle: bool = False,
    onnx: bool = False,
) -> None:
    """Write the bundle of a trial to a folder.

    Args:
        replace_bundle: whether to replace a bundle in the folder.
        onnx: whether to write `model.onnx`.

    Raises:
        ValueError: a package for ONNX or the features of the trial are missing, the trial does not
            have the selected classifier, an input has changed, or the folder is not empty.
        PredictionsDifferError: a classifier does not reproduce the recorded predictions.
    """
    from air_core.bundle.classifier import Bundle

    check_free(folder, replace_bundle)
    if onnx:
        from air_core.bundle.onnx import check_packages

        check_packages("onnx", "onnxscript", "onnxruntime")
    spec, record = trial.spec, trial.record
    if spec.iterations and spec.modality not in modalities():
        raise ValueError(
            f"{trial.slot or record.path.name} has the learner {spec.modality!r}; a "
            f"bundle, which contains no code, can have: {', '.join(modalities())}; add --only "
            "modality=text, or read the predictions by airsweep.predictions(TRIAL) in Python"
        )
    tests = record.test_arrays()
    index = tests["index"]
    recorded = {name: tests[name] for name in CLASSIFIERS if name in tests}  # (T,) each
    if trial.classifier not in (None, *recorded):
        raise ValueError(
            f"{trial.slot or record.path.name} has no {trial.classifier} classifier to export; it "
            f"has: {', '.join(recorded)}"
        )
    tested = _tested_text(spec, store)
    cautions = _cautions(trial, recorded, len(tested.classnames))
    selected = trial.classifier or record.default_classifier()
    for line in filter(None, [cautions.get(selected), *trial.lines]):
        report_line(line)
    _check_unchanged(spec.backbone, resolver.weights("backbone", spec.backbone.name))
    backbone, arrays = _text_classifier(spec, record, store, tested)
    if "fused" in recorded:
        arrays[FUSED] = record.fused_arrays()
    weights = weights_description(spec.backbone.name)
    model = weights["open_clip"]["model_name"]
    # The bundle does not contain the path of the backbone on this machine.
    named = replace(spec, backbone=replace(spec.backbone, name=weights["name"] or model))
    content = {
        "made_by": f"airsweep {version('airsweep')}",
        "classnames": list(tested.classnames),
        "template": tested.template,
        "modality": spec.modality,
        "prompt": asdict(spec.prompt) if spec.iterations else None,
        "classifier": selected,
        "space": spec.fusion.space,
        "temperatures": {
            name: record.metrics[f"temperature/{name}"]
            for name in recorded
            if f"temperature/{name}" in record.metrics
        },
        "bank_images": len(arrays.get(FUSED, {}).get("auxiliary.labels", ())),
        "backbone": {
            **weights,
            "digest": spec.backbone.digest,
            "precision": spec.precision,
            "preprocess": dict(backbone.model.visual.preprocess_cfg),
        },
        # JSON has no NaN, which is the accuracy over zero images.
        "metrics": {name: v for name, v in record.metrics.items() if math.isfinite(v)},
        "cautions": cautions,
        "unseen": [*seen_unseen(len(tested.classnames), spec.class_seed)[1]]
        if spec.paradigm == "trzsl"
        else None,
        "lineage": {
            "trial_key": record.key,
            "sweep": trial.sweep,
            "slot": trial.slot,
            "inputs": {
                name: {"name": ref.name, "digest": ref.digest}
                for name, ref in refs_of(named).items()
            },
            "spec": json.loads(spec_json(named, artifact_key(spec).digest[:12])),
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
        bundle = Bundle(manifest, backbone)
        _check_predictions(bundle, recorded, index, trial, store)
        if onnx:
            _compare_onnx(bundle, recorded[bundle.classifier], index, spec, resolver)

    def model_onnx(manifest: Manifest) -> bytes:
        from air_core.bundle.onnx import onnx_bytes

        return onnx_bytes(Bundle(manifest, backbone))

    write_bundle(folder, content, arrays, replace_bundle, check, model_onnx if onnx else None)


def _cautions(
    trial: SelectedTrial, recorded: Mapping[str, np.ndarray], classes: int
) -> dict[str, str]:
    """A sentence for each classifier that is not better than guessing on the test images."""
    labels = trial.record.test_arrays()["labels"]
    if trial.spec.paradigm == "trzsl" or not len(labels):
        return {}
    right = {name: int((predicted == labels).sum()) for name, predicted in recorded.items()}
    images = "test images of the trial"
    cautions = {name: chance_caution(n, len(labels), classes, images) for name, n in right.items()}
    return {name: text for name, text in cautions.items() if text}


def _tested_text(spec: TrialSpec, store: ArtifactStore) -> DatasetText:
    """The class names and template that the trial was tested with."""
    text = recorded_text(spec.test_features or spec.features, store)
    if text is None:
        raise ValueError(
            "the store lacks the features of the trial, with which a bundle is compared; run its "
            "sweep again, then export it"
        )
    return text


def _check_unchanged(recorded: Ref, current: Ref) -> None:
    """Refuse weights or a dataset that changed since the trial: the classifier would differ."""
    if recorded.digest != current.digest:
        raise ValueError(
            f"{recorded.name} has changed since the trial: its digest is {current.digest[:12]}, "
            f"the trial used {recorded.digest[:12]}; restore the old version, or run the sweep "
            "again"
        )


def _text_classifier(
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
    if has_context(spec):
        context = torch.from_numpy(arrays[PROMPT]["prompt"]).to(device)
        with torch.no_grad():
            texts = backbone.encode_context(context, tested.classnames)
    else:
        texts = class_texts(backbone, tested.classnames, tested.template)
    scale = np.array(backbone.logit_scale, dtype=np.float32)
    arrays[TEXT] = {"text_features": texts.cpu().numpy(), "logit_scale": scale}
    return backbone, arrays


def _check_predictions(
    bundle: Bundle,
    recorded: Mapping[str, np.ndarray],
    index: np.ndarray,
    trial: SelectedTrial,
    store: ArtifactStore,
) -> None:
    """Compare the bundle's predictions on the trial's test features with the recorded ones."""
    import torch
    from safetensors.torch import load_file

    from air_core.types import Encoded

    spec, rows = trial.spec, torch.from_numpy(index)

    def encoded(features: FeaturesSpec) -> Any:
        return load_file(store.get(features).path / "features.safetensors")["features"][rows]

    tokens = spec.test_tokens if spec.test_dataset else spec.tokens
    batch = Encoded(
        encoded(spec.test_features or spec.features), encoded(tokens) if tokens else None
    )
    for name, predictions in recorded.items():
        found = bundle.logits_of(batch, name).argmax(dim=-1).numpy()
        if different := int((found != predictions).sum()):
            made = trial.record.provenance
            raise PredictionsDifferError(
                f"the {name} classifier of {trial.record.path.name} predicts other classes than "
                f"the trial for {different} of {len(index)} test images, so no bundle was written. "
                f"The trial ran on {made.get('device')} with commit {made.get('commit')}: export "
                "it with these, or run the sweep again"
            )
    report_line(
        f"compared: {', '.join(recorded)}: all predictions on {len(index):,} test images are those "
        "of the trial"
        if len(index)
        else "note:     the trial has no test images, so no predictions were compared"
    )


def _compare_onnx(
    bundle: Bundle, recorded: np.ndarray, index: np.ndarray, spec: TrialSpec, resolver: Resolver
) -> None:
    """Print how much `model.onnx` differs from torch and the record on the test images."""
    from air_core.bundle.onnx import OnnxBundle

    ref = spec.test_dataset or spec.dataset
    dataset = get_dataset(ref.name)
    try:
        if not len(index):
            raise ValueError("the trial has no test images")
        _check_unchanged(ref, resolver.dataset(dataset))
    except ValueError as problem:
        report_line(f"note:     model.onnx not compared with torch, because {problem}")
        return
    images = dataset.load(resolver.data_root).images
    model, largest, predicted = OnnxBundle(bundle.manifest), 0.0, []
    for start in range(0, len(index), CHUNK):
        chunk = [images[int(i)] for i in index[start : start + CHUNK]]
        found = model.scores(chunk)  # (N, C)
        largest = max(largest, float((found - bundle.scores(chunk)).abs().max()))
        predicted.append(found.argmax(dim=1).numpy())
    different = int((np.concatenate(predicted) != recorded).sum())
    equal = f"{different:,} of" if different else "all"
    report_line(
        f"onnx:     {bundle.classifier} classifier; probabilities differ from torch by at most "
        f"{largest:.1g}, {equal} {len(index):,} predictions on test images "
        f"{'differ from' if different else 'are'} those of the trial"
    )

"""The data of a trial, read from the store."""

from __future__ import annotations

import torch
from safetensors.numpy import load_file

from air_core.diffusion.lora_labels import first_of_each_class
from air_core.method import TrialData
from air_core.settings.conditions import fills_bank
from air_core.types import Classes, Labelled
from orchestrator.stages.context import WorkerContext
from orchestrator.stages.evidence import read_evidence
from orchestrator.stages.features import Target
from orchestrator.stages.synthetic import read_synthetic
from orchestrator.stages.trial import TrialSpec
from orchestrator.store import ArtifactStore


def read_data(spec: TrialSpec, target: Target, worker: WorkerContext) -> TrialData:
    """Read the data of a trial from the store.

    Raises:
        MissingArtifact: an input was not prepared.
    """
    split, scored, errors = target.split, spec.evidence_errors, None
    if scored is not None:
        errors = read_evidence(scored, spec.evidence.draws, spec.evidence.images, worker.store)
    return TrialData(
        backbone=worker.backbone(spec.backbone, spec.precision),
        classnames=target.text.classnames,
        template=target.text.template,
        pool=target.batch(split.pool),
        labelled=target.labelled(split.labelled) if len(split.labelled) else None,
        unseen=split.unseen,
        validation=target.labelled(split.validation) if len(split.validation) else None,
        test=target.labelled(split.test),
        synthetic=_bank(spec, target, worker.store),
        evidence=errors,
    )


def _bank(spec: TrialSpec, target: Target, store: ArtifactStore) -> Labelled | None:
    """The images that `images_from` names, the first of each class; None: the trial reads none.

    The ceiling alone reads true labels of the pool: it is a bound and no method.
    """
    if not fills_bank(spec):
        return None
    names = target.text.classnames
    classes = Classes(len(names), target.split.unseen)
    match spec.images_from:
        case "lora_images":
            images = _lora_images(spec, target, store)
        case "true_labels":
            images = target.labelled(target.split.pool)
        case _:
            return _synthetic(spec, classes, store)
    lacking = sorted(set(classes.of_pool.tolist()) - set(images.labels.tolist()))
    if lacking:
        raise ValueError(
            f"the pool of {len(target.split.pool)} images has none for class "
            f"{names[lacking[0]]!r} (images_from: {spec.images_from}); use a larger pool, or leave "
            "the control and the bounds of AiR out"
        )
    images = images.of(classes)
    generator = torch.Generator().manual_seed(spec.split_seed)
    shuffled = images[torch.randperm(len(images), generator=generator)]
    return shuffled[first_of_each_class(shuffled.labels, spec.images_per_class)]


def _synthetic(spec: TrialSpec, classes: Classes, store: ArtifactStore) -> Labelled:
    """Synthetic images; in TRZSL only those of unseen classes."""
    row, tokens = spec.synthetic_features, spec.synthetic_tokens
    assert row is not None
    drawn = read_synthetic(row, spec.images_per_class, store, classes.of_pool.tolist(), tokens)
    if not len(drawn):
        raise ValueError(
            f"every image that {row.images.model.name} has drawn is blank; check generation.size, "
            "num_inference_steps, guidance_scale and precision"
        )
    if spec.images_from != "shifted_labels":
        return drawn
    present = torch.tensor(sorted(set(drawn.labels.tolist())))
    shifted = present.roll(-1)[torch.searchsorted(present, drawn.labels)]
    return Labelled(drawn.images, shifted)


def _lora_images(spec: TrialSpec, target: Target, store: ArtifactStore) -> Labelled:
    """The images that a LoRA is trained on, with the labels of its captions."""
    assert spec.lora_labels is not None
    selected = load_file(store.get(spec.lora_labels).path / "labels.safetensors")
    batch = target.batch(torch.from_numpy(selected["index"]))
    return Labelled(batch, torch.from_numpy(selected["labels"]))

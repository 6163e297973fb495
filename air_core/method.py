"""The paper, top to bottom: AiR (Ren et al., CVPR 2025, arXiv:2504.11930).

Frozen features, pseudo-labels from the text classifier fused with an auxiliary classifier on
synthetic images, a prompt learned on both, again with the better prompt. LoRA and images are made
before (`air_core.diffusion`); here they are features. Without images it is the host method.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from air_core import evaluation
from air_core.backbone import Backbone
from air_core.classifiers import (
    Classifier,
    FusedClassifier,
    LinearClassifier,
    auxiliary_classifier,
    fuse,
    high_fidelity,
    text_classifier,
)
from air_core.prompts import build_learner
from air_core.pseudo_labels import assign
from air_core.pseudo_labels.top_k import balanced_choice
from air_core.specs import TrialSpec, trains_on_synthetic, uses_auxiliary
from air_core.training import fit
from air_core.types import Batch, Labelled, Metrics, PseudoLabels, TrialResult

FADED = 8  # synthetic images per class that stay in the bank to the end


@dataclass(frozen=True)
class TrialData:
    """All that a trial sees. True labels of the pool are not in it."""

    backbone: Backbone
    classnames: Sequence[str]
    template: str
    pool: Batch
    validation: Labelled | None
    test: Labelled
    synthetic: Labelled | None  # with the class that each image was drawn for


@dataclass(frozen=True)
class Progress:
    """What a round did, for whoever watches."""

    iteration: int
    labels: PseudoLabels
    loss: float
    learned: Classifier


def ignore(progress: Progress) -> None:
    """Nobody watches."""


def learn(
    spec: TrialSpec, data: TrialData, report: Callable[[Progress], None] = ignore
) -> TrialResult:
    """Learn a prompt from pseudo-labelled real images and labelled synthetic ones.

    `spec.iterations = 0` is CLIP without learning. The prompt of the last round is tested: no
    round is picked afterwards.
    """
    started = time.monotonic()
    teacher: Classifier = text_classifier(data.backbone, data.classnames, data.template)
    auxiliary = build_auxiliary(spec, data, fused(spec, data, teacher, None), 0)
    labels = None
    for iteration in range(spec.iterations):
        scores = fused(spec, data, teacher, auxiliary)
        if spec.auxiliary.refresh and iteration > 0:
            auxiliary = build_auxiliary(spec, data, scores, iteration)
            scores = fused(spec, data, teacher, auxiliary)
        labels = assign(
            scores.scores(data.pool).detach(),
            spec.pseudo_labels,
            iteration=iteration,
            iterations=spec.iterations,
            previous=labels,
        )
        learner = build_learner(
            spec.modality, spec.prompt, data.backbone, data.classnames, spec.seed
        )
        loss = fit(
            learner,
            real=data.pool[labels.indices],
            targets=labels.targets,
            synthetic=data.synthetic if trains_on_synthetic(spec) else None,
            synthetic_weight=spec.synthetic_weight,
            settings=spec.train,
            seed=spec.seed * 1009 + iteration,
        )
        report(Progress(iteration, labels, loss, learner))
        teacher = learner
    return evaluate(spec, data, teacher, auxiliary, started)


def fused(
    spec: TrialSpec, data: TrialData, teacher: Classifier, auxiliary: LinearClassifier | None
) -> FusedClassifier:
    """The teacher with the auxiliary classifier beside it."""
    return fuse(teacher, auxiliary, data.pool, spec.fusion_weight, spec.auxiliary.temperature)


@torch.no_grad()
def build_auxiliary(
    spec: TrialSpec, data: TrialData, believed: FusedClassifier, iteration: int
) -> LinearClassifier | None:
    """The auxiliary classifier of this round; None: nothing is fused.

    Real images are those that `believed` is most sure of, k per class and `k_step` more in each
    round, while synthetic ones may leave (`fade`).
    """
    if not uses_auxiliary(spec):
        return None
    settings, classes = spec.auxiliary, len(data.classnames)
    synthetic = real = None
    if settings.source != "real" and data.synthetic is not None:
        bank = data.synthetic
        if settings.fade:
            bank = faded(bank, iteration / max(1, spec.iterations - 1))
        synthetic = high_fidelity(bank, spec.fidelity)
    if settings.source != "synthetic":
        # No more places than images: else a class that is nobody's first choice would get none.
        most = max(1, len(data.pool) // classes)
        places = torch.full((classes,), min(settings.k + settings.k_step * iteration, most))
        taken = balanced_choice(believed.scores(data.pool), places)
        chosen = (taken >= 0).nonzero().flatten()
        real = Labelled(data.pool[chosen], taken[chosen])
    return auxiliary_classifier(
        settings, synthetic, real, data.pool, classes, data.backbone.logit_scale
    )


def faded(bank: Labelled, progress: float) -> Labelled:
    """The first images of each class: all of them at progress 0, FADED per class at 1."""
    keep = []
    for c in sorted(set(bank.labels.tolist())):
        members = (bank.labels == c).nonzero().flatten()
        keep.append(members[: max(FADED, round(len(members) * (1 - progress)))])
    index = torch.cat(keep)
    return Labelled(bank.batch[index], bank.labels[index])


@torch.no_grad()
def evaluate(
    spec: TrialSpec,
    data: TrialData,
    teacher: Classifier,
    auxiliary: LinearClassifier | None,
    started: float,
) -> TrialResult:
    """Test accuracy of the learned prompt, and of the fused and auxiliary classifiers beside it."""
    test = data.test.batch
    both = fused(spec, data, teacher, auxiliary)

    def tested(scores: Tensor) -> Metrics:
        return evaluation.accuracy(scores.argmax(dim=-1), data.test.labels, len(data.classnames))

    text = tested(teacher.logits(test))
    # Where nothing was learned, the fused classifier is all that the images have changed.
    metrics = text if spec.iterations else tested(both.scores(test))
    inference = {"text": text.accuracy}
    if auxiliary is not None:
        inference["fused"] = tested(both.scores(test)).accuracy
        inference["auxiliary"] = tested(auxiliary.logits(test)).accuracy
    return TrialResult(
        objectives=evaluation.objectives(teacher, data.pool, data.validation),
        test=metrics,
        inference=inference,
        pool_predictions=both.scores(data.pool).argmax(dim=-1),
        seconds=time.monotonic() - started,
    )

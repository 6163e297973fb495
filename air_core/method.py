"""The paper, top to bottom: AiR (Ren et al., CVPR 2025, arXiv:2504.11930).

Frozen features, pseudo-labels from the text classifier fused with an auxiliary classifier on
synthetic images, a prompt learned on both, again with the better prompt. LoRA and images are made
before (`air_core.diffusion`); here they are features. Without images it is the host method; from
labelled images alone it is CoOp or VPT.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from air_core import evaluation
from air_core.auxiliary import (
    AuxiliaryClassifier,
    auxiliary_classifier,
    credible,
    high_fidelity,
)
from air_core.backbone import Backbone
from air_core.classifiers import (
    Classifier,
    FusedClassifier,
    LinearClassifier,
    Remembered,
    fuse,
    text_classifier,
)
from air_core.prompts import PromptLearner, build_learner, restored_learner
from air_core.pseudo_labels import assign, spread
from air_core.pseudo_labels.top_k import balanced_choice
from air_core.specs import TrialSpec, trains_on_real, trains_on_synthetic, uses_auxiliary
from air_core.training import Targeted, Training, fit
from air_core.transduction import transductive
from air_core.types import Batch, Labelled, Metrics, PseudoLabels, TrialResult

T = TypeVar("T")
Learning = Generator[Training, Any, T]  # asks for training, hears the loss (float), returns T

FADED = 8  # synthetic images per class that stay in the bank to the end


@dataclass(frozen=True)
class TrialData:
    """All that a trial sees. True labels of the pool are not in it."""

    backbone: Backbone
    classnames: Sequence[str]
    template: str
    pool: Batch
    labelled: Labelled | None  # SSL: the shots; TRZSL: images of seen classes; None in UL
    unseen: Tensor | None  # (U,) TRZSL: the classes that pool images are from
    validation: Labelled | None
    test: Labelled
    synthetic: Labelled | None  # with the class that each image was drawn for


@dataclass(frozen=True)
class SoFar:
    """A trial between two rounds: all that the next one begins with."""

    prompts: tuple[Tensor, ...] = ()  # as each round has left it, on the CPU
    labels: PseudoLabels | None = None  # of the last round


NOTHING = SoFar()


@dataclass(frozen=True)
class Progress:
    """What a round did, for whoever watches."""

    iteration: int
    labels: PseudoLabels | None  # None: the prompt was learned from labelled images alone
    loss: float
    learned: Classifier
    teacher: Classifier  # the same, with what it has seen remembered
    so_far: SoFar


def learn(
    spec: TrialSpec,
    data: TrialData,
    report: Callable[[Progress], None] = lambda progress: None,
    share_done: Callable[[float], None] = lambda share: None,
) -> TrialResult:
    """One trial by itself: see `learning`."""
    [result] = learn_together([learning(spec, data, report, share_done)])
    if isinstance(result, Exception):
        raise result
    assert result is not None, "it was not asked to stop"
    return result


def learning(
    spec: TrialSpec,
    data: TrialData,
    report: Callable[[Progress], None] = lambda progress: None,
    share_done: Callable[[float], None] = lambda share: None,
    so_far: SoFar = NOTHING,
    until: int | None = None,
) -> Learning[TrialResult | None]:
    """Learn a prompt from pseudo-labelled real images and labelled synthetic ones.

    `spec.iterations = 0` is CLIP without learning. The prompt of the last round is tested: no
    round is picked afterwards. What a round trains is yielded, to be trained with other trials'.

    Args:
        report: told of each round.
        share_done: told after each training step how much of all training is done, in [0, 1].
        so_far: what an earlier call came to; from there on each bit is that of one call.
        until: stop after so many rounds, to go on from `Progress.so_far` later.

    Returns:
        None: it stopped at `until`.

    Raises:
        ValueError: the data do not fit the spec, such as no label for a method that wants some.
        FloatingPointError: the loss was not finite.
    """
    started = time.monotonic()
    _check(spec, data)
    text = text_classifier(data.backbone, data.classnames, data.template)
    data = replace(data, synthetic=_credible(spec, data, text))
    teacher: Classifier = Remembered(text)
    auxiliary = build_auxiliary(spec, data, text, teacher, None, 0)
    labels, learner = so_far.labels, None
    for iteration in range(spec.iterations):
        if spec.auxiliary.refresh and iteration > 0:
            auxiliary = build_auxiliary(spec, data, text, teacher, auxiliary, iteration)
        if iteration < len(so_far.prompts):  # learned before
            learner = _restored(spec, data, so_far.prompts[iteration])
            teacher = Remembered(learner)
            continue
        if spec.supervision == "pseudo":
            labels = assign(
                fused(spec, data, teacher, auxiliary, iteration).pool_scores(data.pool),
                spec.pseudo_labels,
                iteration=iteration,
                iterations=spec.iterations,
                previous=labels,
            )
        if learner is None or spec.prompt.restart:
            learner = build_learner(
                spec.modality,
                spec.prompt,
                data.backbone,
                data.classnames,
                data.template,
                spec.seed,
            )
        chosen = spread(labels, data.unseen, len(data.classnames)) if labels else None
        loss: float = yield Training(
            learner=learner,
            real=_targeted(spec, data, chosen) if chosen else None,
            labelled=data.labelled if spec.train.mix != "synthetic" else None,
            synthetic=_drawn(spec, data),
            synthetic_weight=spec.synthetic_weight * _left(spec, iteration),
            loss=spec.pseudo_labels.loss,
            settings=spec.train,
            seed=spec.seed * 1009 + iteration,
            report=functools.partial(_tell, share_done, spec, iteration),
        )
        teacher = Remembered(learner)
        prompts = (*so_far.prompts, learner.prompt.detach().cpu().clone())
        so_far = SoFar(prompts, labels)
        report(Progress(iteration, chosen, loss, learner, teacher, so_far))
        if iteration + 1 == until:
            return None
    return evaluate(spec, data, learner, teacher, auxiliary, started)


def learn_together(trials: Sequence[Learning[T]]) -> list[T | Exception]:
    """Trials side by side: the prompts of a round are trained in one computation.

    They may differ in anything, and in how many rounds and steps they take.

    Returns:
        What each trial came to: one that fails ends alone.
    """
    ends: dict[int, T | Exception] = {}
    heard: dict[int, Any] = dict.fromkeys(range(len(trials)))
    while heard:
        asked: dict[int, Training] = {}
        for number, word in heard.items():
            try:
                tell = trials[number].throw if isinstance(word, Exception) else trials[number].send
                asked[number] = tell(word)
            except StopIteration as end:
                ends[number] = end.value
            except Exception as problem:
                ends[number] = problem
        heard = dict(zip(asked, _fitted(list(asked.values())), strict=True))
    return [ends[number] for number in range(len(trials))]


def _fitted(trainings: Sequence[Training]) -> Sequence[float | Exception]:
    try:
        return fit(trainings) if trainings else []
    except Exception as problem:  # such as no memory left: nobody's in particular
        return [problem] * len(trainings)


def _tell(
    share_done: Callable[[float], None], spec: TrialSpec, iteration: int, step: int, steps: int
) -> None:
    """Rounds of a growing selection get longer, where epochs are counted."""
    growing = spec.pseudo_labels.growth == "growing" and spec.train.steps is None
    lengths = [t + 1 if growing else 1 for t in range(spec.iterations)]
    share_done((sum(lengths[:iteration]) + lengths[iteration] * step / steps) / sum(lengths))


def _check(spec: TrialSpec, data: TrialData) -> None:
    if spec.supervision == "labelled" and data.labelled is None:
        raise ValueError("CoOp and VPT learn from labelled images; ul has none: use ssl or trzsl")
    if not torch.isfinite(data.pool.features).all():
        raise ValueError("image features of the pool are not finite: are the weights damaged?")


@torch.no_grad()
def _credible(spec: TrialSpec, data: TrialData, text: LinearClassifier) -> Labelled | None:
    """The synthetic images that bank and loss may read; no test image decides."""
    asked = spec.fidelity
    if data.synthetic is None or (asked.min_margin is None and asked.duplicates == "keep"):
        return data.synthetic
    images = data.synthetic.of(data.unseen)
    logits = text.logits(images.batch)
    if data.unseen is not None:  # no image of a seen class was asked for
        seen = torch.ones(logits.shape[1], dtype=torch.bool)
        seen[data.unseen] = False
        logits = logits.masked_fill(seen, -torch.inf)
    return credible(images, asked, logits)


def _restored(spec: TrialSpec, data: TrialData, prompt: Tensor) -> PromptLearner:
    return restored_learner(
        spec.modality, spec.prompt, data.backbone, data.classnames, data.template, prompt
    )


def _targeted(spec: TrialSpec, data: TrialData, chosen: PseudoLabels) -> Targeted | None:
    if not trains_on_real(spec):
        return None
    return Targeted(data.pool[chosen.indices], chosen.targets.clone())


def _drawn(spec: TrialSpec, data: TrialData) -> Labelled | None:
    """Synthetic images of the loss: in TRZSL seen classes have real labels."""
    if data.synthetic is None or not trains_on_synthetic(spec):
        return None
    return data.synthetic.of(data.unseen)


def _left(spec: TrialSpec, iteration: int) -> float:
    """Share of the synthetic loss's weight that this round still has."""
    return 1.0 if spec.train.synthetic_schedule == "fixed" else 1 - _elapsed(spec, iteration)


def _elapsed(spec: TrialSpec, iteration: int) -> float:
    """0 in the first round, 1 in the last."""
    return iteration / max(1, spec.iterations - 1)


def fused(
    spec: TrialSpec,
    data: TrialData,
    teacher: Classifier,
    auxiliary: AuxiliaryClassifier | None,
    iteration: int,
) -> FusedClassifier:
    """The teacher with the auxiliary classifier beside it."""
    if spec.transduction == "gmm":
        teacher = transductive(teacher, data.pool, data.unseen)
    weight = spec.fusion_weight
    if spec.fusion.schedule == "annealed":
        weight *= 1 - _elapsed(spec, iteration)
    return fuse(
        teacher,
        auxiliary,
        data.pool,
        weight,
        spec.auxiliary.temperature,
        spec.fusion.space,
        data.unseen,
    )


@torch.no_grad()
def build_auxiliary(
    spec: TrialSpec,
    data: TrialData,
    text: LinearClassifier,
    teacher: Classifier,
    previous: AuxiliaryClassifier | None,
    iteration: int,
) -> AuxiliaryClassifier | None:
    """The auxiliary classifier of this round; None: nothing is fused.

    Real images are those that the teacher and the `previous` one are most sure of, k per class and
    `k_step` more in each round, while synthetic ones may leave (`fade`). Labelled images of the
    same classes join them. Classes are those that pool images are from: in TRZSL the unseen ones,
    counted from 0.
    """
    if not uses_auxiliary(spec):
        return None
    auxiliary = previous
    for _ in range(spec.auxiliary.rounds):
        believed = fused(spec, data, teacher, auxiliary, iteration)
        auxiliary = _auxiliary(spec, data, text, believed, iteration)
    return auxiliary


def _auxiliary(
    spec: TrialSpec,
    data: TrialData,
    text: LinearClassifier,
    believed: FusedClassifier,
    iteration: int,
) -> AuxiliaryClassifier:
    settings = spec.auxiliary
    classes = torch.arange(len(data.classnames)) if data.unseen is None else data.unseen
    synthetic = real = None
    if settings.source != "synthetic" or spec.fidelity.kind == "real_mean":
        # No more places than images: else a class that is nobody's first choice would get none.
        most = max(1, len(data.pool) // len(classes))
        places = torch.full((len(classes),), min(settings.k + settings.k_step * iteration, most))
        taken = balanced_choice(believed.pool_scores(data.pool), places)
        chosen = (taken >= 0).nonzero().flatten()
        real = _with_labelled(Labelled(data.pool[chosen], taken[chosen]), data, classes)
    if settings.source != "real" and data.synthetic is not None:
        bank = data.synthetic.among(classes)
        if settings.fade:
            bank = faded(bank, _elapsed(spec, iteration))
        synthetic = high_fidelity(bank, spec.fidelity, text.weight[classes], real)
    return auxiliary_classifier(
        settings,
        synthetic,
        real if settings.source != "synthetic" else None,
        data.pool,
        len(classes),
        data.backbone.logit_scale,
    )


def _with_labelled(real: Labelled, data: TrialData, classes: Tensor) -> Labelled:
    if data.labelled is None:
        return real
    known = data.labelled.among(classes)
    return Labelled(Batch.joined([real.batch, known.batch]), torch.cat([real.labels, known.labels]))


def faded(bank: Labelled, progress: float) -> Labelled:
    """The first images of each class: all of them at progress 0, FADED per class at 1."""
    keep = []
    for c in sorted(set(bank.labels.tolist())):
        members = (bank.labels == c).nonzero().flatten()
        keep.append(members[: max(FADED, round(len(members) * (1 - progress)))])
    return bank[torch.cat(keep)]


@torch.no_grad()
def evaluate(
    spec: TrialSpec,
    data: TrialData,
    learner: PromptLearner | None,
    teacher: Classifier,
    auxiliary: AuxiliaryClassifier | None,
    started: float,
) -> TrialResult:
    """How the learned prompt does on test, and the fused and auxiliary classifiers beside it."""
    test = data.test.batch
    both = fused(spec, data, teacher, auxiliary, max(0, spec.iterations - 1))

    def tested(scores: Tensor) -> Metrics:
        guess = scores.argmax(dim=-1)
        return evaluation.measured(guess, data.test.labels, len(data.classnames), data.unseen)

    text = tested(teacher.logits(test))
    # Where nothing was learned, the fused classifier is all that images have changed.
    metrics = text if spec.iterations else tested(both.scores(test))
    inference = {"text": text.headline}
    if auxiliary is not None:
        inference["fused"] = tested(both.scores(test)).headline
        if data.unseen is None:
            inference["auxiliary"] = tested(auxiliary.logits(test)).headline
    believed = both.pool_scores(data.pool).argmax(dim=-1)
    return TrialResult(
        objectives=evaluation.objectives(teacher, data.pool, data.validation, data.unseen),
        test=metrics,
        inference=inference,
        pool_predictions=believed if data.unseen is None else data.unseen[believed],
        synthetic=0 if data.synthetic is None else len(data.synthetic),
        prompt=None if learner is None else learner.prompt.detach().cpu(),
        seconds=time.monotonic() - started,
    )

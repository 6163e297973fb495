"""AiR, from top to bottom (Ren et al., CVPR 2025, arXiv:2504.11930).

`learn` is the method. A text classifier and an auxiliary classifier on synthetic images together
pseudo-label the pool, a prompt is learned on pseudo-labelled and synthetic images, and the next
round uses the learned prompt as its text classifier. `Trial` has the steps of a round, in order.

    p_c   scores of the text classifier: zero-shot CLIP, later the learned prompt
    p̂_c   scores of the auxiliary classifier
    λ     weight of p̂_c; `fusion_weight` is λ / (1 + λ)
    q_c   scores of pool images by denoising errors, `evidence` (not in the paper)
    K_t   images per class that are pseudo-labelled in round t
    β     weight of the loss on synthetic images, `synthetic_weight`

LoRA and image generation come before (`air_core.diffusion`); here images are features. Without
synthetic images this is the host method, with labelled images alone CoOp or VPT. docs/method.md
lists which details are from the paper and which are inferred.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from air_core import evaluation
from air_core.auxiliary import AuxiliaryClassifier, auxiliary_classifier, faded, high_fidelity
from air_core.backbone import Backbone
from air_core.classifiers import (
    CachedClassifier,
    Classifier,
    FusedClassifier,
    fuse,
    text_classifier,
)
from air_core.datasets import Dataset
from air_core.evidence import evidence_probabilities
from air_core.paradigms import make_split
from air_core.prompts import PromptLearner, StartsFromImages, build_learner
from air_core.pseudo_labels import assign, balanced_choice, spread
from air_core.settings import SplitSettings, TrialSettings
from air_core.settings.components import TRANSDUCTIONS
from air_core.settings.conditions import (
    trains_on_real,
    trains_on_synthetic,
    uses_auxiliary,
    uses_evidence,
)
from air_core.training import Targeted, Training, fit
from air_core.types import Classes, ClassifierResult, Encoded, Labelled, PseudoLabels, TrialResult


@dataclass(frozen=True)
class TrialData:
    """Images and names that a trial reads. True labels of the pool are not among them."""

    backbone: Backbone
    classnames: Sequence[str]
    template: str
    pool: Encoded
    labelled: Labelled | None  # SSL: the shots; TRZSL: images of seen classes; UL: None
    unseen: Tensor | None  # (U,) TRZSL: the classes of the pool images
    validation: Labelled | None
    test: Labelled
    synthetic: Labelled | None  # labels are the classes that the images were drawn for
    evidence: Tensor | None = None  # (draws, P, U) denoising errors of the pool

    @property
    def classes(self) -> Classes:
        return Classes(len(self.classnames), self.unseen)

    @staticmethod
    def of(
        dataset: Dataset,
        split: SplitSettings,
        backbone: Backbone,
        synthetic: Labelled | None = None,
        data_root: Path | None = None,
    ) -> TrialData:
        """Encode a dataset and split it, for a text prompt.

        Args:
            dataset: from `air_core.datasets.get_dataset`.
            split: `TrialSettings.split` of the trial.
            synthetic: encoded images with the class that each was drawn for.
            data_root: the folder of datasets that are not embedded.
        """
        examples = dataset.load(data_root)
        every = Labelled(
            Encoded(backbone.encode_images(examples.images)), torch.from_numpy(examples.labels)
        )
        parts = make_split(examples.labels, examples.parts, split)
        return TrialData(
            backbone=backbone,
            classnames=dataset.classnames,
            template=dataset.template,
            pool=every.images[parts.pool],
            labelled=every[parts.labelled] if len(parts.labelled) else None,
            unseen=parts.unseen,
            validation=every[parts.validation] if len(parts.validation) else None,
            test=every[parts.test],
            synthetic=synthetic,
        )


@dataclass(frozen=True)
class TrialState:
    """State of a trial between two rounds, from which `learn` resumes."""

    prompts: tuple[Tensor, ...] = ()  # after each round, on the CPU
    labels: PseudoLabels | None = None  # of the last round


START = TrialState()


@dataclass(frozen=True)
class Round:
    """Result of one round."""

    iteration: int
    labels: PseudoLabels | None  # None: the prompt was learned from labelled images alone
    loss: float
    learner: PromptLearner
    state: TrialState


class Callback:
    """Follows the progress of a trial. Subclass it and override the methods that you need."""

    def on_step(self, done: int, total: int) -> None:
        """After each training step, with the finished and all steps of the trial."""

    def on_round(self, result: Round) -> None:
        """After each round; an exception stops the trial."""


NO_CALLBACK = Callback()


def learn(
    spec: TrialSettings,
    data: TrialData,
    callback: Callback = NO_CALLBACK,
    resume_from: TrialState = START,
) -> TrialResult:
    """Learn a prompt from pseudo-labelled real images and labelled synthetic ones, and test it.

    The tested prompt is that of the last round; no round is selected afterwards.
    `spec.iterations = 0` is CLIP without learning.

    Args:
        callback: receives each training step and each round.
        resume_from: state of an earlier call; the result is that of one call, bit for bit.

    Raises:
        ValueError: the data do not fit the spec, such as no label for a method that needs some.
        FloatingPointError: the loss is not finite.
    """
    trial = Trial(spec, data, callback, resume_from)  # p_c of zero-shot CLIP, and p̂_c
    for t in range(trial.rounds_done, spec.iterations):  # T rounds
        trial.update_auxiliary(t)  # p̂_c, with `auxiliary.refresh`
        trial.update_labels(t)  # K_t images of each class by p*_c = (p_c + λ p̂_c) / (1 + λ)
        [loss] = fit([trial.training(t)])  # L = L_r + β L_s
        trial.finish_round(t, loss)  # p_c of the learned prompt
    return trial.evaluate()


class Trial:
    """A trial in progress: its inputs, and the classifiers and pseudo-labels of the current round.

    `learn` runs the steps of one trial, `air_core.side_by_side.learn_side_by_side` of several.
    """

    def __init__(
        self,
        spec: TrialSettings,
        data: TrialData,
        callback: Callback = NO_CALLBACK,
        resume_from: TrialState = START,
    ) -> None:
        _check(spec, data)
        self.started = time.monotonic()
        self.spec, self.callback = spec, callback
        self.data = data
        self.zero_shot = text_classifier(data.backbone, data.classnames, data.template)
        self.text: Classifier = CachedClassifier(self.zero_shot)  # p_c
        self.evidence = pool_evidence(spec, data)  # q_c
        self.auxiliary: AuxiliaryClassifier | None = None  # p̂_c
        self.learner: PromptLearner | None = None
        self.update_auxiliary(0)
        # The auxiliary classifier of a round depends on that of the round before.
        for t, prompt in enumerate(resume_from.prompts):
            self.update_auxiliary(t)
            self.learner = self._new_prompt()
            self.learner.prompt.data.copy_(prompt)
            self.text = CachedClassifier(self.learner)
        self.state = resume_from

    @property
    def rounds_done(self) -> int:
        return len(self.state.prompts)

    @torch.no_grad()
    def update_auxiliary(self, t: int) -> None:
        """Build p̂_c, the class means of synthetic images (step 3): once, or with
        `auxiliary.refresh` for each round, with the prompt of the round before.

        Its classes are those of the pool images: in TRZSL the unseen ones, counted from 0.
        """
        spec, data, settings = self.spec, self.data, self.spec.auxiliary
        is_ready = self.auxiliary is not None and not (settings.refresh and t > 0)
        if is_ready or not uses_auxiliary(spec):
            return
        for _ in range(settings.rounds):
            synthetic, real = self._auxiliary_images(t)
            classes, scale = len(data.classes.of_pool), data.backbone.logit_scale
            self.auxiliary = auxiliary_classifier(
                settings, synthetic, real, data.pool, classes, scale
            )

    def update_labels(self, t: int) -> None:
        """Pseudo-label the pool with the fused classifier (step 4)."""
        spec = self.spec
        if spec.supervision == "pseudo":
            labels = assign(
                self.fused(t).pool_scores(self.data.pool),
                spec.pseudo_labels,
                iteration=t,
                iterations=spec.iterations,
                previous=self.state.labels,
            )
            self.state = replace(self.state, labels=labels)

    def fused(self, t: int) -> FusedClassifier:
        """p* = (p + λ p̂) / (1 + λ); with evidence the pool's p* becomes (1 - v) p* + v q."""
        spec, data = self.spec, self.data
        w, v = spec.fusion_weight, spec.evidence.weight
        if spec.fusion.schedule == "annealed":
            w *= 1 - progress(spec, t)
        if spec.evidence.schedule == "annealed":
            v *= 1 - progress(spec, t)
        text = TRANSDUCTIONS.load(spec.transduction)(self.text, data.pool, data.classes)
        temperature, space = spec.auxiliary.temperature, spec.fusion.space
        fused = fuse(text, self.auxiliary, data.pool, data.classes, w, temperature, space)
        return replace(fused, evidence=self.evidence, evidence_weight=v)

    def training(self, t: int) -> Training:
        """Prompt, images and loss of this round (step 5)."""
        spec, data = self.spec, self.data
        self.learner = self._new_prompt()
        training = Training(
            learner=self.learner,
            real=pseudo_labelled_batch(spec, data, self._selected()),
            labelled=data.labelled if spec.train.mix != "synthetic" else None,
            synthetic=synthetic_batch(spec, data),
            synthetic_weight=spec.synthetic_weight,  # β
            loss=spec.pseudo_labels.loss,
            settings=spec.train,
            seed=spec.seed * 1009 + t,
            uses_tf32=data.backbone.uses_tf32,
            report=lambda step, steps: self.callback.on_step(*_steps_done(spec, t, step, steps)),
        )
        if isinstance(self.learner, StartsFromImages):
            self.learner.start_from(*training.images(len(data.classnames)))
        return training

    def finish_round(self, t: int, loss: float | Exception) -> None:
        """Make the learned prompt the text classifier of the next round.

        Args:
            loss: from `fit`; an error is raised.
        """
        if isinstance(loss, Exception):
            raise loss
        assert self.learner is not None
        self.text = CachedClassifier(self.learner)
        prompt = self.learner.prompt.detach().cpu().clone()
        self.state = replace(self.state, prompts=(*self.state.prompts, prompt))
        self.callback.on_round(Round(t, self._selected(), loss, self.learner, self.state))

    @torch.no_grad()
    def evaluate(self) -> TrialResult:
        """Test text, auxiliary and fused classifier."""
        spec, data = self.spec, self.data
        classifier = self.fused(max(0, spec.iterations - 1))
        votes = classifier.votes(self.text, data.pool)
        classifiers = {
            name: self._tested(
                # Several measures read the logits of the same batches.
                CachedClassifier(each),
                [vote for voter, vote in votes.items() if voter != name],
            )
            for name, each in classifier.each(self.text).items()
        }
        text, last = classifiers["text"], [*classifiers.values()][-1]
        predictions = classifier.pool_scores(data.pool).argmax(dim=-1)
        return TrialResult(
            objectives=text.objectives,
            # Without learning, synthetic images change the fused classifier only: test that one.
            test=(text if spec.iterations else last).test,
            classifiers=classifiers,
            fused=classifier,
            pool_predictions=data.classes.numbers(predictions),
            prompt=None if self.learner is None else self.learner.prompt.detach().cpu(),
            seconds=time.monotonic() - self.started,
        )

    def _auxiliary_images(self, t: int) -> tuple[Labelled | None, Labelled | None]:
        """Synthetic and real images of the auxiliary classifier; those that it is built from.

        The real ones are the k pool images of each class with the highest fused scores; each round
        takes `k_step` more, while `fade` drops synthetic ones. Labelled images of the same classes
        join them.
        """
        spec, data, settings = self.spec, self.data, self.spec.auxiliary
        classes = data.classes.of_pool
        synthetic = real = None
        if settings.source != "synthetic" or spec.fidelity.kind == "real_mean":
            # With more slots than images, a class that is no image's first choice would get none.
            largest = max(1, len(data.pool) // len(classes))
            capacity = torch.full((len(classes),), min(settings.k + settings.k_step * t, largest))
            labels = balanced_choice(self.fused(t).pool_scores(data.pool), capacity)
            selected = (labels >= 0).nonzero().flatten()
            real = Labelled(data.pool[selected], labels[selected])
            if data.labelled is not None:
                real = Labelled.joined([real, data.labelled.among(data.classes)])
        if settings.source != "real" and data.synthetic is not None:
            bank = data.synthetic.among(data.classes)
            if settings.fade:
                bank = faded(bank, progress(spec, t))
            synthetic = high_fidelity(bank, spec.fidelity, self.zero_shot.weight[classes], real)
        return synthetic, real if settings.source != "synthetic" else None

    def _new_prompt(self) -> PromptLearner:
        spec, data = self.spec, self.data
        return build_learner(
            spec.modality, spec.prompt, data.backbone, data.classnames, data.template, spec.seed
        )

    def _selected(self) -> PseudoLabels | None:
        """Pseudo-labels of this round, over all classes."""
        labels = self.state.labels
        if labels is None:
            return None
        return spread(labels, self.data.classes)

    def _tested(self, classifier: Classifier, votes: Sequence[Tensor]) -> ClassifierResult:
        data, classes = self.data, self.data.classes
        logits = classifier.logits(data.test.images)
        temperature = evaluation.calibrated_temperature(classifier, data.validation)
        every = Classes(classes.count)
        confidence, predictions = evaluation.most_probable(logits, every)
        probability, _ = evaluation.most_probable(logits, every, temperature)
        right = predictions == data.test.labels
        pool_logits = classifier.logits(data.pool)
        pool_probability, pool = evaluation.most_probable(pool_logits, classes, temperature)
        found = evaluation.objectives(classifier, data.pool, data.validation, classes)
        if votes:
            found["agreement"] = evaluation.agreement(pool, votes)
        return ClassifierResult(
            test=evaluation.measured(predictions, data.test.labels, classes),
            temperature=temperature,
            probability=probability,
            calibration_error=(
                evaluation.calibration_error(confidence, right),
                evaluation.calibration_error(probability, right),
            ),
            pool=classes.numbers(pool),
            pool_probability=pool_probability,
            objectives=found,
        )


def _check(spec: TrialSettings, data: TrialData) -> None:
    if spec.supervision == "labelled" and data.labelled is None:
        raise ValueError("CoOp and VPT learn from labelled images; ul has none: use ssl or trzsl")
    if uses_evidence(spec) and data.evidence is None:
        raise ValueError("evidence.draws is above 0, but the data have no denoising errors")


def _steps_done(spec: TrialSettings, t: int, step: int, steps: int) -> tuple[int, int]:
    """Finished and all steps of a trial after `step` of the `steps` of round t.

    Where epochs are counted, the rounds of a growing selection get longer, and the steps of the
    other rounds follow from this one.
    """
    growing = spec.pseudo_labels.growth == "growing" and spec.train.steps is None
    lengths = [i + 1 if growing else 1 for i in range(spec.iterations)]
    before, total = (steps * sum(part) // lengths[t] for part in (lengths[:t], lengths))
    return before + step, total


# ---------------------------------------------------------------- images of the loss


def pseudo_labelled_batch(
    spec: TrialSettings, data: TrialData, selected: PseudoLabels | None
) -> Targeted | None:
    """Pool images of L_r with their targets."""
    if selected is None or not trains_on_real(spec):
        return None
    return Targeted(data.pool[selected.indices], selected.targets)


def synthetic_batch(spec: TrialSettings, data: TrialData) -> Labelled | None:
    """Synthetic images of L_s; in TRZSL of unseen classes, since seen ones have real labels."""
    if data.synthetic is None or not trains_on_synthetic(spec):
        return None
    return data.synthetic.of(data.classes)


def progress(spec: TrialSettings, t: int) -> float:
    """0 in the first round, 1 in the last."""
    return t / max(1, spec.iterations - 1)


def pool_evidence(spec: TrialSettings, data: TrialData) -> Tensor | None:
    """(P, U) probabilities by denoising errors; None: not used."""
    if not uses_evidence(spec) or data.evidence is None:
        return None
    settings = spec.evidence
    return evidence_probabilities(data.evidence, settings.confidence, settings.balance)

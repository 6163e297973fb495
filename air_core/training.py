"""Learn prompts from labelled, pseudo-labelled and synthetic images, several in one computation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from air_core.prompts import PromptLearner, logits_together
from air_core.specs import TrainSettings
from air_core.types import Batch, Labelled

# M chosen pool images, B images of a step, C classes.

MOMENTUM = 0.9
LABELLED_BATCH = (8, 256)  # CPL keeps the batch of labelled images within these


@dataclass(frozen=True)
class Targeted:
    """Pool images and what each is trained towards."""

    batch: Batch
    targets: Tensor  # (M, C) one-hot, multi-hot or soft

    def __len__(self) -> int:
        return len(self.batch)


@dataclass(frozen=True, kw_only=True)
class Training:
    """What one prompt learns from, and how.

    Args:
        real: pseudo-labelled pool images; with `rc` their targets are written to.
        labelled: images whose label is known (SSL, TRZSL).
        synthetic: images with the class that they were drawn for. Two of the three may be None.
        loss: of real images, a key of LOSSES.
        seed: of the batch order.
        report: told of each step that is over, and how many there are.

    Raises:
        ValueError: there is nothing to train on.
    """

    learner: PromptLearner
    real: Targeted | None
    labelled: Labelled | None
    synthetic: Labelled | None
    synthetic_weight: float
    loss: str
    settings: TrainSettings
    seed: int
    report: Callable[[int, int], None] = lambda step, steps: None

    def __post_init__(self) -> None:
        if self.real is None and not self.labelled and not self.synthetic:
            raise ValueError(
                "there is nothing to train on: no pseudo-labelled, labelled or drawn image"
            )


def fit(trainings: Sequence[Training]) -> list[float | FloatingPointError]:
    """Train prompts in place, side by side, each as it would be trained alone.

    L = L_real + labelled_weight * L_labelled + synthetic_weight * L_synthetic, each a mean over
    its own batch. Prompts share no more than the pass of the tower, which is most of a step.

    Returns:
        Of each, the mean loss of the last tenth of its steps; or that its loss was not finite,
        which ends this training and no other.

    Source: AiR, L = L_r + beta * L_s (docs/method.md, step 5); sizes of labelled batches from CPL.
    """
    runs = [_Run(training) for training in trainings]
    optimiser = torch.optim.SGD([run.group() for run in runs], momentum=MOMENTUM)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, [run.rate for run in runs])
    while going := [run for run in runs if run.goes_on]:
        drawn = [run.draw() for run in going]
        # One pass of the tower serves all batches of all prompts.
        logits = logits_together([run.asked.learner for run in going], [b for b, _ in drawn])
        totals = [run.total(z, at) for run, z, (_, at) in zip(going, logits, drawn, strict=True)]
        sound = [(run, total) for run, total in zip(going, totals, strict=True) if run.goes_on]
        if not sound:
            continue
        optimiser.zero_grad()  # who is over has no gradient from now on, and stays as it is
        torch.autograd.backward([total for _, total in sound])
        for run, _ in sound:
            torch.nn.utils.clip_grad_norm_(run.asked.learner.prompt, run.asked.settings.clip)
        optimiser.step()
        schedule.step()
        for run, total in sound:
            run.losses.append(total.item())
            run.asked.report(len(run.losses), run.steps)
    return [run.problem or run.last_loss() for run in runs]


class _Run:
    """A training on its way."""

    def __init__(self, asked: Training) -> None:
        self.asked = asked
        self.sources = _sources(asked, torch.Generator().manual_seed(asked.seed))
        leading, settings = self.sources[0], asked.settings
        self.per_pass = max(1, leading.images // leading.batch)
        self.steps = settings.steps or settings.epochs * self.per_pass
        self.losses: list[float] = []  # one a step
        self.problem: FloatingPointError | None = None
        self.reweighted = asked.real if asked.loss == "rc" else None
        if self.reweighted is not None:  # at first every candidate is as likely
            targets = self.reweighted.targets
            self.candidates = targets.clone()
            targets.div_(targets.sum(dim=-1, keepdim=True))

    @property
    def goes_on(self) -> bool:
        return self.problem is None and len(self.losses) < self.steps

    def group(self) -> dict[str, Any]:
        """What the optimiser should do."""
        settings = self.asked.settings
        return {
            "params": [self.asked.learner.prompt],
            "lr": settings.learning_rate,
            "weight_decay": settings.weight_decay,
        }

    def rate(self, step: int) -> float:
        return learning_rate_factor(step, self.steps, self.asked.settings.warmup)

    def draw(self) -> tuple[Batch, list[Tensor]]:
        """Images of the next step, and the positions that each source drew."""
        step = len(self.losses)
        if self.reweighted is not None and step and step % self.per_pass == 0:
            confidences = _confidences(self.asked.learner, self.reweighted, self.candidates)
            self.reweighted.targets.copy_(confidences)
        drawn = [next(source.positions) for source in self.sources]
        parts = [source.images_at(at) for source, at in zip(self.sources, drawn, strict=True)]
        return Batch.joined(parts), drawn

    def total(self, together: Tensor, drawn: list[Tensor]) -> Tensor:
        """The loss of a step, which is a problem where it is not finite."""
        logits = torch.split(together, [len(at) for at in drawn])
        losses = [
            source.weight * source.loss(z, at)
            for source, z, at in zip(self.sources, logits, drawn, strict=True)
        ]
        total = sum(losses, start=torch.zeros(()))
        if not torch.isfinite(total):
            self.problem = FloatingPointError(
                f"the loss became {total.item()} after {len(self.losses)} steps"
            )
        return total

    def last_loss(self) -> float:
        last = self.losses[-max(1, self.steps // 10) :]
        return sum(last) / len(last)


@dataclass(frozen=True)
class _Source:
    """Images that a step draws from, with their loss."""

    images: int
    batch: int
    images_at: Callable[[Tensor], Batch]
    loss: Callable[[Tensor, Tensor], Tensor]  # logits, positions
    weight: float
    positions: Iterator[Tensor]


def _sources(asked: Training, generator: torch.Generator) -> list[_Source]:
    """The first decides how many steps there are."""
    real, labelled, synthetic = asked.real, asked.labelled, asked.synthetic
    settings = asked.settings
    found: list[_Source] = []

    def add(
        images: Batch, batch: int, of: Callable[[Tensor, Tensor], Tensor], weight: float
    ) -> None:
        size = min(batch, len(images))
        positions = _batches(len(images), size, generator)
        found.append(_Source(len(images), size, images.__getitem__, of, weight, positions))

    if real is not None:
        targets = real.targets
        add(real.batch, settings.batch, lambda z, at: LOSSES[asked.loss](z, targets[at]), 1.0)
    if labelled is not None and len(labelled):
        labels = labelled.labels
        size = settings.batch
        if real is not None:
            low, high = LABELLED_BATCH
            size = min(high, max(low, settings.batch * len(labelled) // len(real)))
        weight = settings.labelled_weight
        known = torch.unique(labels) if settings.labelled_among == "seen" else slice(None)
        add(labelled.batch, size, lambda z, at: cross_entropy(only(z, known), labels[at]), weight)
    if synthetic is not None and len(synthetic):
        drawn = synthetic.labels
        weight = asked.synthetic_weight if found else 1.0
        size = settings.synthetic_batch
        add(synthetic.batch, size, lambda z, at: cross_entropy(z, drawn[at]), weight)
    return found


def _batches(images: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Positions, pass after pass, each in a new order; a short last batch is dropped unless
    it is the only one."""
    while True:
        order = torch.randperm(images, generator=generator)
        for start in range(0, images - size + 1, size):
            yield order[start : start + size]


def learning_rate_factor(step: int, steps: int, warmup: float) -> float:
    """Linear from 0 over the warm-up share, then cosine to 0.

    >>> [round(learning_rate_factor(s, 100, 0.1), 2) for s in (0, 5, 10, 55, 100)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    rise = round(warmup * steps)
    if step < rise:
        return step / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


# ---------------------------------------------------------------- losses on candidate sets


def candidate_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """`-log sum_c y_c softmax(z)_c`, the mean over images: cross-entropy where y is one-hot.

    Source: CPL's `cc` (arXiv:2406.10502), by logsumexp so that small scores do not underflow.

    Args:
        logits: (B, C).
        targets: (B, C), each row with a value above 0.
    """
    return -(logits.log_softmax(dim=-1) + targets.log()).logsumexp(dim=-1).mean()


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """`-sum_c y_c log softmax(z)_c`, the mean over images.

    Source: CPL's `ce`, and its `rc` (re-weighted, arXiv:2007.08929), where y is the confidence
    in each candidate, estimated again after every pass.
    """
    return -(targets * logits.log_softmax(dim=-1)).sum(dim=-1).mean()


def only(logits: Tensor, classes: Tensor | slice) -> Tensor:
    """Logits (B, C) with other classes out of the softmax.

    Source: CoOp and VPT in GRIP's repository learn among seen classes (docs/method.md, step 5).
    """
    kept = torch.full_like(logits, -math.inf)
    kept[:, classes] = logits[:, classes]
    return kept


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cc": candidate_loss,
    "ce": soft_cross_entropy,
    "rc": soft_cross_entropy,
}


def confidence(logits: Tensor, candidates: Tensor) -> Tensor:
    """Scores (M, C) over each image's candidate set alone; rows sum to 1.

    Args:
        candidates: (M, C), above 0 where a class is a candidate.
    """
    return logits.masked_fill(candidates <= 0, -math.inf).softmax(dim=-1)


@torch.no_grad()
def _confidences(learner: PromptLearner, real: Targeted, candidates: Tensor) -> Tensor:
    return confidence(learner.logits(real.batch), candidates)

"""Learn a prompt from labelled, pseudo-labelled and synthetic images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from air_core.prompts import PromptLearner
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


def fit(
    learner: PromptLearner,
    *,
    real: Targeted | None,
    labelled: Labelled | None,
    synthetic: Labelled | None,
    synthetic_weight: float,
    loss: str,
    settings: TrainSettings,
    seed: int,
    report: Callable[[int, int], None] = lambda step, steps: None,
) -> float:
    """Train the prompt in place.

    L = L_real + labelled_weight * L_labelled + synthetic_weight * L_synthetic, each a mean over
    its own batch.

    Args:
        real: pseudo-labelled pool images; with `rc` their targets are written to.
        labelled: images whose label is known (SSL, TRZSL).
        synthetic: images with the class that they were drawn for. Any of the three may be None.
        loss: of real images, a key of LOSSES.
        seed: of the batch order.
        report: told of each step that is over, and how many there are.

    Returns:
        Mean loss of the last tenth of the steps.

    Raises:
        ValueError: there is nothing to train on.
        FloatingPointError: the loss is not finite.

    Source: AiR, L = L_r + beta * L_s (docs/method.md, step 5); sizes of labelled batches from CPL.
    """
    generator = torch.Generator().manual_seed(seed)
    sources = _sources(real, labelled, synthetic, synthetic_weight, loss, settings, generator)
    leading = sources[0]
    steps = settings.steps or settings.epochs * max(1, leading.images // leading.batch)
    optimiser = torch.optim.SGD(
        [learner.prompt],
        lr=settings.learning_rate,
        momentum=MOMENTUM,
        weight_decay=settings.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: learning_rate_factor(step, steps, settings.warmup)
    )
    losses: list[float] = []
    candidates = real.targets.clone() if real is not None else None
    if loss == "rc" and real is not None:  # at first every candidate is as likely
        real.targets.div_(real.targets.sum(dim=-1, keepdim=True))
    per_pass = max(1, leading.images // leading.batch)
    for step in range(steps):
        if loss == "rc" and real is not None and step and step % per_pass == 0:
            real.targets.copy_(_confidences(learner, real, candidates))
        drawn = [next(source.positions) for source in sources]
        # One pass of the tower serves all batches.
        parts = [source.images_at(at) for source, at in zip(sources, drawn, strict=True)]
        together = learner.logits(Batch.joined(parts))
        logits = torch.split(together, [len(at) for at in drawn])
        total = sum(
            (s.weight * s.loss(z, at) for s, z, at in zip(sources, logits, drawn, strict=True)),
            start=torch.zeros(()),
        )
        if not torch.isfinite(total):
            raise FloatingPointError(f"the loss became {total.item()} after {len(losses)} steps")
        optimiser.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(learner.prompt, settings.clip)
        optimiser.step()
        schedule.step()
        losses.append(total.item())
        report(step + 1, steps)
    last = losses[-max(1, steps // 10) :]
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


def _sources(
    real: Targeted | None,
    labelled: Labelled | None,
    synthetic: Labelled | None,
    synthetic_weight: float,
    loss: str,
    settings: TrainSettings,
    generator: torch.Generator,
) -> list[_Source]:
    """The first decides how many steps there are."""
    found: list[_Source] = []

    def add(
        images: Batch, batch: int, of: Callable[[Tensor, Tensor], Tensor], weight: float
    ) -> None:
        size = min(batch, len(images))
        positions = _batches(len(images), size, generator)
        found.append(_Source(len(images), size, images.__getitem__, of, weight, positions))

    if real is not None:
        targets = real.targets
        add(real.batch, settings.batch, lambda z, at: LOSSES[loss](z, targets[at]), 1.0)
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
        weight = synthetic_weight if found else 1.0
        size = settings.synthetic_batch
        add(synthetic.batch, size, lambda z, at: cross_entropy(z, drawn[at]), weight)
    if not found:
        raise ValueError(
            "there is nothing to train on: no pseudo-labelled, labelled or drawn image"
        )
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
def _confidences(learner: PromptLearner, real: Targeted, candidates: Tensor | None) -> Tensor:
    assert candidates is not None
    return confidence(learner.logits(real.batch), candidates)

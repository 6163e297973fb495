"""Learn a prompt from pseudo-labelled real images and labelled synthetic ones."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from air_core.prompts import PromptLearner
from air_core.specs import TrainSettings
from air_core.types import Batch, Labelled

MOMENTUM = 0.9


def fit(
    learner: PromptLearner,
    real: Batch,
    targets: Tensor,
    synthetic: Labelled | None,
    synthetic_weight: float,
    settings: TrainSettings,
    seed: int,
) -> float:
    """Train the prompt in place: L = L_real + synthetic_weight * L_synthetic.

    Args:
        real: M chosen pool images.
        targets: (M, C) one-hot, multi-hot or soft.
        synthetic: images with the class that they were drawn for; None: real ones alone.
        seed: of the batch order.

    Returns:
        Mean loss of the last tenth of the steps.

    Raises:
        FloatingPointError: the loss is not finite.

    Source: AiR, L = L_r + beta * L_s (docs/method.md, step 5).
    """
    generator = torch.Generator().manual_seed(seed)
    steps = settings.steps or settings.epochs * max(1, len(real) // settings.batch)
    optimiser = torch.optim.SGD(
        learner.parameters(),
        lr=settings.learning_rate,
        momentum=MOMENTUM,
        weight_decay=settings.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: learning_rate_factor(step, steps, settings.warmup)
    )
    batches = _batches(len(real), settings.batch, generator)
    drawn = _batches(len(synthetic), settings.synthetic_batch, generator) if synthetic else None
    losses: list[float] = []
    for _ in range(steps):
        chosen = next(batches)
        if synthetic is None or drawn is None:
            loss = candidate_loss(learner.logits(real[chosen]), targets[chosen])
        else:
            index = next(drawn)
            # One pass of the text tower serves both batches.
            both = Batch(torch.cat([real.features[chosen], synthetic.batch.features[index]]))
            logits = learner.logits(both)
            loss = candidate_loss(logits[: len(chosen)], targets[chosen])
            guided = cross_entropy(logits[len(chosen) :], synthetic.labels[index])
            loss = loss + synthetic_weight * guided
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss became {loss.item()} after {len(losses)} steps")
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(learner.parameters(), settings.clip)
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


def candidate_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """`-log sum_c y_c softmax(z)_c`, the mean over images: cross-entropy where y is one-hot.

    Source: CPL's `cc` (arXiv:2406.10502), by logsumexp so that small scores do not underflow.

    Args:
        logits: (B, C).
        targets: (B, C), each row with a value above 0.
    """
    return -(logits.log_softmax(dim=-1) + targets.log()).logsumexp(dim=-1).mean()


def learning_rate_factor(step: int, steps: int, warmup: float) -> float:
    """Linear from 0 over the warm-up share, then cosine to 0.

    >>> [round(learning_rate_factor(s, 100, 0.1), 2) for s in (0, 5, 10, 55, 100)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    rise = round(warmup * steps)
    if step < rise:
        return step / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def _batches(images: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Positions, pass after pass, each in a new order; a short last batch is dropped unless
    it is the only one."""
    size = min(batch, images)
    while True:
        order = torch.randperm(images, generator=generator)
        for start in range(0, images - size + 1, size):
            yield order[start : start + size]

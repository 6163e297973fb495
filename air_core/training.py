"""Train prompts on pseudo-labelled, labelled and synthetic images, several in one computation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from air_core.backbone.clip import tf32_products
from air_core.components import LOSSES
from air_core.prompts import PromptLearner, logits_together
from air_core.specs import TrainSettings
from air_core.types import Batch, Labelled, Targets, sparse

# M selected pool images, B images of a step, C classes.

MOMENTUM = 0.9
LABELLED_BATCH = (8, 256)  # smallest and largest batch of labelled images in CPL
# Share of the free memory of a device for the images of a source; a step needs the rest.
IMAGES_SHARE = 0.25
CHECKED = 50  # steps between two reads of the losses, since a read waits for the device


@dataclass(frozen=True)
class Targeted:
    """Pool images with their targets."""

    batch: Batch
    targets: Targets  # (M, C) one-hot, multi-hot or soft

    def __len__(self) -> int:
        return len(self.batch)


@dataclass(frozen=True, kw_only=True)
class Training:
    """The training of one prompt: images, loss and settings.

    Args:
        real: pseudo-labelled pool images.
        labelled: images with their true labels (SSL, TRZSL).
        synthetic: images with the class that each was drawn for. At least one of the three sources
            must have images.
        loss: of `real`, a key of LOSSES.
        seed: of the batch order.
        uses_tf32: of the backbone; gradients use TF32 if all trainings do.
        report: called after each step with (steps done, steps).

    Raises:
        ValueError: no source has an image.
    """

    learner: PromptLearner
    real: Targeted | None
    labelled: Labelled | None
    synthetic: Labelled | None
    synthetic_weight: float
    loss: str
    settings: TrainSettings
    seed: int
    uses_tf32: bool = False
    report: Callable[[int, int], None] = lambda step, steps: None

    def __post_init__(self) -> None:
        if self.real is None and not self.labelled and not self.synthetic:
            raise ValueError(
                "there is nothing to train on: no pseudo-labelled, labelled or drawn image"
            )

    def images(self, classes: int) -> tuple[Batch, Tensor]:
        """All M training images with their targets (M, classes)."""
        real = self.real
        parts = [] if real is None else [(real.batch, real.targets[torch.arange(len(real))])]
        for known in (self.labelled, self.synthetic):
            if known:
                parts.append((known.batch, one_hot(known.labels, classes).float()))
        batches, targets = zip(*parts, strict=True)
        return Batch.joined(batches), torch.cat(targets)


def fit(trainings: Sequence[Training]) -> list[float | FloatingPointError]:
    """Train prompts in place, side by side, each with the result of training it alone.

    L = L_r + labelled_weight * L_labelled + β L_s, with β = `synthetic_weight`; each term is the
    mean over its own batch. The prompts share the pass of the text tower, which takes most of the
    time of a step, and nothing else.

    Images, targets and loss are on the device of the prompt. Images that do not fit there stay on
    the CPU, and each step copies its batch.

    Returns:
        For each training the mean loss of the last tenth of its steps, or an error where its loss
        was not finite; such a training stops within CHECKED steps and the others continue.

    Source: AiR, L = L_r + β L_s (docs/method.md, step 5); sizes of labelled batches from CPL.
    """
    runs = [_Run(_near_prompt(training)) for training in trainings]
    optimiser = torch.optim.SGD([run.group() for run in runs], momentum=MOMENTUM)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, [run.rate for run in runs])
    while active := [run for run in runs if run.is_active]:
        drawn = [run.draw() for run in active]
        # One pass of the tower serves all batches of all prompts.
        logits = logits_together(
            [run.training.learner for run in active], [batch for batch, _ in drawn]
        )
        totals = [run.total(z, at) for run, z, (_, at) in zip(active, logits, drawn, strict=True)]
        optimiser.zero_grad()  # without a gradient, the prompt of a finished run does not change
        with tf32_products(all(run.training.uses_tf32 for run in active)):
            torch.autograd.backward(totals)
        for run in active:
            training = run.training
            torch.nn.utils.clip_grad_norm_(training.learner.prompt, training.settings.clip)
        optimiser.step()
        schedule.step()
        for run, total in zip(active, totals, strict=True):
            run.finish_step(total.detach())
            run.training.report(run.done, run.steps)
    return [run.error or run.last_loss() for run in runs]


def _near_prompt(training: Training) -> Training:
    """The same with all images, if they fit, and all targets on the device of the prompt."""
    device = training.learner.prompt.device
    real, known = training.real, (training.labelled, training.synthetic)
    labelled, synthetic = (
        each and Labelled(_near(each.batch, device), each.labels.to(device)) for each in known
    )
    if real is not None:
        targets = real.targets if training.loss != "rc" else sparse(real.targets)
        real = Targeted(_near(real.batch, device), targets.to(device))
    return replace(training, real=real, labelled=labelled, synthetic=synthetic)


def _near(images: Batch, device: torch.device) -> Batch:
    """Images on a device; where they do not fit, as they are."""
    arrays = [images.features] if images.tokens is None else [images.features, images.tokens]
    fits = sum(array.nbytes for array in arrays) <= IMAGES_SHARE * _free_memory(device)
    return images.to(device) if fits else images


def _free_memory(device: torch.device) -> float:
    """Bytes that this process can still allocate on a GPU; of other devices infinite."""
    if device.type != "cuda":
        return math.inf
    free, total = torch.cuda.mem_get_info(device)
    allocated = torch.cuda.memory_allocated(device)
    cached = torch.cuda.memory_reserved(device) - allocated
    # The oldest torch that is allowed lacks the function; then the whole GPU is the limit.
    fraction = getattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)
    return min(free + cached, fraction(device) * total - allocated)


class _Run:
    """State of a training."""

    def __init__(self, training: Training) -> None:
        self.confidences: _Confidences | None = None
        if training.loss == "rc" and training.real is not None:
            self.confidences = _Confidences(training.real)
            training = replace(training, real=self.confidences.real)
        self.training = training
        self.sources = _sources(training, torch.Generator().manual_seed(training.seed))
        leading, settings = self.sources[0], training.settings
        self.steps_per_pass = max(1, leading.images // leading.batch)
        self.steps = settings.steps or settings.epochs * self.steps_per_pass
        self.done = 0  # steps
        self.losses: list[float] = []  # of each step that was read
        self.unread: list[Tensor] = []  # of the steps after these
        self.error: FloatingPointError | None = None

    @property
    def is_active(self) -> bool:
        return self.error is None and self.done < self.steps

    def group(self) -> dict[str, Any]:
        """Parameter group of the optimiser."""
        settings = self.training.settings
        return {
            "params": [self.training.learner.prompt],
            "lr": settings.learning_rate,
            "weight_decay": settings.weight_decay,
        }

    def rate(self, step: int) -> float:
        return learning_rate_factor(step, self.steps, self.training.settings.warmup)

    def draw(self) -> tuple[Batch, list[Tensor]]:
        """Images of the next step, and their positions in each source."""
        if self.confidences is not None and self.done and self.done % self.steps_per_pass == 0:
            self.confidences.update(self.training.learner)
        drawn = [next(source.positions) for source in self.sources]
        parts = [
            source.images_at(where) for source, (where, _) in zip(self.sources, drawn, strict=True)
        ]
        return Batch.joined(parts), [at for _, at in drawn]

    def total(self, logits: Tensor, drawn: list[Tensor]) -> Tensor:
        """The loss of a step."""
        by_source = torch.split(logits, [len(at) for at in drawn])
        losses = [
            source.weight * source.loss(z, at)
            for source, z, at in zip(self.sources, by_source, drawn, strict=True)
        ]
        return sum(losses, start=logits.new_zeros(()))

    def finish_step(self, loss: Tensor) -> None:
        """Count a step. Every CHECKED steps, read the losses; set `error` at one that is not
        finite, which has changed the prompt of this training alone."""
        self.done += 1
        self.unread.append(loss)
        if self.done % CHECKED and self.done < self.steps:
            return
        for value in torch.stack(self.unread).tolist():
            if not math.isfinite(value):
                step = len(self.losses)
                self.error = FloatingPointError(f"the loss became {value} after {step} steps")
                return
            self.losses.append(value)
        self.unread.clear()

    def last_loss(self) -> float:
        last = self.losses[-max(1, self.steps // 10) :]
        return sum(last) / len(last)


@dataclass(frozen=True)
class _Source:
    """Images with their loss; each step draws a batch of them."""

    images: int
    batch: int
    images_at: Callable[[Tensor], Batch]
    loss: Callable[[Tensor, Tensor], Tensor]  # logits, positions
    weight: float
    positions: Iterator[Sequence[Tensor]]  # for the images, for the loss


def _sources(training: Training, generator: torch.Generator) -> list[_Source]:
    """The sources that have images; the first one determines the number of steps."""
    real, labelled, synthetic = training.real, training.labelled, training.synthetic
    settings, device = training.settings, training.learner.prompt.device
    sources: list[_Source] = []

    def add(
        images: Batch, batch: int, loss: Callable[[Tensor, Tensor], Tensor], weight: float
    ) -> None:
        size = min(batch, len(images))
        devices = (images.features.device, device)
        positions = _batches(len(images), size, generator, devices)

        def images_at(where: Tensor) -> Batch:
            return images[where].to(device)

        sources.append(_Source(len(images), size, images_at, loss, weight, positions))

    if real is not None:
        targets, loss = real.targets, LOSSES.load(training.loss)
        add(real.batch, settings.batch, lambda z, at: loss(z, targets[at]), 1.0)
    if labelled is not None and len(labelled):
        labels = labelled.labels
        size = settings.batch
        if real is not None:
            low, high = LABELLED_BATCH
            size = min(high, max(low, settings.batch * len(labelled) // len(real)))
        weight = settings.labelled_weight
        among = torch.unique(labels) if settings.labelled_among == "seen" else slice(None)
        add(labelled.batch, size, lambda z, at: cross_entropy(only(z, among), labels[at]), weight)
    if synthetic is not None and len(synthetic):
        drawn = synthetic.labels
        weight = training.synthetic_weight if sources else 1.0
        size = settings.synthetic_batch
        add(synthetic.batch, size, lambda z, at: cross_entropy(z, drawn[at]), weight)
    return sources


def _batches(
    images: int, size: int, generator: torch.Generator, devices: Sequence[torch.device]
) -> Iterator[Sequence[Tensor]]:
    """Positions of batches without end, on each device. Each pass has a new order and drops a short
    last batch."""
    while True:
        order = torch.randperm(images, generator=generator)
        copies = [order.to(device) for device in devices]
        for start in range(0, images - size + 1, size):
            yield [copy[start : start + size] for copy in copies]


def learning_rate_factor(step: int, steps: int, warmup: float) -> float:
    """Factor on the learning rate: linear from 0 over the warm-up share, then cosine to 0.

    >>> [round(learning_rate_factor(s, 100, 0.1), 2) for s in (0, 5, 10, 55, 100)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    rise = round(warmup * steps)
    if step < rise:
        return step / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


# ---------------------------------------------------------------- losses on candidate sets


def candidate_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over images of `-log sum_c y_c softmax(z)_c`; cross-entropy where y is one-hot.

    Source: CPL's `cc` (arXiv:2406.10502), by logsumexp so that small scores do not underflow.

    Args:
        logits: (B, C).
        targets: (B, C), each row with a value above 0.
    """
    return -(logits.log_softmax(dim=-1) + targets.log()).logsumexp(dim=-1).mean()


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over images of `-sum_c y_c log softmax(z)_c`.

    Source: CPL's `ce`, and its `rc` (re-weighted, arXiv:2007.08929), where y is the confidence
    in each candidate, computed again after each pass.
    """
    return -(targets * logits.log_softmax(dim=-1)).sum(dim=-1).mean()


def only(logits: Tensor, classes: Tensor | slice) -> Tensor:
    """Logits (B, C) with all other classes removed from the softmax.

    Source: CoOp and VPT in GRIP's repository, among seen classes (docs/method.md, step 5).
    """
    kept = torch.full_like(logits, -math.inf)
    kept[:, classes] = logits[:, classes]
    return kept


def confidence(logits: Tensor, candidates: Tensor) -> Tensor:
    """Scores (M, C) within the candidate set of each image; rows sum to 1.

    Args:
        candidates: (M, C), above 0 for candidates.
    """
    return logits.masked_fill(candidates <= 0, -math.inf).softmax(dim=-1)


class _Confidences:
    """Targets of `rc`: the confidence in each candidate of an image, computed by the prompt."""

    def __init__(self, real: Targeted) -> None:
        self.candidates = sparse(real.targets)
        self.weights = replace(self.candidates, values=self.candidates.values.clone())
        self.real = Targeted(real.batch, self.weights)
        self.weights.update(self._even)

    def _even(self, rows: Tensor) -> Tensor:
        """At first all candidates of an image have equal weight."""
        sets = self.candidates[rows]
        return sets / sets.sum(dim=-1, keepdim=True)

    @torch.no_grad()
    def update(self, learner: PromptLearner) -> None:
        logits = learner.logits(self.real.batch).to(self.weights.values.device)
        self.weights.update(lambda rows: confidence(logits[rows], self.candidates[rows]))

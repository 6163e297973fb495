"""Train prompts on pseudo-labelled, labelled and synthetic images, several in one computation."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from air_core.backbone.clip import tf32_products
from air_core.losses import confidence, only
from air_core.prompts import PromptLearner, logits_together
from air_core.settings import TrainSettings
from air_core.settings.components import LOSSES
from air_core.types import Encoded, Labelled, Targets, sparse

# M selected pool images, C classes; of a step B images: x, u, s of the pool, labelled and synthetic
# ones, with their targets y, v, c.

MOMENTUM = 0.9
LABELLED_BATCH = (8, 256)  # smallest and largest batch of labelled images in CPL
# Share of the free memory of a device for the images of a source; a step needs the rest.
IMAGES_SHARE = 0.25
CHECKED = 50  # steps between two reads of the losses, since a read waits for the device


@dataclass(frozen=True)
class Targeted:
    """Images with their targets."""

    images: Encoded
    targets: Targets  # (M, C) one-hot, multi-hot or soft; or classes (M,)

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True, kw_only=True)
class Training:
    """The training of one prompt: images, loss and settings.

    Args:
        real: pseudo-labelled pool images.
        labelled: images with their true labels (SSL, TRZSL).
        synthetic: images with the class that each was drawn for. At least one of the three sources
            must have images.
        synthetic_weight: β.
        loss: of `real`, a key of LOSSES.
        seed: of the batch order.
        uses_tf32: of the backbone; gradients use TF32 if all trainings do.
        report: called after each step with (steps done, steps).
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
        assert self.real or self.labelled or self.synthetic

    def images(self, classes: int) -> tuple[Encoded, Tensor]:
        """All M training images with their targets (M, classes)."""
        real = self.real
        parts = [] if real is None else [(real.images, real.targets[torch.arange(len(real))])]
        for known in (self.labelled, self.synthetic):
            if known:
                parts.append((known.images, one_hot(known.labels, classes).float()))
        batches, targets = zip(*parts, strict=True)
        return Encoded.joined(batches), torch.cat(targets)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Sizes of the batches of real, labelled and synthetic images; 0 where there are none."""
        real, labelled, synthetic = (
            len(each or ()) for each in (self.real, self.labelled, self.synthetic)
        )
        size, (low, high) = self.settings.batch, LABELLED_BATCH
        known = min(high, max(low, size * labelled // real)) if real else size
        drawn = self.settings.synthetic_batch
        return min(size, real), min(known, labelled), min(drawn, synthetic)

    @property
    def steps(self) -> int:
        return self.settings.steps or self.settings.epochs * self.steps_per_pass

    @property
    def steps_per_pass(self) -> int:
        """Steps of a pass through the first source that has images."""
        sources = zip((self.real, self.labelled, self.synthetic), self.sizes, strict=True)
        return next(len(images) // size for images, size in sources if images)


def step_losses(training: Training) -> Generator[Encoded | Tensor, Tensor, None]:
    """For each step yields the images, is sent their logits (B, C), and yields the loss.

    L = L_r + labelled_weight L_labelled + β L_s; each term is the mean over its own batch.

    Source: AiR, L = L_r + β L_s (docs/method.md, step 5); sizes of labelled batches from CPL.
    """
    settings, learner, known = training.settings, training.learner, training.labelled
    weight, beta = settings.labelled_weight, training.synthetic_weight
    if not (training.real or known):
        beta = 1.0
    among: Tensor | slice = slice(None)
    if known and settings.labelled_among == "seen":
        among = torch.unique(known.labels)
    loss = LOSSES.load(training.loss)
    reweighted = _Confidences(training.real) if training.loss == "rc" and training.real else None
    real = reweighted.real if reweighted else training.real
    order = torch.Generator().manual_seed(training.seed)
    pool, labelled, synthetic = (
        _batches(images, size, order, learner.prompt.device)
        for images, size in zip((real, known, training.synthetic), training.sizes, strict=True)
    )
    for step in range(training.steps):
        if reweighted and step and step % training.steps_per_pass == 0:
            reweighted.update(learner)
        (x, y), (u, v), (s, c) = next(pool), next(labelled), next(synthetic)
        joined = Encoded.joined([images for images in (x, u, s) if images is not None])
        del x, u, s  # the pass needs their memory
        logits = yield joined
        z = iter(torch.split(logits, [len(of) for of in (y, v, c) if len(of)]))
        l_r = loss(next(z), y) if len(y) else 0.0
        l_l = cross_entropy(only(next(z), among), v) if len(v) else 0.0
        l_s = cross_entropy(next(z), c) if len(c) else 0.0
        yield l_r + weight * l_l + beta * l_s  # type: ignore[misc]  # some source has images


def fit(trainings: Sequence[Training]) -> list[float | FloatingPointError]:
    """Train prompts in place, side by side, each with the result of training it alone.

    The prompts share the pass of the text tower, which takes most of the time of a step, and
    nothing else. Images, targets and loss are on the device of the prompt. Images that do not fit
    there stay on the CPU, and each step copies its batch.

    Returns:
        For each training the mean loss of the last tenth of its steps, or an error where its loss
        was not finite; such a training stops within CHECKED steps and the others continue.
    """
    runs = [_Run(_near_prompt(training)) for training in trainings]
    optimiser = torch.optim.SGD([run.group() for run in runs], momentum=MOMENTUM)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, [run.rate for run in runs])
    while active := [run for run in runs if run.is_active]:
        # One pass of the tower serves all batches of all prompts.
        batches = [next(run.losses) for run in active]
        logits = logits_together([run.learner for run in active], batches)
        losses = [run.losses.send(z) for run, z in zip(active, logits, strict=True)]
        optimiser.zero_grad()  # without a gradient, the prompt of a finished run does not change
        with tf32_products(all(run.training.uses_tf32 for run in active)):
            torch.autograd.backward(losses)
        for run in active:
            torch.nn.utils.clip_grad_norm_(run.learner.prompt, run.training.settings.clip)
        optimiser.step()
        schedule.step()
        for run, loss in zip(active, losses, strict=True):
            run.finish_step(loss.detach())
    return [run.error or run.last_loss() for run in runs]


class _Run:
    """State of a training."""

    def __init__(self, training: Training) -> None:
        self.training, self.learner = training, training.learner
        self.losses: Generator[Any, Tensor, None] = step_losses(training)
        self.steps = training.steps
        self.done = 0  # steps
        self.read: list[float] = []  # losses of the first steps
        self.unread: list[Tensor] = []  # of the steps after these
        self.error: FloatingPointError | None = None

    @property
    def is_active(self) -> bool:
        return self.error is None and self.done < self.steps

    def group(self) -> dict[str, Any]:
        """Parameter group of the optimiser."""
        settings = self.training.settings
        return {
            "params": [self.learner.prompt],
            "lr": settings.learning_rate,
            "weight_decay": settings.weight_decay,
        }

    def rate(self, step: int) -> float:
        return learning_rate_factor(step, self.steps, self.training.settings.warmup)

    def finish_step(self, loss: Tensor) -> None:
        """Count a step. Every CHECKED steps, read the losses; set `error` at one that is not
        finite, which has changed the prompt of this training alone."""
        self.done += 1
        self.unread.append(loss)
        if self.done % CHECKED == 0 or self.done == self.steps:
            for value in torch.stack(self.unread).tolist():
                if not math.isfinite(value):
                    step = len(self.read)
                    self.error = FloatingPointError(f"the loss became {value} after {step} steps")
                    break
                self.read.append(value)
            self.unread.clear()
        self.training.report(self.done, self.steps)

    def last_loss(self) -> float:
        last = self.read[-max(1, self.steps // 10) :]
        return sum(last) / len(last)


def _batches(
    source: Targeted | Labelled | None, size: int, order: torch.Generator, device: torch.device
) -> Iterator[tuple[Any, Any]]:
    """Batches of images and targets without end, on a device. Each pass has a new order and drops
    a short last batch."""
    if not source:
        yield from repeat((None, ()))
        return
    targets = source.labels if isinstance(source, Labelled) else source.targets
    near = source.images.features.device
    while True:
        permutation = torch.randperm(len(source), generator=order)
        here, there = permutation.to(near), permutation.to(device)
        for start in range(0, len(source) - size + 1, size):
            where, at = here[start : start + size], there[start : start + size]
            yield source.images[where].to(device), targets[at]


def learning_rate_factor(step: int, steps: int, warmup: float) -> float:
    """Factor on the learning rate: linear from 0 over the warm-up share, then cosine to 0.

    >>> [round(learning_rate_factor(s, 100, 0.1), 2) for s in (0, 5, 10, 55, 100)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    rise = round(warmup * steps)
    if step < rise:
        return step / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


class _Confidences:
    """Targets of `rc`: the confidence in each candidate of an image, computed by the prompt."""

    def __init__(self, real: Targeted) -> None:
        self.candidates = sparse(real.targets)
        self.weights = replace(self.candidates, values=self.candidates.values.clone())
        self.real = Targeted(real.images, self.weights)
        self.weights.update(self._even)

    def _even(self, rows: Tensor) -> Tensor:
        """At first all candidates of an image have equal weight."""
        sets = self.candidates[rows]
        return sets / sets.sum(dim=-1, keepdim=True)

    @torch.no_grad()
    def update(self, learner: PromptLearner) -> None:
        logits = learner.logits(self.real.images).to(self.weights.values.device)
        self.weights.update(lambda rows: confidence(logits[rows], self.candidates[rows]))


# ---------------------------------------------------------------- devices


def _near_prompt(training: Training) -> Training:
    """The same with all images, if they fit, and all targets on the device of the prompt."""
    device = training.learner.prompt.device
    real, known = training.real, (training.labelled, training.synthetic)
    labelled, synthetic = (
        each and Labelled(_near(each.images, device), each.labels.to(device)) for each in known
    )
    if real is not None:
        targets = real.targets if training.loss != "rc" else sparse(real.targets)
        real = Targeted(_near(real.images, device), targets.to(device))
    return replace(training, real=real, labelled=labelled, synthetic=synthetic)


def _near(images: Encoded, device: torch.device) -> Encoded:
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

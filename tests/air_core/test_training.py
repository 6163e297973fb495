"""Losses, learning-rate schedule and training loop, tested on a linear model."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import one_hot
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from air_core.losses import confidence
from air_core.settings import TrainSettings
from air_core.training import Targeted, Training, fit, learning_rate_factor
from air_core.types import Encoded, Labelled

PLAIN = TrainSettings(
    steps=60, batch=8, synthetic_batch=8, learning_rate=0.5, weight_decay=0.0, warmup=0.0, clip=10.0
)


class Linear:
    """A learner whose prompt is a matrix."""

    def __init__(self, width: int = 6, classes: int = 3, device: str = "cpu") -> None:
        self.weight = Parameter(torch.zeros(width, classes, device=device))

    def logits(self, batch: Encoded) -> Tensor:
        return batch.features @ self.weight

    @property
    def prompt(self) -> Parameter:
        return self.weight


def images(count: int = 24, seed: int = 0) -> Labelled:
    """Three classes around three axes of six dimensions."""
    labels = torch.arange(count) % 3
    noise = 0.3 * torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    return Labelled(Encoded(torch.eye(6)[labels] + noise), labels)


def trained(
    settings: TrainSettings = PLAIN, *, learner: Linear | None = None, **given: Any
) -> tuple[Linear, float]:
    """A learner after training on `images()` or on the given images, and its last loss."""
    learner = learner or Linear()
    if isinstance(real := given.get("real", images()), Labelled):
        given["real"] = Targeted(real.images, one_hot(real.labels, 3).float())
    usual = {"labelled": None, "synthetic": None, "synthetic_weight": 1.0, "loss": "cc", "seed": 0}
    [last] = fit([Training(learner=learner, settings=settings, **(usual | given))])
    if isinstance(last, FloatingPointError):
        raise last
    return learner, last


def accuracy(learner: Linear, on: Labelled) -> float:
    return (learner.logits(on.images).argmax(dim=-1) == on.labels).double().mean().item()


# ---------------------------------------------------------------- the schedule


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.0), (1, 0.04), (2, 0.9), (5, 0.0)])
def test_the_shortest_schedules_learn_something(steps, warmup):
    factors = [learning_rate_factor(step, steps, warmup) for step in range(steps)]
    assert all(0 <= factor <= 1 for factor in factors)
    assert max(factors) > 0 or round(warmup * steps) >= steps


# ---------------------------------------------------------------- the loop


def test_the_returned_loss_is_the_mean_of_the_last_tenth_of_the_steps():
    """At a learning rate near 0, every step has the initial loss."""
    _, loss = trained(replace(PLAIN, learning_rate=1e-9))
    assert loss == pytest.approx(math.log(3), abs=1e-4)


def test_the_same_seed_gives_the_same_bits_another_seed_another_order():
    first, again, other = (trained(seed=seed)[0].weight for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.testing.assert_close(first, other, atol=0.3, rtol=0)


def marked(count: int) -> Labelled:
    """Image i has a value in column i only, so the weights show which images were used."""
    return Labelled(Encoded(torch.eye(count)), torch.zeros(count, dtype=torch.long))


@pytest.mark.parametrize(
    ("length", "batch", "count", "used"),
    [
        ({"steps": 1}, 4, 12, 4),
        ({"steps": 2}, 4, 12, 8),
        ({"steps": 3}, 4, 12, 12),  # a pass uses every image once
        ({"steps": None, "epochs": 1}, 4, 12, 12),
        ({"steps": 1, "epochs": 9}, 4, 12, 4),
        ({"steps": 1}, 64, 5, 5),  # fewer images than a batch are one batch
    ],
)
def test_a_training_uses_each_image_once_in_a_pass(length, batch, count, used):
    settings = replace(PLAIN, batch=batch, **length)
    learner, _ = trained(settings, learner=Linear(width=count), real=marked(count))
    assert (learner.weight.detach().abs().sum(dim=1) > 0).sum() == used


@pytest.mark.parametrize("source", ["real", "labelled", "synthetic"])
def test_images_of_one_source_are_enough(source):
    learner, loss = trained(**{"real": None, source: images()})
    assert loss < 0.5 * math.log(3)  # at the start all classes have the same score
    assert accuracy(learner, images(60, seed=1)) > 0.9


def test_classes_with_labelled_images_only_are_learned():
    two = images()[images().labels < 2]
    third = images(60, seed=1)
    third = third[third.labels == 2]
    taught, _ = trained(real=two, labelled=images(6, seed=3))
    assert accuracy(taught, third) > 0.9
    ignored, _ = trained(replace(PLAIN, labelled_weight=0.0), real=two, labelled=images(6, seed=3))
    assert accuracy(ignored, third) < 0.3


def test_rc_concentrates_on_one_of_the_candidates():
    """Half of the images also have a wrong candidate, which the other images reveal."""
    data = images(60)
    targets = one_hot(data.labels, 3).float()
    targets[::2] = (targets[::2] + targets[::2].roll(1, dims=1)).clamp(max=1)
    learner, _ = trained(replace(PLAIN, steps=200), real=Targeted(data.images, targets), loss="rc")
    with torch.no_grad():
        believed = confidence(learner.logits(data.images), targets)[::2]
    assert (believed.gather(1, data.labels[::2, None]) > 0.8).double().mean() > 0.9


def test_rc_starts_from_even_confidence_as_in_cpl():
    """A candidate set of three classes has the same weight as a set of one class."""
    real = Targeted(
        Encoded(torch.eye(2)), torch.tensor([[1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    )
    _, loss = trained(replace(PLAIN, steps=1), learner=Linear(2, 4), real=real, loss="rc")
    assert loss == pytest.approx(math.log(4))


def test_the_two_losses_are_added_with_the_weight():
    real, synthetic = images(8), images(8, seed=2)
    settings = replace(PLAIN, steps=1)
    given = {"real": real, "synthetic": synthetic}
    losses = [trained(settings, synthetic_weight=w, **given)[1] for w in (0, 1, 3)]
    # Initially all classes have the same score, in both trainings.
    assert losses == pytest.approx([math.log(3), 2 * math.log(3), 4 * math.log(3)])


def test_weight_decay_keeps_the_prompt_small_and_clipping_its_steps():
    free = trained()[0].weight.norm()
    assert trained(replace(PLAIN, weight_decay=0.1))[0].weight.norm() < 0.8 * free
    short = replace(PLAIN, steps=1, learning_rate=1.0, clip=0.01)
    assert trained(short)[0].weight.norm().item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    ("uses_tf32", "precision"),
    [((True, True), "high"), ((True, False), "highest"), ((False,), "highest")],
)
def test_gradients_use_tf32_if_all_trainings_do(uses_tf32, precision):
    learners, seen = [Linear() for _ in uses_tf32], set()
    for learner in learners:
        learner.weight.register_hook(lambda _: seen.add(torch.get_float32_matmul_precision()))
    given = {"real": None, "labelled": images(), "synthetic": None, "synthetic_weight": 0.0}
    given |= {"settings": replace(PLAIN, steps=2), "loss": "cc", "seed": 0}
    each = zip(learners, uses_tf32, strict=True)
    fit([Training(learner=learner, uses_tf32=flag, **given) for learner, flag in each])
    assert seen == {precision}
    assert torch.get_float32_matmul_precision() == "highest"


# ---------------------------------------------------------------- devices


class Crossings(TorchDispatchMode):
    """Counts the operations whose tensors are on two devices."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [one for one in tree_leaves((args, kwargs, result)) if isinstance(one, Tensor)]
        self.count += len({one.device.type for one in tensors}) > 1
        return result


@pytest.mark.parametrize(("share", "copied"), [(1.0, 0), (0.0, 3)])
@pytest.mark.parametrize("loss", ["cc", "rc"])
def test_a_step_copies_nothing_between_devices_if_the_images_fit(monkeypatch, loss, share, copied):
    """The prompt is on torch's device without memory, the images are on the CPU. Where they do not
    fit beside the prompt, a step copies its batch of each of the three sources."""
    monkeypatch.setattr("air_core.training.IMAGES_SHARE", share)
    monkeypatch.setattr("air_core.training._free_memory", lambda device: 1e9)
    crossed = []

    def report(step: int, steps: int) -> None:
        crossed.append(crossings.count)

    given = {"labelled": images(), "synthetic": images(), "loss": loss, "report": report}
    with Crossings() as crossings, pytest.raises(NotImplementedError, match="no data"):
        # The last of six steps reads the losses.
        trained(replace(PLAIN, steps=6), learner=Linear(device="meta"), **given)
    second, third, fourth, fifth = (b - a for a, b in itertools.pairwise(crossed))
    assert second == third == fifth == copied
    assert fourth > copied  # positions of the next pass of each source

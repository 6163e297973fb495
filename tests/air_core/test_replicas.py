"""Prompts that are trained side by side have the same results and failures as alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize, one_hot
from torch.utils._python_dispatch import TorchDispatchMode

from air_core.backbone import Backbone
from air_core.backbone.loading import load_backbone
from air_core.prompts import PromptLearner, build_learner
from air_core.settings import PromptSettings, TrainSettings
from air_core.training import CHECKED, Targeted, Training, fit
from air_core.types import Encoded, Labelled

NAMES = ("tree", "annual crop land", "river", "highway or road")


@pytest.fixture
def double_clip() -> Iterator[Backbone]:
    """A CLIP in double precision, so that its results differ by little."""
    clip = load_backbone("tiny")
    clip.model.to(torch.float64)
    torch.set_default_dtype(torch.float64)
    yield clip
    torch.set_default_dtype(torch.float32)


def images(clip: Backbone, count: int, seed: int) -> Labelled:
    width = clip.model.text_projection.shape[1]
    features = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return Labelled(Encoded(normalize(features, dim=-1)), torch.arange(count) % len(NAMES))


def learner(clip: Backbone, seed: int, length: int = 3, modality: str = "text") -> PromptLearner:
    return build_learner(modality, PromptSettings(length=length), clip, NAMES, "{}", seed)


def training(clip: Backbone, seed: int, **changes: Any) -> Training:
    """A training with prompt and images by the seed."""
    real = images(clip, 24, seed)
    given: dict[str, Any] = {
        "learner": learner(clip, seed),
        "real": Targeted(real.images, one_hot(real.labels, len(NAMES)).to(real.images.features)),
        "labelled": None,
        "synthetic": None,
        "synthetic_weight": 0.0,
        "loss": "cc",
        "settings": TrainSettings(steps=6, batch=8, synthetic_batch=5, learning_rate=0.1),
        "seed": seed,
    }
    return Training(**(given | changes))


def different_trainings(clip: Backbone) -> list[Training]:
    """Trainings that differ in all settings that may differ."""
    settings = training(clip, 0).settings
    synthetic = images(clip, 16, 50)
    return [
        training(clip, 1),
        training(clip, 2, settings=replace(settings, learning_rate=0.02, weight_decay=0.3)),
        training(clip, 3, settings=replace(settings, steps=9, warmup=0.4), loss="rc"),
        training(clip, 4, synthetic=synthetic, synthetic_weight=0.7),
        training(clip, 5, labelled=images(clip, 8, 60), settings=replace(settings, steps=2)),
        training(clip, 6, real=None, synthetic=synthetic, settings=replace(settings, clip=0.01)),
    ]


def visual_training(clip: Backbone, **changes: Any) -> Training:
    pixels = torch.randn(24, 17, clip.vision.width, generator=torch.Generator().manual_seed(0))
    real = images(clip, 24, 7)
    targets = one_hot(real.labels, len(NAMES)).to(pixels)
    given = {
        "learner": learner(clip, 7, 2, "visual"),
        "real": Targeted(Encoded(real.images.features, pixels), targets),
    }
    return training(clip, 7, **(given | changes))


def of_two_lengths(clip: Backbone) -> list[Training]:
    return [training(clip, 1), training(clip, 2, learner=learner(clip, 2, 4))]


def of_two_modalities(clip: Backbone) -> list[Training]:
    return [training(clip, 1), visual_training(clip)]


@pytest.mark.parametrize("made", [different_trainings, of_two_lengths, of_two_modalities])
def test_trainings_side_by_side_give_the_same_prompts_as_each_alone(double_clip, made):
    together, alone = made(double_clip), made(double_clip)
    losses = fit(together)
    for ours, theirs, loss in zip(together, alone, losses, strict=True):
        assert loss == pytest.approx(fit([theirs])[0], rel=1e-8)
        torch.testing.assert_close(ours.learner.prompt, theirs.learner.prompt, rtol=0, atol=1e-9)


class HostReads(TorchDispatchMode):
    """Counts the operations whose result, or its shape, the host needs."""

    KINDS = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "_unique2")
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ in self.KINDS
        return function(*args, **(kwargs or {}))


def test_a_training_step_reads_no_number_from_the_device(tiny_clip):
    settings = TrainSettings(batch=8, steps=6, labelled_among="seen")
    labelled = training(tiny_clip, 8, labelled=images(tiny_clip, 8, 9), settings=settings)
    texts = [labelled, *different_trainings(tiny_clip)]  # one pass of the text tower
    for group in (texts, [visual_training(tiny_clip, loss="rc")]):
        reads: list[int] = []
        with HostReads() as counted:
            first = replace(group[0], report=lambda *_: reads.append(counted.count))  # noqa: B023
            fit([first, *group[1:]])
        assert reads == reads[:1] * 6


def test_a_failed_training_stops_soon_and_names_its_first_loss_that_is_not_finite(tiny_clip):
    settings = TrainSettings(steps=1000, batch=8, learning_rate=1e38)
    done: list[int] = []
    broken = training(tiny_clip, 1, settings=settings, report=lambda step, steps: done.append(step))
    fine = training(tiny_clip, 2)
    error, loss = fit([broken, fine])
    [alone] = fit([training(tiny_clip, 2)])
    assert str(error) == "the loss became nan after 2 steps"
    assert max(done) == CHECKED
    assert loss == pytest.approx(alone, rel=1e-5)

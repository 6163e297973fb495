"""Contracts of components: what each component of a registry must do, on small random data.

The tests check the components of this package with them, `airsweep plugin check` those of a plugin.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import optuna
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from air_core.auxiliary import AuxiliaryClassifier, auxiliary_classifier, high_fidelity
from air_core.backbone import Backbone
from air_core.backbone.loading import load_backbone
from air_core.datasets import get_dataset
from air_core.datasets.dataset import is_template
from air_core.prompts import StartsFromImages, build_learner, restored_learner
from air_core.pseudo_labels import assign
from air_core.settings import (
    UNKNOWN,
    AuxiliarySettings,
    FidelitySettings,
    GenerationSettings,
    PromptSettings,
    PseudoLabelSettings,
)
from air_core.settings.components import GENERATORS, LEARNERS, LOSSES
from air_core.types import Encoded, Labelled, PseudoLabels, sparse
from orchestrator.components import SAMPLERS
from orchestrator.spec import Dimension
from orchestrator.spec.sweep import Search

# N images, C classes, D feature width.

IMAGES, CLASSES, WIDTH, ROUNDS = 120, 6, 16, 4
SPACE = (Dimension(key="fusion_weight", min=0.0, max=1.0),)


class ContractError(ValueError):
    """A component does not keep its contract."""


def check_contract(key: str, name: str) -> None:
    """Check a component of the registry of a key.

    Raises:
        ContractError: the component does not keep the contract; the message says how.
        Exception: what the component raises.
    """
    CONTRACTS[key](name)


def need(condition: bool, what: str) -> None:
    """Raise ContractError with `what` unless the condition holds."""
    if not condition:
        raise ContractError(what)


def _strategy(name: str) -> None:
    """See air_core.pseudo_labels.Strategy."""
    scores = (3 * _random(IMAGES, CLASSES)).softmax(dim=-1)
    for growth in ("fixed", "growing"):
        settings = PseudoLabelSettings(kind=name, growth=growth, k=5, alpha=0.7, beta=0.5)
        previous: PseudoLabels | None = None
        for t in range(ROUNDS):
            given = scores.clone()
            labels, again = (
                assign(given, settings, iteration=t, iterations=ROUNDS, previous=previous)
                for _ in range(2)
            )
            need(torch.equal(given, scores), "the scores must not be changed")
            same = torch.equal(labels.indices, again.indices)
            targets, repeated = (sparse(each.targets).dense() for each in (labels, again))
            same &= torch.equal(targets, repeated)
            need(same, "equal scores must give equal pseudo-labels")
            distinct = len(set(labels.indices.tolist())) == len(labels)
            need(distinct, "`indices` (M,) must be distinct images")
            positive = bool((targets >= 0).all() and (targets.sum(dim=-1) > 0).all())
            need(positive, "`targets` must be >= 0, with a sum > 0 in each row")
            valid = labels.labels.dtype == torch.int64 and labels.labels.shape == (len(labels),)
            valid &= bool(((labels.labels >= 0) & (labels.labels < CLASSES)).all())
            need(valid, "`labels` (M,) must be classes, int64 from 0 to C - 1")
            previous = labels


def _loss(name: str) -> None:
    logits = _random(IMAGES, CLASSES).requires_grad_()
    targets = _random(IMAGES, CLASSES, 1).softmax(dim=-1)
    loss = LOSSES.load(name)(logits, targets)
    need(loss.shape == () and bool(loss.isfinite()), "the loss must be one finite number")
    [gradient] = torch.autograd.grad(loss, logits)
    need(bool(gradient.isfinite().all()), "the gradient of the logits must be finite")


def _auxiliary(name: str) -> None:
    settings, bank = AuxiliarySettings(kind=name), _bank()
    batch = Encoded(normalize(_random(10, WIDTH, 2), dim=-1))
    logits = []
    for _ in range(2):
        classifier = auxiliary_classifier(settings, bank, None, batch, CLASSES, 100.0)
        one_of = isinstance(classifier, AuxiliaryClassifier)
        need(one_of, "the classifier must be a LinearClassifier or a BankClassifier")
        logits.append(classifier.logits(batch))
    shape = logits[0].shape == (10, CLASSES) and bool(logits[0].isfinite().all())
    need(shape, "`logits` must be (N, C) and finite")
    need(torch.equal(*logits), "equal banks must give equal logits")


def _fidelity(name: str) -> None:
    bank, settings = _bank(), FidelitySettings(kind=name, keep=3)
    text = normalize(_random(CLASSES, WIDTH, 3), dim=-1)
    chosen = high_fidelity(bank, settings, text, _bank())
    known = {tuple(row) for row in bank.images.features.tolist()}
    subset = {tuple(row) for row in chosen.images.features.tolist()} <= known
    need(subset, "the selected images must be images of the bank")
    every = set(chosen.labels.tolist()) == set(range(CLASSES))
    need(every, "an image of each class must be selected")


def _learner(name: str) -> None:
    """See air_core.prompts.PromptLearner."""
    backbone, batch = _encoded()
    if "tokens" not in LEARNERS[name].facts:
        batch = Encoded(batch.features)
    classnames = tuple(f"class {c}" for c in range(CLASSES))
    made = (name, PromptSettings(length=4), backbone, classnames, "a photo of a {}")
    one, again = (build_learner(*made, seed=1) for _ in range(2))
    need(torch.equal(one.prompt, again.prompt), "an equal seed must give an equal prompt")
    if isinstance(one, StartsFromImages):
        targets = torch.eye(CLASSES)[torch.arange(len(batch)) % CLASSES]
        one.start_from(batch, targets)
        need(one.prompt.shape == again.prompt.shape, "images must not change the prompt's shape")
    logits = one.logits(batch)
    shape = logits.shape == (len(batch), CLASSES) and bool(logits.isfinite().all())
    need(shape, "`logits` must be (N, C) and finite")
    need(len(one.logits(batch[torch.arange(0)])) == 0, "no image must give logits (0, C)")
    need(logits.requires_grad, "`logits` must be differentiable in `prompt`")
    torch.autograd.backward(logits.logsumexp(dim=-1).sum())
    gradient = one.prompt.grad
    reached = gradient is not None and bool(gradient.isfinite().all() and gradient.any())
    need(reached, "the gradient of `prompt` must be finite and not 0")
    others = all(parameter.grad is None for parameter in backbone.model.parameters())
    need(others, "the backbone must not receive a gradient")
    with torch.no_grad():
        one.prompt.mul_(1.5)
        restored = restored_learner(*made, one.prompt.clone())
        same = torch.equal(one.logits(batch), restored.logits(batch))
    need(same, "settings, class names and `prompt` must give the same logits again")


def _dataset(name: str) -> None:
    """See air_core.datasets.Dataset. Reads the files, which must not need a data root."""
    dataset = get_dataset(name)
    need(bool(dataset.classnames), "`classnames` must not be empty")
    distinct = len(set(dataset.classnames)) == len(dataset.classnames)
    need(distinct, "`classnames` must be distinct")
    need(is_template(dataset.template), "`template` must have {} once, for the class name")
    files = dataset.files(None)
    need(files == sorted(files), "`files` must be sorted")
    need(bool(files), "`files` must not be empty: their digests are part of the keys of trials")
    examples = dataset.load(None)
    labels, count = examples.labels, len(examples.images)
    need(labels.shape == examples.parts.shape == (count,), "labels and parts must be (N,)")
    need(labels.dtype == np.int64, "`labels` must be int64")
    valid = (labels < len(dataset.classnames)) & ((labels >= 0) | (labels == UNKNOWN))
    need(bool(valid.all()), f"`labels` must be classes, from 0 to C - 1, or {UNKNOWN}: unknown")
    parts = {"train", "val", "test", "free"}
    need(set(examples.parts.tolist()) <= parts, f"`parts` must be of {', '.join(sorted(parts))}")
    need(examples.images[0].mode == "RGB", "images must be RGB")


def _backbone(name: str) -> None:
    """See air_core.backbone.Backbone."""
    backbone, classnames = load_backbone(name), [f"class {c}" for c in range(CLASSES)]
    images = backbone.encode_images(_images())
    texts = backbone.encode_texts(classnames)
    width = images.shape[1]
    shapes = images.shape == (2 * CLASSES, width) and texts.shape == (CLASSES, width)
    need(shapes, "images must give (N, D) and texts (C, D)")
    lengths = torch.cat([images, texts]).norm(dim=-1)
    need(torch.allclose(lengths, torch.ones(()), atol=1e-3), "features must have unit length")
    again = load_backbone(name).encode_images(_images())
    need(torch.equal(images, again), "equal images must give equal features")
    need(backbone.logit_scale > 0, "`logit_scale` must be a positive number")


def _generator(name: str) -> None:
    """See air_core.diffusion.ImageGenerator."""
    settings = GenerationSettings(size=32, num_inference_steps=2, precision="fp32")
    drawn, again = (
        GENERATORS.load(name)(settings, "cpu").generate("digit seven", [0, 3], [0, 1])
        for _ in range(2)
    )
    shape = drawn.shape == (2, 32, 32, 3) and drawn.dtype == torch.uint8
    need(shape, "`generate` must return (B, size, size, 3), uint8")
    need(torch.equal(drawn, again), "equal positions and attempts must give equal images")


def _sampler(name: str) -> None:
    search = Search(sampler=name, points=8, space=SPACE)

    def suggested(seed: int) -> list[float]:
        study = optuna.create_study(direction="maximize")
        points = []
        for number in range(8):
            study.sampler = SAMPLERS.load(name)(search, seed + number)
            trial = study.ask()
            points.append(trial.suggest_float("fusion_weight", 0.0, 1.0))
            study.tell(trial, points[-1])
        return points

    need(suggested(1) == suggested(1), "an equal seed must give equal points")


def _images() -> list[Image.Image]:
    colours = [tuple(map(int, row)) for row in _random(2 * CLASSES, 3).sigmoid() * 255]
    return [Image.new("RGB", (32, 32), colour) for colour in colours]


@cache
def _encoded() -> tuple[Backbone, Encoded]:
    """The tiny CLIP, and images with their features and tokens."""
    backbone = load_backbone("tiny")
    images = _images()
    return backbone, Encoded(backbone.encode_images(images), backbone.image_tokens(images))


def _random(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def _bank() -> Labelled:
    features = normalize(_random(IMAGES, WIDTH), dim=-1)
    return Labelled(Encoded(features), torch.arange(IMAGES) % CLASSES)


CONTRACTS: dict[str, Callable[[str], Any]] = {
    "pseudo_labels.kind": _strategy,
    "pseudo_labels.loss": _loss,
    "auxiliary.kind": _auxiliary,
    "fidelity.kind": _fidelity,
    "modality": _learner,
    "dataset": _dataset,
    "backbone": _backbone,
    "generator": _generator,
    "search.sampler": _sampler,
}

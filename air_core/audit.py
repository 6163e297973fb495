"""Audit a set of synthetic images: faults, agreement with their class, distance, test copies.

The audit computes numbers from pixels and CLIP features and removes no image. Which images a trial
leaves out is decided by `auxiliary.credible`, which reads no test image.

Source: KID, Binkowski et al. 2018 (arXiv:1801.01401). The thresholds were measured:
docs/results_guide.md.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from air_core.auxiliary import COPY, margins
from air_core.datasets import duplicates
from air_core.diffusion import FLAT

# N images, C classes, D feature width, T test images, P pool images.

Reason = Literal["blank", "near-constant", "not a number", "duplicate", "wrong class", "test copy"]
REASONS: tuple[Reason, ...] = (
    *("blank", "near-constant", "not a number"),
    *("duplicate", "wrong class", "test copy"),
)

NEAR_FLAT = 2 * FLAT  # levels: below this an image is near-constant
BITS = 20  # bits of the hash that may differ between copies, in addition to the cosine COPY
NEIGHBOURS = 10  # nearest images that vote on the class of an image
DOUBT = -0.1  # a margin below it is clearly negative
OWN, OTHERS = 0.2, 0.5  # largest share of votes for its class, smallest for another class
SUBSET, SUBSETS = 50, 100  # of KID
AT_ONCE = 512  # rows of a matrix of cosines


@dataclass(frozen=True)
class ImageSet:
    """Synthetic images with the class that each was drawn for."""

    features: Tensor  # (N, D), unit length
    labels: Tensor  # (N,)
    hashes: Tensor  # (N, 256) bool, from `difference_hash`
    spread: Tensor  # (N,) levels, from `spread`
    held: Tensor  # (N,) bool; False: rejected, so that no trial reads it

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class ReferenceImages:
    """Images that a set is compared with."""

    pool: Tensor  # (P, D) unlabelled real images
    base: Tensor | None  # (B, D) images of the same diffusion model without LoRA
    test: Tensor  # (T, D), without labels
    test_hash: Callable[[int], Tensor | None]  # (256,) bool of a test image; None: unreadable


@dataclass(frozen=True)
class Finding:
    """A fault of one image."""

    reason: Reason
    image: int  # position in the set
    value: float  # spread in levels, cosine, or margin
    other: int = -1  # the repeated image, the copied test image, or the class that it shows
    beside: float = 0.0  # bits that differ, or share of votes for the other class


@dataclass(frozen=True)
class Distance:
    """Kernel Inception Distance: mean and standard deviation over subsets."""

    mean: float
    std: float


@dataclass(frozen=True)
class Audit:
    """Result for N images. Positions and numbers of unsound images are -1 and nan."""

    findings: tuple[Finding, ...]
    sound: Tensor  # (N,) bool: neither blank nor near-constant, with finite features
    margins: Tensor  # (N,) float64
    guesses: Tensor  # (N,) the class that the text classifier predicts
    like: Tensor  # (N,) the nearest other image of its class
    like_cosine: Tensor  # (N,)
    test_like: Tensor  # (N,) the nearest test image
    test_cosine: Tensor  # (N,)
    distance: Distance
    base_distance: Distance | None


def audit(images: ImageSet, logits: Tensor, around: ReferenceImages) -> Audit:
    """Audit a set of images.

    Args:
        logits: (N, C) of the text classifier, over the classes that were drawn.
        around: pool, test and base images.
    """
    dull = _without_a_picture(images)
    sound = torch.ones(len(images), dtype=torch.bool)
    sound[[finding.image for finding in dull]] = False
    where = sound.nonzero().flatten()
    features, labels = images.features[where], images.labels[where]

    def spread_out(values: Tensor, fill: float) -> Tensor:
        whole = torch.full((len(images),), fill, dtype=values.dtype)
        whole[where] = values
        return whole

    margin = spread_out(margins(logits[where], labels), float("nan"))
    like, like_cosine = nearest_of_class(features, labels)
    test_like, test_cosine = nearest(features, around.test)
    findings = [
        *dull,
        *_duplicates(images, where),
        *_wrong_class(images, where, margin),
        *_test_copies(images, where[test_cosine >= COPY], around),
    ]
    findings.sort(key=lambda finding: (REASONS.index(finding.reason), finding.image))
    return Audit(
        findings=tuple(findings),
        sound=sound,
        margins=margin,
        guesses=spread_out(logits[where].argmax(dim=-1), -1),
        like=spread_out(torch.where(like < 0, like, where[like]), -1),
        like_cosine=spread_out(like_cosine, float("nan")),
        test_like=spread_out(test_like, -1),
        test_cosine=spread_out(test_cosine, float("nan")),
        distance=kid(features, around.pool),
        base_distance=None if around.base is None else kid(around.base, around.pool),
    )


# ---------------------------------------------------------------- pixels


def spread(picture: Image.Image) -> float:
    """Largest standard deviation of a colour channel, in the 256 levels of a channel."""
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
    return float(pixels.std(axis=(0, 1)).max())


def difference_hash(picture: Image.Image) -> Tensor:
    """(256,) bool, see `duplicates.difference_hash`."""
    return torch.from_numpy(duplicates.difference_hash(picture))


def _without_a_picture(images: ImageSet) -> list[Finding]:
    """Images that are blank, near-constant or not a number; the other checks leave them out."""
    finite = images.features.isfinite().all(dim=1)
    findings = []
    for i, level in enumerate(images.spread.tolist()):
        if level < FLAT or not images.held[i]:
            findings.append(Finding("blank", i, level))
        elif level < NEAR_FLAT:
            findings.append(Finding("near-constant", i, level))
        elif not finite[i]:
            findings.append(Finding("not a number", i, float("nan")))
    return findings


# ---------------------------------------------------------------- nearest images


def nearest(features: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) position and (N,) cosine of the nearest of `others`; -1 and nan if there are none."""
    if not len(features) or not len(others):
        return torch.full((len(features),), -1), torch.full((len(features),), float("nan"))
    parts = [(rows @ others.T).max(dim=1) for rows in features.split(AT_ONCE)]
    return torch.cat([p.indices for p in parts]), torch.cat([p.values for p in parts])


def nearest_of_class(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) position and (N,) cosine of the nearest other image of the class; -1 and nan if none."""
    positions = torch.full((len(labels),), -1)
    cosines = torch.full((len(labels),), float("nan"))
    for members in _classes(labels):
        if len(members) > 1:
            near = (features[members] @ features[members].T).fill_diagonal_(-2)
            best = near.max(dim=1)
            positions[members], cosines[members] = members[best.indices], best.values
    return positions, cosines


def _classes(labels: Tensor) -> Iterator[Tensor]:
    for c in sorted(set(labels.tolist())):
        yield (labels == c).nonzero().flatten()


def _duplicates(images: ImageSet, where: Tensor) -> list[Finding]:
    """Images that repeat an earlier image of their class which is no duplicate itself."""
    findings = []
    for members in _classes(images.labels[where]):
        members = where[members]
        features, hashes = images.features[members], images.hashes[members]
        cosines = features @ features.T
        first = [True] * len(members)
        for j in (cosines >= COPY).tril(-1).any(dim=1).nonzero().flatten().tolist():
            for i in (cosines[j, :j] >= COPY).nonzero().flatten().tolist():
                bits = int((hashes[i] ^ hashes[j]).sum())
                if first[i] and bits <= BITS:
                    first[j] = False
                    image, other = int(members[j]), int(members[i])
                    findings.append(Finding("duplicate", image, float(cosines[i, j]), other, bits))
                    break
    return findings


def _wrong_class(images: ImageSet, where: Tensor, margin: Tensor) -> list[Finding]:
    """Images whose margin is clearly negative, and whose neighbours are mostly of another class.

    The margin alone is not enough, since in an unfamiliar domain half of CLIP's predictions are
    wrong. The classes of the nearest images are independent of it.
    """
    doubtful = where[margin[where] < DOUBT]
    count = min(NEIGHBOURS, len(where) - 1)
    findings = []
    for part in doubtful.split(AT_ONCE):
        cosines = images.features[part] @ images.features[where].T
        cosines[part[:, None] == where[None, :]] = -2  # itself
        votes = images.labels[where[cosines.topk(count, dim=1).indices]]  # (n, count)
        own = (votes == images.labels[part][:, None]).double().mean(dim=1)
        for row, image in enumerate(part.tolist()):
            classes, counts = votes[row].unique(return_counts=True)
            share = float(counts.max()) / count
            other = int(classes[counts.argmax()])
            if own[row] <= OWN and share >= OTHERS:
                findings.append(Finding("wrong class", image, float(margin[image]), other, share))
    return findings


def _test_copies(images: ImageSet, near: Tensor, around: ReferenceImages) -> list[Finding]:
    """Copies of test images; training on them leaks the test set.

    Args:
        near: (M,) positions of images whose cosine to a test image reaches COPY.
    """
    findings = []
    hashes: dict[int, Tensor | None] = {}
    for part in near.split(AT_ONCE):
        cosines = images.features[part] @ around.test.T
        top = cosines.topk(min(3, len(around.test)), dim=1)
        for row, image in enumerate(part.tolist()):
            for cosine, test in zip(
                top.values[row].tolist(), top.indices[row].tolist(), strict=True
            ):
                if test not in hashes:
                    hashes[test] = around.test_hash(test)
                test_hash = hashes[test]
                differing = BITS + 1
                if test_hash is not None:
                    differing = int((images.hashes[image] ^ test_hash).sum())
                if cosine >= COPY and differing <= BITS:
                    findings.append(Finding("test copy", image, cosine, test, differing))
                    break
    return findings


# ---------------------------------------------------------------- distance


def kid(images: Tensor, real: Tensor, seed: int = 0) -> Distance:
    """Kernel Inception Distance of two sets of CLIP features; near 0 for the same distribution.

    This is the unbiased squared maximum mean discrepancy with the kernel (x.y / D + 1)^3, over
    SUBSETS random subsets of at most SUBSET images. Features have length sqrt(D), so that x.y / D
    is their cosine. The estimate can be below 0 and does not depend on the number of images.

    Source: Binkowski et al. 2018 (arXiv:1801.01401), Eq. 4, with CLIP in place of Inception.

    Args:
        images: (N, D) unit length.
        real: (P, D) unit length.

    Returns:
        Mean and standard deviation over the subsets; nan where a set has fewer than two images.
    """
    size = min(len(images), len(real), SUBSET)
    if size < 2:
        return Distance(float("nan"), float("nan"))
    rng = np.random.default_rng(seed)
    values = [
        _discrepancy(_random_subset(images, size, rng), _random_subset(real, size, rng))
        for _ in range(SUBSETS)
    ]
    return Distance(float(np.mean(values)), float(np.std(values, ddof=1)))


def _random_subset(features: Tensor, size: int, rng: np.random.Generator) -> Tensor:
    return features[torch.from_numpy(rng.permutation(len(features))[:size])].double()


def _discrepancy(x: Tensor, y: Tensor) -> float:  # (n, D), (n, D)
    n = len(x)
    within = sum(_kernel(one, one).fill_diagonal_(0).sum() / (n * (n - 1)) for one in (x, y))
    return float(within - 2 * _kernel(x, y).mean())


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T + 1) ** 3

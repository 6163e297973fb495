"""The auxiliary classifier, which compares images with images of known or pseudo-labelled class.

AiR (arXiv:2504.11930) builds it from synthetic images of known class, a control from
pseudo-labelled real ones. docs/method.md (step 3) says which details are inferred.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from torch.nn.utils.rnn import pad_sequence

from air_core.classifiers import LinearClassifier
from air_core.settings import AuxiliarySettings, FidelitySettings
from air_core.settings.components import AUXILIARIES, FIDELITIES
from air_core.tools.chunks import by_rows
from air_core.types import Encoded, Labelled

# N images, C classes, D feature width.

CACHE_SHARPNESS = 5.5  # Tip-Adapter's beta (arXiv:2111.03930)
COSINES = 2**25  # of a chunk of images with the bank, 128 MiB
SHRINKAGE = 0.2  # of the within-class covariance towards a multiple of the identity
PROBE_STEPS, PROBE_RATE, PROBE_DECAY = 200, 1e-2, 1e-2
MIN_FADED = 8  # synthetic images per class that `auxiliary.fade` keeps in the last round


@dataclass(frozen=True)
class BankClassifier:
    """Compares an image with every image of a bank, class by class.

    With `nearest` k: mean cosine to the k nearest images of each class. With 0: Tip-Adapter's cache
    model (arXiv:2111.03930), with affinities averaged within a class.
    """

    bank: Tensor  # (N, D), centred, unit length
    labels: Tensor  # (N,), every class 0 .. C - 1 at least max(1, nearest) times
    center: Tensor  # (D,), subtracted from features
    nearest: int
    sharpness: float

    def logits(self, batch: Encoded) -> Tensor:
        """(B, C)"""
        return by_rows(self._logits, batch.features, width=len(self.bank), elements=COSINES)

    def _logits(self, x: Tensor) -> Tensor:
        cosines = normalize(x - self.center, dim=-1) @ self.bank.T  # (B, N)
        return self.sharpness * (self._nearest if self.nearest else self._cache)(cosines)

    def _nearest(self, cosines: Tensor) -> Tensor:
        padded = cosines[:, self._places.clamp(min=0)].masked_fill(self._places < 0, -torch.inf)
        return padded.topk(self.nearest, dim=-1).values.mean(dim=-1)

    @cached_property  # torch.export cannot trace sizes that depend on values
    def _places(self) -> Tensor:
        """(C, M) images of each class, then -1."""
        members = [(self.labels == c).nonzero().flatten() for c in range(self._num_classes)]
        return pad_sequence(members, batch_first=True, padding_value=-1)

    def _cache(self, cosines: Tensor) -> Tensor:
        members = cosines.new_zeros(len(self.labels), self._num_classes)  # (N, C)
        members.scatter_(1, self.labels[:, None], 1.0)
        return (-CACHE_SHARPNESS * (1 - cosines)).exp() @ members / members.sum(dim=0)

    @cached_property
    def _num_classes(self) -> int:
        return int(self.labels.max()) + 1


AuxiliaryClassifier = LinearClassifier | BankClassifier


@dataclass(frozen=True)
class Bank:
    """Images that an auxiliary classifier is built from."""

    settings: Any  # AuxiliarySettings, or the own settings of a plugin's component
    features: Tensor  # (N, D), centred
    labels: Tensor  # (N,)
    counts: Tensor  # (C,) images of each class
    center: Tensor  # (D,)
    sharpness: float

    @property
    def unit(self) -> Tensor:  # (N, D)
        return normalize(self.features, dim=-1)

    def means(self, features: Tensor) -> Tensor:
        """Class means (C, D) of features (N, D) of the same images."""
        sums = features.new_zeros(len(self.counts), features.shape[1])
        return sums.index_add_(0, self.labels, features) / self.counts[:, None]

    def compared(self, nearest: int) -> BankClassifier:
        """The classifier that compares with the `nearest` images of each class; 0: with all."""
        return BankClassifier(self.unit, self.labels, self.center, nearest, self.sharpness)


def auxiliary_classifier(
    settings: AuxiliarySettings,
    synthetic: Labelled | None,
    real: Labelled | None,
    pool: Encoded,
    num_classes: int,
    logit_scale: float,
) -> AuxiliaryClassifier:
    """Build the auxiliary classifier p̂_c.

    With `center`, synthetic and real features each lose their own mean, which removes the shift
    between the two domains.

    Args:
        synthetic: images with the class that each was drawn for.
        real: pool images with their pseudo-label.
        pool: all pool images; real and test images lose their mean.
        num_classes: C; labels are 0 .. C - 1.
        logit_scale: factor on cosines, unless `temperature` is `kappa`.

    Raises:
        ValueError: a class has no image.
    """
    mean = pool.features.mean(dim=0) if settings.center else torch.zeros(pool.features.shape[1])
    parts = []
    if synthetic is not None and len(synthetic):
        synthetic_mean = synthetic.images.features.mean(dim=0) if settings.center else mean
        parts.append((synthetic.images.features - synthetic_mean, synthetic.labels))
    if real is not None and len(real):
        parts.append((real.images.features - mean, real.labels))
    if not parts:
        raise ValueError("the auxiliary classifier has no image at all")
    features = torch.cat([part[0] for part in parts])  # (N, D)
    labels = torch.cat([part[1] for part in parts])
    counts = labels.bincount(minlength=num_classes)
    if not counts.all():
        empty = (counts == 0).nonzero().flatten().tolist()
        raise ValueError(f"the auxiliary classifier has no image of class {empty}")
    sharpness = settings.kappa if settings.temperature == "kappa" else logit_scale
    own = AUXILIARIES.settings_of(settings.kind, settings)
    bank = Bank(own, features, labels, counts, mean, sharpness)
    classifier: AuxiliaryClassifier = AUXILIARIES.load(settings.kind)(bank)
    return classifier


# ---------------------------------------------------------------- forms


@AUXILIARIES.add("prototype", summary="class means")
def prototype(bank: Bank) -> LinearClassifier:
    """Cosine to the unit mean of each class: AiR's auxiliary classifier."""
    weight = normalize(bank.means(bank.unit), dim=-1)
    bias = torch.zeros(len(weight))
    return LinearClassifier(weight, bias, bank.center, unit=True, sharpness=bank.sharpness)


@AUXILIARIES.add("lda", summary="linear discriminant")
def lda(bank: Bank) -> LinearClassifier:
    """Linear discriminant with a shrunk within-class covariance and equal priors.

    Its logits are log-likelihood ratios, so CLIP's temperature does not apply. It is computed in
    float64, since with few images the covariance is close to singular.

    Raises:
        ValueError: no two images of a class differ.
    """
    x = bank.features.double()
    means = bank.means(x)  # (C, D)
    within = x - means[bank.labels]
    width = x.shape[1]
    covariance = within.T @ within / max(1, len(x) - len(means))
    scale = covariance.trace() / width
    if scale < 1e-12:  # of unit features
        raise ValueError(
            "auxiliary.kind lda needs images of a class that differ, but the bank has one image of "
            "each class, or copies of it; use another auxiliary.kind or more images"
        )
    identity = torch.eye(width, dtype=x.dtype)
    covariance = (1 - SHRINKAGE) * covariance + SHRINKAGE * scale * identity
    weight = torch.linalg.solve(covariance, means.T).T  # (C, D)
    bias = -0.5 * (weight * means).sum(dim=-1)
    return LinearClassifier(weight.float(), bias.float(), bank.center, unit=False, sharpness=1.0)


@AUXILIARIES.add("knn", summary="nearest images", reads={"neighbours"})
def knn(bank: Bank) -> BankClassifier:
    """Mean cosine to the nearest images of each class."""
    return bank.compared(min(bank.settings.neighbours, int(bank.counts.min())))


@AUXILIARIES.add("cache", summary="Tip-Adapter's")
def cache(bank: Bank) -> BankClassifier:
    """Tip-Adapter's cache model (arXiv:2111.03930)."""
    return bank.compared(nearest=0)


@AUXILIARIES.add("linear_probe", summary="logistic regression")
def linear_probe(bank: Bank) -> LinearClassifier:
    """Logistic regression on unit features: full-batch AdamW that starts at the class means."""
    x, counts = bank.unit, bank.counts
    weight = (bank.sharpness * normalize(bank.means(x), dim=-1)).requires_grad_()
    bias = torch.zeros(len(counts), requires_grad=True)
    balance = len(x) / (len(counts) * counts.to(x.dtype))  # all classes have equal weight
    optimiser = torch.optim.AdamW([weight, bias], lr=PROBE_RATE, weight_decay=PROBE_DECAY)
    with torch.enable_grad():
        for _ in range(PROBE_STEPS):
            loss = cross_entropy(x @ weight.T + bias, bank.labels, weight=balance)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    weight, bias = weight.detach(), bias.detach()
    return LinearClassifier(weight, bias, bank.center, unit=True, sharpness=1.0)


# ---------------------------------------------------------------- selections of synthetic images


def high_fidelity(
    bank: Labelled, settings: FidelitySettings, text: Tensor, real: Labelled | None
) -> Labelled:
    """Select images of the auxiliary classifier by `settings.kind`.

    Source: docs/method.md, step 3 (class_mean is the inferred rule; argmax is DISEF's).

    Args:
        bank: images with the class that each was drawn for.
        text: (C, D) unit text features of the classes.
        real: pool images with their pseudo-label.
    """
    chosen: Labelled = FIDELITIES.load(settings.kind)(
        bank, FIDELITIES.settings_of(settings.kind, settings), text, real
    )
    return chosen


@FIDELITIES.add(
    "class_mean", summary="`keep` images nearest to the mean of the class", reads={"keep"}
)
def class_mean(bank: Labelled, settings: FidelitySettings, *_: Any) -> Labelled:
    return _nearest_images(bank, settings, lambda features, c: _mean(features))


@FIDELITIES.add("text", summary="`keep` images nearest to its text", reads={"keep"})
def near_text(bank: Labelled, settings: FidelitySettings, text: Tensor, *_: Any) -> Labelled:
    return _nearest_images(bank, settings, lambda features, c: text[c])


@FIDELITIES.add("argmax", summary="images that CLIP recognises")
def recognised(bank: Labelled, settings: FidelitySettings, text: Tensor, *_: Any) -> Labelled:
    """Images whose class CLIP recognises; each class keeps at least the best one."""

    def right_ones(features: Tensor, c: int) -> Tensor:
        right = (features @ text.T).argmax(dim=-1) == c
        right[(features @ text[c]).argmax()] = True
        return right.nonzero().flatten()

    return _of_each_class(bank, right_ones)


@FIDELITIES.add(
    "real_mean",
    summary="`keep` images nearest to the mean of its pseudo-labelled images",
    reads={"keep"},
)
def real_mean(
    bank: Labelled, settings: FidelitySettings, text: Tensor, real: Labelled | None
) -> Labelled:
    """A class without pseudo-labelled image: its own mean."""

    def target(features: Tensor, c: int) -> Tensor:
        if real is None or not bool((real.labels == c).any()):
            return _mean(features)
        return _mean(real.images.features[real.labels == c])

    return _nearest_images(bank, settings, target)


@FIDELITIES.add("random", summary="`keep` images", reads={"keep"})
def first_images(bank: Labelled, settings: FidelitySettings, *_: Any) -> Labelled:
    # The images of a class have independent noise, so the first ones are a random sample.
    return _of_each_class(bank, lambda features, c: slice(settings.keep))


@FIDELITIES.add("none", summary="all images")
def all_images(bank: Labelled, *_: Any) -> Labelled:
    return bank


def faded(bank: Labelled, progress: float) -> Labelled:
    """The first images of each class: all of them at progress 0, MIN_FADED per class at 1."""

    def first(features: Tensor, c: int) -> slice:
        return slice(max(MIN_FADED, round(len(features) * (1 - progress))))

    return _of_each_class(bank, first)


def _mean(features: Tensor) -> Tensor:  # (N, D) -> (D,)
    return normalize(features.mean(dim=0), dim=-1)


def _nearest_images(
    bank: Labelled, settings: FidelitySettings, target: Callable[[Tensor, int], Tensor]
) -> Labelled:
    """The images of each class with the largest cosine to the target (D,) of the class."""

    def best(features: Tensor, c: int) -> Tensor:
        order = (features @ target(features, c)).argsort(descending=True, stable=True)
        return order[: settings.keep].sort().values

    return _of_each_class(bank, best)


def _of_each_class(bank: Labelled, choose: Callable[[Tensor, int], Tensor | slice]) -> Labelled:
    """The images whose indices `choose` gives for the features (N, D) of a class."""
    kept = []
    for c in sorted(set(bank.labels.tolist())):
        members = (bank.labels == c).nonzero().flatten()
        kept.append(members[choose(bank.images.features[members], c)])
    return bank[torch.cat(kept)]

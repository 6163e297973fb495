"""The auxiliary classifier, which compares images with images of known or pseudo-labelled class.

AiR (arXiv:2504.11930) builds it from synthetic images of known class, a control from
pseudo-labelled real ones. docs/method.md (step 3) says which details are inferred.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, one_hot
from torch.nn.utils.rnn import pad_sequence

from air_core.classifiers import LinearClassifier
from air_core.specs import AuxiliarySettings, FidelitySettings
from air_core.types import Batch, Labelled

# N images, C classes, D feature width.

# Least CLIP cosine of two images of a class that are copies: measured, see docs/results_guide.md.
COPY = 0.997
SHRINKAGE = 0.2  # of the within-class covariance towards a multiple of the identity
CACHE_SHARPNESS = 5.5  # Tip-Adapter's beta (arXiv:2111.03930)
PROBE_STEPS, PROBE_RATE, PROBE_DECAY = 200, 1e-2, 1e-2


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

    def logits(self, batch: Batch) -> Tensor:
        """(B, C)"""
        cosines = normalize(batch.features - self.center, dim=-1) @ self.bank.T  # (B, N)
        return self.sharpness * (self._nearest(cosines) if self.nearest else self._cache(cosines))

    def _nearest(self, cosines: Tensor) -> Tensor:
        members = [(self.labels == c).nonzero().flatten() for c in range(self._num_classes)]
        places = pad_sequence(members, batch_first=True, padding_value=-1)  # (C, M)
        padded = cosines[:, places.clamp(min=0)].masked_fill(places < 0, -torch.inf)
        return padded.topk(self.nearest, dim=-1).values.mean(dim=-1)

    def _cache(self, cosines: Tensor) -> Tensor:
        members = one_hot(self.labels, self._num_classes).to(cosines.dtype)  # (N, C)
        return (-CACHE_SHARPNESS * (1 - cosines)).exp() @ members / members.sum(dim=0)

    @property
    def _num_classes(self) -> int:
        return int(self.labels.max()) + 1


AuxiliaryClassifier = LinearClassifier | BankClassifier


# ---------------------------------------------------------------- selection of images


def credible(synthetic: Labelled, settings: FidelitySettings, logits: Tensor) -> Labelled:
    """Drop copies, and images that the text classifier takes for another class.

    Each class keeps at least its image with the largest margin.

    Args:
        synthetic: images with the class that each was drawn for.
        logits: (N, C) of the text classifier for the same images, over the drawn classes.
    """
    labels, kept = synthetic.labels, torch.ones(len(synthetic), dtype=torch.bool)
    margin = margins(logits, labels)
    if settings.duplicates == "drop":
        kept &= ~copies(synthetic.batch.features, labels)
    if settings.min_margin is not None:
        kept &= margin >= settings.min_margin
    for c in sorted(set(labels.tolist()) - set(labels[kept].tolist())):
        members = (labels == c).nonzero().flatten()
        kept[members[margin[members].argmax()]] = True
    return synthetic[kept.nonzero().flatten()]


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """(N,) score of an image's own class minus the largest score of another class.

    >>> margins(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1]))
    tensor([ 0.0000, -0.4621], dtype=torch.float64)
    """
    scores = logits.double().softmax(dim=-1)
    own = scores.gather(1, labels[:, None]).squeeze(1)
    return own - scores.scatter(1, labels[:, None], -1.0).amax(dim=-1)


def copies(features: Tensor, labels: Tensor, cosine: float = COPY) -> Tensor:
    """(N,) bool: images whose cosine to an earlier image of their class is that of a copy.

    Args:
        features: (N, D) of unit length.
    """
    is_copy = torch.zeros(len(labels), dtype=torch.bool)
    for c in sorted(set(labels.tolist())):
        members = (labels == c).nonzero().flatten()
        near = features[members] @ features[members].T >= cosine
        first = torch.ones(len(members), dtype=torch.bool)
        for i in near.tril(-1).any(dim=1).nonzero().flatten().tolist():
            first[i] = not bool((near[i, :i] & first[:i]).any())
        is_copy[members] = ~first
    return is_copy


def high_fidelity(
    bank: Labelled, settings: FidelitySettings, text: Tensor, real: Labelled | None
) -> Labelled:
    """Select the `keep` images of each class that are nearest to a target of their class.

    Source: docs/method.md, step 3 (class_mean is the inferred rule; argmax is DISEF's).

    Args:
        bank: synthetic images with the class that each was drawn for.
        text: (C, D) unit text features of the classes.
        real: pool images with their pseudo-label, for `real_mean`.
    """
    if settings.kind == "none":
        return bank
    kept = []
    for c in sorted(set(bank.labels.tolist())):
        members = (bank.labels == c).nonzero().flatten()
        features = bank.batch.features[members]
        if (
            settings.kind == "random"
        ):  # the images of a class have independent noise: take the first
            kept.append(members[: settings.keep])
        elif settings.kind == "argmax":
            right = (features @ text.T).argmax(dim=-1) == c
            best = (features @ text[c]).argmax()
            right[best] = True  # each class keeps an image
            kept.append(members[right])
        else:
            cosines = features @ _target(settings.kind, c, features, text, real)
            best = cosines.argsort(descending=True, stable=True)[: settings.keep]
            kept.append(members[best.sort().values])
    return bank[torch.cat(kept)]


def _target(kind: str, c: int, features: Tensor, text: Tensor, real: Labelled | None) -> Tensor:
    """(D,) the direction that the selected images of class c are nearest to."""
    if kind == "text":
        return text[c]
    if kind == "real_mean" and real is not None and bool((real.labels == c).any()):
        features = real.batch.features[real.labels == c]
    return normalize(features.mean(dim=0), dim=-1)


# ---------------------------------------------------------------- forms of the classifier


def auxiliary_classifier(
    settings: AuxiliarySettings,
    synthetic: Labelled | None,
    real: Labelled | None,
    pool: Batch,
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
        synthetic_mean = synthetic.batch.features.mean(dim=0) if settings.center else mean
        parts.append((synthetic.batch.features - synthetic_mean, synthetic.labels))
    if real is not None and len(real):
        parts.append((real.batch.features - mean, real.labels))
    if not parts:
        raise ValueError("the auxiliary classifier has no image at all")
    features = torch.cat([part[0] for part in parts])  # (N, D)
    labels = torch.cat([part[1] for part in parts])
    counts = labels.bincount(minlength=num_classes)
    if not counts.all():
        empty = (counts == 0).nonzero().flatten().tolist()
        raise ValueError(f"the auxiliary classifier has no image of class {empty}")
    sharpness = settings.kappa if settings.temperature == "kappa" else logit_scale
    return FORMS[settings.kind](_Bank(settings, features, labels, counts, mean, sharpness))


@dataclass(frozen=True)
class _Bank:
    """Images that a form is built from."""

    settings: AuxiliarySettings
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
        return BankClassifier(self.unit, self.labels, self.center, nearest, self.sharpness)


def _prototypes(bank: _Bank) -> LinearClassifier:
    """Cosine to the unit mean of each class (nearest mean)."""
    weight = normalize(bank.means(bank.unit), dim=-1)
    bias = torch.zeros(len(weight))
    return LinearClassifier(weight, bias, bank.center, unit=True, sharpness=bank.sharpness)


def _discriminants(bank: _Bank) -> LinearClassifier:
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


def _neighbours(bank: _Bank) -> BankClassifier:
    """Mean cosine to the nearest images of each class."""
    return bank.compared(min(bank.settings.neighbours, int(bank.counts.min())))


def _cache(bank: _Bank) -> BankClassifier:
    return bank.compared(nearest=0)


def _linear_probe(bank: _Bank) -> LinearClassifier:
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


FORMS: dict[str, Callable[[_Bank], AuxiliaryClassifier]] = {
    "prototype": _prototypes,
    "lda": _discriminants,
    "knn": _neighbours,
    "cache": _cache,
    "linear_probe": _linear_probe,
}

"""Images and class names that a LoRA of the diffusion model is trained on.

AiR (arXiv:2504.11930) trains it on target images with pseudo-labels of CLIP. Labelled images join
where the paradigm has some.
"""

from __future__ import annotations

import torch
from torch import Tensor

from air_core.classifiers import LinearClassifier
from air_core.pseudo_labels import balanced_choice
from air_core.settings import InitialLabelsSettings, LoraSource
from air_core.tools.chunks import by_rows
from air_core.types import Classes, Encoded, Labelled, Split

# P pool images, U classes of the pool (in TRZSL the unseen ones), M selected images.


def lora_images(
    text: LinearClassifier,
    pool: Encoded,
    labelled: Labelled | None,
    split: Split,
    settings: InitialLabelsSettings,
    source: LoraSource = "all",
    drawn_by: int | None = None,
    truth: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Select pool images and at most `k` labelled images of each class.

    Of the pool `top_k` selects the `k` images of each class with the highest scores, of a small
    pool equally many of each; `pool` all images, each with its most probable class.

    Args:
        text: CLIP's classifier over all classes.
        pool: images at `split.pool`.
        labelled: images at `split.labelled`; None: the paradigm has none.
        source: `pseudo` leaves labelled images out, `labelled` leaves pool images out.
        drawn_by: seed of the order of the labelled images, of which the first `k` of each class
            are selected; None: that of the dataset.
        truth: (P,) classes of the pool images, which only `settings.true_share` reads.

    Returns:
        (M,) positions in the dataset and (M,) classes.

    Raises:
        ValueError: `source` is `labelled`, but no image has a label.
    """
    parts = []
    if source != "labelled":
        classes = Classes(len(text.weight), split.unseen)
        selected, labels = _pseudo_labelled(text, pool, classes, settings, truth)
        parts.append((split.pool[selected], labels))
    if source != "pseudo" and labelled is not None:
        order = torch.arange(len(labelled))
        if drawn_by is not None:
            order = torch.randperm(len(labelled), generator=torch.Generator().manual_seed(drawn_by))
        first = order[first_of_each_class(labelled.labels[order], settings.k)]
        parts.append((split.labelled[first], labelled.labels[first]))
    if not parts:
        raise ValueError("lora.source is labelled, but ul has no labels: use pseudo or all")
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def _pseudo_labelled(
    text: LinearClassifier,
    pool: Encoded,
    classes: Classes,
    settings: InitialLabelsSettings,
    truth: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Positions in the pool of the selected images, and their classes: one of each image."""
    scores = by_rows(lambda z: classes.columns(z).softmax(dim=-1), text.logits(pool))  # (P, U)
    among = classes.of_pool
    if settings.kind == "pool":
        return torch.arange(len(scores)), among[scores.argmax(dim=1)]
    if settings.true_share is None:
        # With more slots than images, a class that is no image's first choice would get none.
        largest = max(1, len(scores) // len(among))
        capacity = torch.full((len(among),), min(settings.k, largest))
        assignment = balanced_choice(scores, capacity)
    else:
        assert truth is not None
        is_right = truth[:, None] == among
        assignment = _with_errors(scores, is_right, settings.k, settings.true_share)
    selected = (assignment >= 0).nonzero().flatten()
    return selected, among[assignment[selected]]


def _with_errors(scores: Tensor, is_right: Tensor, k: int, share: float) -> Tensor:
    """(P,) classes, -1 for none: of each class `share` of k images that belong to it (P, C), and
    other images for the rest. Of both it has those with the highest scores (P, C)."""
    classes, right = scores.shape[1], round(share * k)
    slots = torch.tensor([right, k - right]).repeat_interleave(classes)
    chosen = balanced_choice(scores.repeat(1, 2), slots, torch.cat([is_right, ~is_right], dim=1))
    return chosen.where(chosen < 0, chosen % classes)


def first_of_each_class(labels: Tensor, k: int) -> Tensor:
    """Positions in labels (N,) of the first `k` images of each class, class by class."""
    return torch.cat([(labels == c).nonzero().flatten()[:k] for c in sorted(set(labels.tolist()))])

"""Which images a LoRA of the diffusion model is trained on, and under which class names.

AiR (arXiv:2504.11930) trains it on target images with pseudo-labels of CLIP; labelled images join
where the paradigm has some.
"""

from __future__ import annotations

import torch
from torch import Tensor

from air_core.auxiliary import auxiliary_classifier
from air_core.classifiers import LinearClassifier, fuse
from air_core.pseudo_labels.top_k import balanced_choice
from air_core.specs import AuxiliarySettings
from air_core.types import Batch, Labelled

# A later round scores with the images of the round before; the same for every dataset (inferred).
SCORES = AuxiliarySettings(kind="lda")
SCORES_WEIGHT = 0.5

# P pool images, L labelled images.


def most_confident(
    text: LinearClassifier,
    pool: Batch,
    k: int,
    unseen: Tensor | None = None,
    synthetic: Labelled | None = None,
) -> tuple[Tensor, Tensor]:
    """The `k` pool images of each class that CLIP is most sure of; an image has one class at most.

    Args:
        text: CLIP's classifier over all classes.
        pool: P unlabelled images.
        unseen: classes that the pool has; None: all.
        synthetic: images of an earlier round, which join in scoring.

    Returns:
        Positions in the pool, ascending, and the class of each.
    """
    classes = torch.arange(len(text.weight)) if unseen is None else unseen
    auxiliary = None
    if synthetic is not None:
        bank = synthetic.among(classes)
        auxiliary = auxiliary_classifier(SCORES, bank, None, pool, len(classes), text.sharpness)
    fused = fuse(text, auxiliary, pool, SCORES_WEIGHT, SCORES.temperature, "probability", unseen)
    assigned = balanced_choice(fused.pool_scores(pool), torch.full((len(classes),), k))
    chosen = (assigned >= 0).nonzero().flatten()
    return chosen, classes[assigned[chosen]]


def first_of_each_class(positions: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The first `k` labelled images of each class.

    Args:
        positions: (L,) of the labelled images in their dataset.
        labels: (L,) their classes.

    Returns:
        Positions and classes, class by class.
    """
    kept = torch.cat([(labels == c).nonzero().flatten()[:k] for c in sorted(set(labels.tolist()))])
    return positions[kept], labels[kept]

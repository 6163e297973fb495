"""Images and class names that a LoRA of the diffusion model is trained on.

AiR (arXiv:2504.11930) trains it on target images with pseudo-labels of CLIP. Labelled images join
where the paradigm has some. With `lora.rounds` above 1, a fresh LoRA is trained on labels that the
images of the round before help to choose.
"""

from __future__ import annotations

import torch
from torch import Tensor

from air_core.auxiliary import auxiliary_classifier
from air_core.classifiers import LinearClassifier, fuse
from air_core.pseudo_labels.top_k import balanced_choice
from air_core.specs import AuxiliarySettings, LoraSource
from air_core.types import Batch, Labelled, Split

# How a later round scores the pool, in every dataset (inferred).
AUXILIARY = AuxiliarySettings(kind="lda")
FUSION_WEIGHT = 0.5

# M selected images.


def lora_images(
    text: LinearClassifier,
    pool: Batch,
    labelled: Labelled | None,
    split: Split,
    k: int,
    source: LoraSource = "all",
    synthetic: Labelled | None = None,
) -> tuple[Tensor, Tensor]:
    """Select at most `k` pool images and `k` labelled images of each class.

    Args:
        text: CLIP's classifier over all classes.
        pool: images at `split.pool`.
        labelled: images at `split.labelled`; None: the paradigm has none.
        source: `pseudo` leaves labelled images out, `labelled` leaves pool images out.
        synthetic: images of the LoRA round before.

    Returns:
        (M,) positions in the dataset and (M,) classes.

    Raises:
        ValueError: `source` is `labelled`, but no image has a label.
    """
    parts = []
    if source != "labelled":
        selected, classes = _most_confident(text, pool, k, split.unseen, synthetic)
        parts.append((split.pool[selected], classes))
    if source != "pseudo" and labelled is not None:
        first = first_of_each_class(labelled.labels, k)
        parts.append((split.labelled[first], labelled.labels[first]))
    if not parts:
        raise ValueError("lora.source is labelled, but ul has no labels: use pseudo or all")
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def _most_confident(
    text: LinearClassifier, pool: Batch, k: int, unseen: Tensor | None, synthetic: Labelled | None
) -> tuple[Tensor, Tensor]:
    """Positions in the pool of the `k` images with the highest scores of each class; classes.

    An image has one class at most.
    """
    classes = torch.arange(len(text.weight)) if unseen is None else unseen
    auxiliary = None
    if synthetic is not None:
        bank = synthetic.among(classes)
        auxiliary = auxiliary_classifier(AUXILIARY, bank, None, pool, len(classes), text.sharpness)
    fused = fuse(text, auxiliary, pool, FUSION_WEIGHT, AUXILIARY.temperature, "probability", unseen)
    assignment = balanced_choice(fused.pool_scores(pool), torch.full((len(classes),), k))
    selected = (assignment >= 0).nonzero().flatten()
    return selected, classes[assignment[selected]]


def first_of_each_class(labels: Tensor, k: int) -> Tensor:
    """Positions in labels (N,) of the first `k` images of each class, class by class."""
    return torch.cat([(labels == c).nonzero().flatten()[:k] for c in sorted(set(labels.tolist()))])

"""Agreement of text, auxiliary classifier and evidence on a pool, before any trial.

The classifiers are those of the first round of a trial (`air_core.method.Trial`). No label of the
pool is read: labels of validation images measure the classifiers that can score new images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from air_core.method import Trial, TrialData, fused
from air_core.specs import TrialSpec
from air_core.types import Batch
from orchestrator.planning.agreement_card import (
    EVIDENCE,
    AgreementCard,
    AgreementRow,
    agreement_title,
)
from orchestrator.planning.dataset_text import dataset_description
from orchestrator.stages.context import WorkerContext, one_thread
from orchestrator.stages.features import read_target
from orchestrator.stages.trial import read_data

# P pool images, V validation images, C classes of the pool (in TRZSL the unseen ones).

DIGITS = 4  # decimals of stored numbers: later ones differ by rounding
Z_95 = 1.959964
BANKS = {
    "synthetic": "synthetic images",
    "real": "real images",
    "both": "synthetic and real images",
}


@dataclass
class Voter:
    """Classes that a classifier of one or several trials predicts."""

    kind: str
    pool: Tensor  # (P,) counted among the classes of the pool; -1 where an image was not scored
    right: Tensor | None  # (V,) bool; None: no validation images, or they were not scored
    methods: list[str] = field(default_factory=list)  # labels of the trials

    def equals(self, other: Voter) -> bool:
        return self.kind == other.kind and torch.equal(self.pool, other.pool)


@one_thread()
@torch.no_grad()
def make_agreement_card(row: AgreementRow, worker: WorkerContext) -> AgreementCard:
    """The agreement card of a row.

    Raises:
        MissingArtifact: images, features or denoising errors are missing.
    """
    target = read_target(row.features, row.split, worker.store)
    voters: list[Voter] = []
    blends = []
    for label, spec in row.trials:
        *found, blend = _voters(spec, read_data(spec, target, worker))
        text = found[0]
        disputed = [(each.pool >= 0) & (each.pool != text.pool) for each in found]
        blends.append(
            {
                "method": label,
                "disputed": _share(torch.stack(disputed).any(dim=0)),
                "changed": _share(blend.pool != text.pool),
                **_measured(blend, text),
            }
        )
        for voter in found:
            same = next((each for each in voters if voter.equals(each)), voter)
            same.methods.append(label)
            voters += [voter] if same is voter else []
    text = voters[0]
    return AgreementCard(
        inputs_digest=row.inputs_digest,
        name=row.name,
        title=agreement_title(row, dataset_description(row.features.dataset.name)),
        pool_images=len(text.pool),
        validation_images=0 if text.right is None else len(text.right),
        classifiers=[
            {
                "name": _name(voter, voters),
                "methods": voter.methods,
                "images": int((voter.pool >= 0).sum()),
                **_measured(voter, text),
            }
            for voter in voters
        ],
        agreement=[[_agreement(one.pool, other.pool) for other in voters] for one in voters],
        fused=blends,
    )


def _voters(spec: TrialSpec, data: TrialData) -> Iterator[Voter]:
    """Text, auxiliary classifier and evidence, those that the trial has; then all of them fused."""
    trial = Trial(spec, data)
    classes = torch.arange(len(data.classnames)) if data.unseen is None else data.unseen
    images = None if data.validation is None else data.validation.among(classes)
    blend = fused(spec, trial.data, trial.teacher, trial.auxiliary, trial.evidence, 0)

    def voter(kind: str, pool: Tensor, scores: Callable[[Batch], Tensor]) -> Voter:
        right = None
        if images is not None and len(images):
            right = scores(images.batch).argmax(dim=1) == images.labels
        return Voter(kind, pool.argmax(dim=1), right)

    def text(batch: Batch) -> Tensor:
        return trial.teacher.logits(batch)[:, classes]

    yield voter("text", text(data.pool), text)
    if trial.auxiliary is not None:
        auxiliary = trial.auxiliary.logits
        yield voter(BANKS[spec.auxiliary.source], auxiliary(data.pool), auxiliary)
    if trial.evidence is not None:
        scored = trial.evidence.isfinite().any(dim=1)
        yield Voter(EVIDENCE, trial.evidence.argmax(dim=1).where(scored, -1), None)
    pool = blend.pool_scores(trial.data.pool)
    yield voter("fused", pool, lambda batch: blend.scores(batch)[:, classes])


def _name(voter: Voter, voters: Sequence[Voter]) -> str:
    """The kind of a classifier, with its methods if the card has several of the kind."""
    several = sum(each.kind == voter.kind for each in voters) > 1
    return f"{voter.kind} ({', '.join(voter.methods)})" if several else voter.kind


def _agreement(one: Tensor, other: Tensor) -> float | None:
    """Share of equal classes among the images that both score."""
    both = (one >= 0) & (other >= 0)
    return _share((one == other)[both]) if bool(both.any()) else None


def _share(images: Tensor) -> float:
    return round(float(images.double().mean()), DIGITS)


def _measured(voter: Voter, text: Voter) -> dict[str, float | None]:
    """Accuracy on validation images, and gain over the text classifier, paired by image."""
    if voter.right is None or text.right is None:
        return dict.fromkeys(("accuracy", "gain", "low", "high"))
    gains = voter.right.double() - text.right.double()
    gain, half = float(gains.mean()), Z_95 * float(gains.std(correction=0)) / math.sqrt(len(gains))
    values = {"accuracy": float(voter.right.double().mean())}
    values |= {} if voter is text else {"gain": gain, "low": gain - half, "high": gain + half}
    return {
        name: round(values[name], DIGITS) if name in values else None
        for name in ("accuracy", "gain", "low", "high")
    }

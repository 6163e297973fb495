"""Audits of synthetic images as data: the rows to audit, their cards, and the text of a card.

`orchestrator.stages.auditor` computes the cards. This module imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from air_core.specs import (
    FeaturesSpec,
    FolderImages,
    SplitSettings,
    SyntheticFeaturesSpec,
    TrialSpec,
)
from air_core.specs.normal import normalised
from orchestrator.formatting import aligned
from orchestrator.keys import artifact_key, digest
from orchestrator.planning.plan import Requirement, requirements_of

EDITION = 2  # increase it when the audit computes other numbers for the same images
REASONS = ("blank", "near-constant", "not a number", "duplicate", "wrong class", "test copy")

WIDTH = 80  # columns of the screen
MAX_FLAGGED = 12  # flagged images on the screen; `audit --json` lists all
MAX_WEAK_CLASSES = 3


# ---------------------------------------------------------------- rows to audit


@dataclass(frozen=True)
class AuditRow:
    """A row of synthetic images to audit, up to the count and classes that trials read."""

    row: SyntheticFeaturesSpec
    base: SyntheticFeaturesSpec | None  # the same row without LoRA
    features: FeaturesSpec  # of the dataset, to compare with
    splits: tuple[SplitSettings, ...]  # of the trials; the audit joins their test images
    images_per_class: int
    classes: tuple[int, ...]

    @property
    def requirements(self) -> list[Requirement]:
        return [Requirement(self.row, self.images_per_class, self.classes)]

    @property
    def name(self) -> str:
        """Stem of the card's files."""
        identity = digest([artifact_key(self.row).digest, artifact_key(self.features).digest])
        return f"audit-{self.row.slug}-{identity[:12]}"

    @property
    def inputs_digest(self) -> str:
        """Digest of everything that the card depends on."""
        base = None if self.base is None else artifact_key(self.base).digest
        splits = [asdict(split) for split in self.splits]
        return digest([EDITION, self.name, base, splits, self.images_per_class, [*self.classes]])


def audit_rows(trials: Iterable[TrialSpec]) -> list[AuditRow]:
    """List the rows of synthetic images that trials read, in the order of the trials.

    Trials that read the same row are merged: the largest count, all classes and all splits.
    """
    rows: dict[str, AuditRow] = {}
    for trial in dict.fromkeys(replace(normalised(trial), seed=0) for trial in trials):
        spec, base = trial.synthetic_features, trial.base_images
        if spec is None:
            continue
        requirement = next(each for each in requirements_of([trial]) if each.spec == spec)
        row = AuditRow(
            row=spec,
            base=None if base is None else replace(spec, images=base),
            features=trial.features,
            splits=(trial.split,),
            images_per_class=requirement.images,
            classes=requirement.classes,
        )
        earlier = rows.get(row.name, row)
        rows[row.name] = replace(
            row,
            base=earlier.base or row.base,
            splits=tuple(dict.fromkeys([*earlier.splits, trial.split])),
            images_per_class=max(earlier.images_per_class, row.images_per_class),
            classes=tuple(sorted({*earlier.classes, *row.classes})),
        )
    return list(rows.values())


# ---------------------------------------------------------------- the card


@dataclass(frozen=True)
class AuditCard:
    """The findings for one row. Fractions are in [0, 1], margins in [-1, 1]."""

    inputs_digest: str  # `AuditRow.inputs_digest`
    name: str
    title: str  # model and LoRA that drew the images
    clip: str
    dataset: str
    row: str  # key of the images
    images_per_class: int
    images: int
    labels: int  # labels that the LoRA was trained on; 0: no LoRA
    labels_right: float | None  # share of them that is right; None: unknown
    redrawn: int  # images of which the first draw was rejected
    counts: Mapping[str, int]  # images by reason
    recognised: float | None
    base_recognised: float | None
    margins: Sequence[float] | None  # 5 %, median, 95 %
    kid: Sequence[float] | None  # distance to the pool: mean and std over subsets
    base_kid: Sequence[float] | None  # the same before LoRA
    base_images: int
    pool_images: int
    test_images: int
    test_cosine: float | None  # largest cosine between an image and a test image
    kept: Mapping[str, int]  # images that each filter setting would keep
    # For each class: classname, images, recognised, margin (median), flagged, and best and worst,
    # the indices of the images with the largest and the smallest margin.
    classes: Sequence[Mapping[str, Any]]
    # For each finding: classname, index in the class, file (of a folder of ready images), reason
    # (one of REASONS), value (spread in levels, cosine or margin) and sentence, its description.
    flagged: Sequence[Mapping[str, Any]]

    @property
    def flagged_images(self) -> int:
        return len({(finding["classname"], finding["index"]) for finding in self.flagged})


# ---------------------------------------------------------------- the card as text


def row_title(row: AuditRow) -> str:
    """Describe the source of a row's images in a few words."""
    images = row.row.images
    if isinstance(images, FolderImages):
        return images.model.name
    if images.lora is None:
        return f"{images.model.name}, no LoRA"
    split = images.lora.labels.split
    tuned = "a second LoRA" if images.lora.labels.images is not None else "LoRA"
    labels = "" if split.paradigm == "ul" else f", {split.paradigm.upper()}"
    seed = f", split {split.split_seed}" if split.split_seed else ""
    return f"{images.model.name} after {tuned} of rank {images.lora.training.rank}{labels}{seed}"


def audit_screen(card: AuditCard, command: str, folder: Path) -> str:
    """Format a card in at most WIDTH columns.

    Args:
        command: the command that lists all flagged images.
        folder: folder of the card's picture.
    """
    lines = [*card_facts(card), *_weak_classes(card)]
    lines += [(finding["reason"], finding["sentence"]) for finding in card.flagged[:MAX_FLAGGED]]
    if len(card.flagged) > MAX_FLAGGED:
        more = len(card.flagged) - MAX_FLAGGED
        lines.append(("", f"{more:,} more: {command}"))
    kept = "; ".join(f"`{setting}` keeps {count:,}" for setting, count in card.kept.items())
    lines.append(("filter", f"{kept} of {card.images:,}"))
    picture = f"picture: {folder / card.name}.png"
    return "\n".join([f"{card.title}   {card.dataset}", *aligned(lines, WIDTH), picture])


def card_facts(card: AuditCard) -> list[tuple[str, str]]:
    """Summarise a card as pairs of a label and a text."""
    classes, before = len(card.classes), ""
    images = f"{card.images:,} of {classes:,} {'class' if classes == 1 else 'classes'}"
    images += f", {card.redrawn} of them redrawn" if card.redrawn else ""
    if card.base_recognised is not None:
        before = f"; {card.base_recognised:.0%} before LoRA"
    facts = [
        ("images", images),
        ("recognised", f"{_percent(card.recognised)} by CLIP {card.clip}{before}"),
    ]
    if card.labels:
        right = _percent(card.labels_right)
        facts.insert(0, ("labels", f"{card.labels:,} that the LoRA reads; share right: {right}"))
    if card.margins is not None:
        low, middle, high = (f"{value:+.2f}" for value in card.margins)
        facts.append(("margin", f"median {middle}, 5 % below {low}, 5 % above {high}"))
    if card.kid is not None:
        before = f"; {_plus_minus(card.base_kid)} before LoRA" if card.base_kid else ""
        kid = f"{_plus_minus(card.kid)} to {card.pool_images:,} pool images{before}"
        facts.append(("KID", kid))
    if card.test_cosine is not None:
        nearest = f"{card.test_images:,} test images; largest cosine {card.test_cosine:.3f}"
        facts.append(("test", f"{nearest}, copies: {card.counts['test copy']:,}"))
    by_reason = [f"{card.counts[reason]} {reason}" for reason in REASONS if card.counts[reason]]
    flagged = f"{card.flagged_images} of {card.images:,}: {', '.join(by_reason)}"
    facts.append(("flagged", flagged if by_reason else "none"))
    return facts


def _percent(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.0%}"


def _plus_minus(pair: Sequence[float]) -> str:
    return f"{pair[0]:.3f} +- {pair[1]:.3f}"


def _weak_classes(card: AuditCard) -> Iterator[tuple[str, str]]:
    def recognised(entry: Mapping[str, Any]) -> float:
        return 1.0 if entry["recognised"] is None else float(entry["recognised"])

    ranked = sorted(card.classes, key=recognised)
    weak = [entry for entry in ranked if recognised(entry) < 1][:MAX_WEAK_CLASSES]
    if weak:
        named = ", ".join(f"{entry['classname']!r} {recognised(entry):.0%}" for entry in weak)
        yield "weakest", f"{named} of the images recognised by CLIP"

"""An audit as data: which row of synthetic images is looked at, the card that comes out, and how
it reads on a screen. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from air_core.normal import normalised
from air_core.specs import (
    FeaturesSpec,
    FolderImages,
    SplitSettings,
    SyntheticFeaturesSpec,
    TrialSpec,
)
from orchestrator.formatting import aligned
from orchestrator.keys import artifact_key, digest, slug
from orchestrator.planning.plan import Requirement, possible_trials, requirements_of
from orchestrator.planning.resolve import resolver_of
from orchestrator.spec import SweepSpec, cells_of
from orchestrator.store import ArtifactStore, SweepLocation

EDITION = 1  # raise it when the same images get other numbers
WIDTH = 80  # columns of the screen
LISTED = 12  # flagged images on the screen; --json has all
WEAK = 3  # classes that are named
REASONS = ("blank", "near-constant", "not a number", "duplicate", "wrong class", "test copy")


@dataclass(frozen=True)
class Audited:
    """A row that trials read, as far as they read it, and what it is compared with."""

    row: SyntheticFeaturesSpec
    base: SyntheticFeaturesSpec | None  # the same without LoRA
    features: FeaturesSpec  # of the dataset
    splits: tuple[SplitSettings, ...]  # of the trials; their test images count together
    images_per_class: int
    classes: tuple[int, ...]

    @property
    def requirement(self) -> Requirement:
        return Requirement(self.row, self.images_per_class, self.classes)

    @property
    def name(self) -> str:
        """Of the card's files, without what they end in."""
        identity = digest([artifact_key(self.row).digest, artifact_key(self.features).digest])
        return f"audit-{slug(self.row)}-{identity[:12]}"

    @property
    def asked(self) -> str:
        """A digest of all that the card depends on."""
        base = None if self.base is None else artifact_key(self.base).digest
        splits = [asdict(split) for split in self.splits]
        return digest([EDITION, self.name, base, splits, self.images_per_class, [*self.classes]])


@dataclass(frozen=True)
class AuditCard:
    """What is known about one row. Shares are in [0, 1], margins in [-1, 1]."""

    asked: str
    name: str
    title: str  # who made the images
    clip: str
    dataset: str
    row: str  # key of the images
    images_per_class: int
    images: int
    redrawn: int  # kept by a later draw than the first
    counts: Mapping[str, int]  # images by reason
    recognised: float | None
    base_recognised: float | None
    margins: Sequence[float] | None  # 5 %, median, 95 %
    kid: Sequence[float] | None  # to the pool: mean and std over subsets
    base_kid: Sequence[float] | None  # before LoRA
    base_images: int
    pool_images: int
    test_images: int
    test_cosine: float | None  # of the image that is nearest to a test image
    kept: Mapping[str, int]  # images that a filter would leave, by the setting
    # One a class: classname, images, recognised, margin (median), flagged, and the indices of the
    # images with the largest and the smallest margin, best and worst.
    classes: Sequence[Mapping[str, Any]]
    # One a fault: classname, index in the class, file of a folder of ready images, reason (one of
    # REASONS), value (spread in levels, cosine or margin) and a sentence for people.
    flagged: Sequence[Mapping[str, Any]]

    @property
    def flagged_images(self) -> int:
        return len({(one["classname"], one["index"]) for one in self.flagged})


def audited(trials: Iterable[TrialSpec]) -> list[Audited]:
    """The rows that trials read, each as far as any of them reads it, in their order."""
    found: dict[str, Audited] = {}
    for trial in dict.fromkeys(replace(normalised(trial), seed=0) for trial in trials):
        row = trial.synthetic_features
        if row is None:
            continue
        requirement = next(
            requirement for requirement in requirements_of([trial]) if requirement.spec == row
        )
        images = trial.base_images
        base = None if images is None else replace(row, images=images)
        one = Audited(
            row,
            base,
            trial.features,
            (trial.split,),
            requirement.images_per_class,
            requirement.classes,
        )
        known = found.get(one.name, one)
        found[one.name] = replace(
            one,
            base=known.base or base,
            splits=tuple(dict.fromkeys([*known.splits, trial.split])),
            images_per_class=max(known.images_per_class, one.images_per_class),
            classes=tuple(sorted({*known.classes, *one.classes})),
        )
    return list(found.values())


def title_of(row: Audited) -> str:
    """Who made a row of images, in a few words."""
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


def card_files(card: AuditCard, png: bytes) -> dict[str, bytes]:
    """What is kept of a card, by file name; the JSON last, since by it a card is known."""
    return {f"{card.name}.png": png, f"{card.name}.json": card_json(card).encode()}


def card_json(card: AuditCard) -> str:
    return json.dumps(asdict(card), indent=1, sort_keys=True, allow_nan=False)


def card_of(text: str) -> AuditCard:
    """A card from its JSON; earlier versions kept more in it."""
    plain = json.loads(text)
    return AuditCard(**{field.name: plain[field.name] for field in fields(AuditCard)})


def card_for_scripts(card: AuditCard) -> dict[str, Any]:
    """The contract of `audit --json`."""
    plain = asdict(card)
    del plain["asked"]
    for name in ("classes", "flagged"):
        plain[name] = [{"class": one.pop("classname"), **one} for one in plain[name]]
    return plain


def facts_of(card: AuditCard) -> list[tuple[str, str]]:
    """A card in a few lines for people: a label and what is known."""
    classes, before = len(card.classes), ""
    images = f"{card.images:,} of {classes:,} {'class' if classes == 1 else 'classes'}"
    images += f", {card.redrawn} of them drawn again" if card.redrawn else ""
    if card.base_recognised is not None:
        before = f"; {card.base_recognised:.0%} before LoRA"
    facts = [
        ("images", images),
        ("recognised", f"{_share(card.recognised)} by CLIP {card.clip}{before}"),
    ]
    if card.margins is not None:
        low, middle, high = (f"{value:+.2f}" for value in card.margins)
        facts.append(("margin", f"median {middle}, 5 % below {low}, 5 % above {high}"))
    if card.kid is not None:
        before = f"; {_plus_minus(card.base_kid)} before LoRA" if card.base_kid else ""
        facts.append(
            ("KID", f"{_plus_minus(card.kid)} to {card.pool_images:,} images of the pool{before}")
        )
    if card.test_cosine is not None:
        near = f"{card.test_images:,} test images; the nearest has cosine {card.test_cosine:.3f}"
        facts.append(("test", f"{near}, copies: {card.counts['test copy']:,}"))
    found = [f"{card.counts[reason]} {reason}" for reason in REASONS if card.counts[reason]]
    facts.append(
        ("flagged", f"{card.flagged_images} of {card.images:,}: {', '.join(found)}")
        if found
        else ("flagged", "none")
    )
    return facts


def _share(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.0%}"


def _plus_minus(pair: Sequence[float]) -> str:
    return f"{pair[0]:.3f} +- {pair[1]:.3f}"


def audit_screen(card: AuditCard, sweep: str, folder: Path) -> str:
    """A card on at most WIDTH columns.

    Args:
        sweep: its name, for what to type.
        folder: where the card's picture lies.
    """
    lines = [*facts_of(card), *_weak_classes(card)]
    lines += [(one["reason"], one["sentence"]) for one in card.flagged[:LISTED]]
    if len(card.flagged) > LISTED:
        lines.append(("", f"{len(card.flagged) - LISTED:,} more: airsweep audit {sweep} --json"))
    left = "; ".join(f"`{name}` leaves {count:,}" for name, count in card.kept.items())
    lines.append(("filter", f"{left} of {card.images:,}"))
    picture = f"picture: {folder / card.name}.png"
    return "\n".join([f"{card.title}   {card.dataset}", *aligned(lines, WIDTH), picture])


def _weak_classes(card: AuditCard) -> Iterator[tuple[str, str]]:
    def share(line: Mapping[str, Any]) -> float:
        return 1.0 if line["recognised"] is None else float(line["recognised"])

    weak = [line for line in sorted(card.classes, key=share) if share(line) < 1][:WEAK]
    if weak:
        named = ", ".join(f"{line['classname']!r} {share(line):.0%}" for line in weak)
        yield "weakest", f"{named}: how many CLIP takes for their class"


def audited_by(sweep: SweepSpec, location: SweepLocation) -> list[Audited]:
    """The rows that a sweep's trials read.

    Raises:
        ValueError: none is; or weights or data are not here.
    """
    resolver = resolver_of(location)
    found = audited(possible_trials(cells_of(sweep), sweep.seeds.assignments(), resolver))
    resolver.save()
    if not found:
        methods = ", ".join(sorted({cell.method for cell in cells_of(sweep)}))
        raise ValueError(
            f"sweep {location.project}/{location.name} reads no synthetic images ({methods}), "
            "so there is nothing to audit; methods that read some are air, air_fpl and air_grip"
        )
    return found


def ready(rows: Sequence[Audited], location: SweepLocation) -> list[Audited]:
    """Those whose images are all drawn.

    Raises:
        ValueError: none is.
    """
    whole = [row for row in rows if row.requirement.have(location.store) == row.requirement.total()]
    if not whole:
        have, total = (
            sum(counts) for counts in zip(*map(_drawn(location.store), rows), strict=True)
        )
        raise ValueError(
            f"the images of sweep {location.project}/{location.name} are not drawn yet: {have} of "
            f"{total} blocks are in {location.store.name}; run it, or `airsweep prepare`, first"
        )
    return whole


def _drawn(store: ArtifactStore) -> Callable[[Audited], tuple[int, int]]:
    return lambda row: (row.requirement.have(store), row.requirement.total())


def known_card(row: Audited, location: SweepLocation) -> AuditCard | None:
    """The card that was kept; None: there is none, or of something else."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        card = card_of((location.folder / f"{row.name}.json").read_text())
        if card.asked == row.asked:
            return card
    return None

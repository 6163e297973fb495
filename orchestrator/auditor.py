"""An audit card of one row of synthetic images, from what the store has of it.

The numbers are `air_core.audit`'s; here they get names, files and pictures.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

import io
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from air_core.audit import (
    Audit,
    Finding,
    ImageSet,
    Surroundings,
    audit,
    best_and_worst,
    difference_hash,
    spread,
)
from air_core.auxiliary import credible
from air_core.classifiers import LinearClassifier, text_classifier
from air_core.datasets.class_folders import class_files
from air_core.datasets.images import Unreadable, open_png
from air_core.specs import FidelitySettings, FolderImages
from air_core.types import Batch, Labelled
from orchestrator.audit_card import (
    PICTURED,
    REASONS,
    THUMB_PX,
    AuditCard,
    Audited,
    ClassLine,
    Flagged,
    Shown,
    title_of,
)
from orchestrator.dataset_text import about, text_of
from orchestrator.image_rows import read_drawn, read_pictures, read_synthetic
from orchestrator.keys import artifact_key
from orchestrator.pictures import audit_sheet
from orchestrator.plan import BASE_PER_CLASS
from orchestrator.resolve import images_folder
from orchestrator.stages import read_target
from orchestrator.store import ArtifactStore, MissingArtifact
from orchestrator.workshop import ChangedInput, Workshop, one_thread

log = logging.getLogger(__name__)

SHOWN = 10  # pictures in a line of a card; half as many pairs
DIGITS = 4  # of numbers that are kept: what differs beyond is rounding

Report = Callable[[int, int], None]


def made(row: Audited, shop: Workshop, report: Report | None = None) -> tuple[AuditCard, bytes]:
    """A card with its pictures, and the picture of it.

    Args:
        report: told of images that were looked at, and how many there are.

    Raises:
        MissingArtifact: images or features are not there.
    """
    with one_thread():
        card = with_pictures(_made(row, shop, report or _silent), row, shop)
    return card, audit_sheet(card)


def _silent(done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class _Looked:
    """A row that was looked at: its images in order, and what was found about each."""

    row: Audited
    images: ImageSet
    places: Sequence[tuple[int, int]]  # class and index of each image
    logits: Tensor  # (N, C)
    found: Audit
    test: Tensor  # (T,) positions in the dataset
    files: Mapping[str, Sequence[Path]]  # by class, of a folder of ready images

    @property
    def classnames(self) -> Sequence[str]:
        return self.row.row.images.classnames

    def file(self, c: int, index: int) -> str | None:
        files = self.files.get(self.classnames[c], ())
        return f"{files[index].parent.name}/{files[index].name}" if index < len(files) else None


def _made(row: Audited, shop: Workshop, report: Report) -> AuditCard:
    images, places, redrawn = _read(row, shop.store, report)
    backbone = shop.backbone(row.row.backbone, row.row.precision)
    template = text_of(row.features, shop.store).template
    text = text_classifier(backbone, row.row.images.classnames, template)
    targets = [read_target(row.features, split, shop.store) for split in row.splits]
    pool = targets[0].features[targets[0].split.pool]
    test = torch.cat([target.split.test for target in targets]).unique()
    base = _base(row, shop.store)
    try:
        shop.examples(row.features.dataset)
    except ChangedInput as problem:
        log.warning("%s; copies of test images are not looked for", problem)
    logits = _logits(text, images.features, row.classes)
    around = Surroundings(
        pool=pool,
        base=None if base is None else base.batch.features,
        test=targets[0].features[test],
        test_hash=lambda position: _test_hash(row, shop, int(test[position])),
    )
    looked = _Looked(row, images, places, logits, audit(images, logits, around), test, _files(row))
    found = looked.found
    flagged = [_flagged(finding, looked) for finding in found.findings]
    return AuditCard(
        asked=row.asked,
        name=row.name,
        title=title_of(row),
        clip=row.row.backbone.name,
        dataset=about(row.features.dataset.name),
        row=str(artifact_key(row.row.images)),
        images_per_class=row.images_per_class,
        images=len(images),
        redrawn=redrawn,
        counts={reason: sum(f.reason == reason for f in flagged) for reason in REASONS},
        recognised=_share(found.guesses == images.labels, found.sound),
        base_recognised=None if base is None else _recognised(base, text, row.classes),
        margins=_quantiles(found.margins),
        kid=_pair(found.distance),
        base_kid=None if found.base_distance is None else _pair(found.base_distance),
        base_images=0 if base is None else len(base),
        pool_images=len(pool),
        test_images=len(test),
        test_cosine=_rounded(_largest(found.test_cosine)),
        kept=_kept(looked),
        classes=_lines(looked, flagged),
        flagged=tuple(flagged),
        **_shown(looked),
    )


def _read(
    row: Audited, store: ArtifactStore, report: Report
) -> tuple[ImageSet, list[tuple[int, int]], int]:
    """The images with (class, index) of each, and how many were drawn more than once."""

    count = row.images_per_class * len(row.classes)
    places, features, hashes, spreads, held = [], [], [], [], []
    redrawn = 0
    for drawn in read_drawn(row.row, row.classes, row.images_per_class, store):
        picture = open_png(drawn.png)
        places.append((drawn.class_index, drawn.index))
        features.append(drawn.features)
        hashes.append(difference_hash(picture))
        spreads.append(spread(picture))
        held.append(drawn.ok)
        redrawn += drawn.ok and drawn.attempt > 0
        report(len(places), count)
    images = ImageSet(
        features=torch.from_numpy(np.stack(features)).float(),
        labels=torch.tensor([c for c, _ in places]),
        hashes=torch.stack(hashes),
        spread=torch.tensor(spreads),
        held=torch.tensor(held),
    )
    return images, places, redrawn


def _base(row: Audited, store: ArtifactStore) -> Labelled | None:
    """The images without LoRA, where they were drawn."""
    if row.base is not None:
        with suppress(MissingArtifact, FileNotFoundError):
            return read_synthetic(row.base, BASE_PER_CLASS, store, row.classes)
    return None


@torch.no_grad()
def _logits(text: LinearClassifier, features: Tensor, classes: Sequence[int]) -> Tensor:
    """(N, C) of the text classifier; classes that nothing was drawn for are out of the question."""
    logits = text.logits(Batch(features))
    others = torch.ones(logits.shape[1], dtype=torch.bool)
    others[list(classes)] = False
    return logits.masked_fill(others, -torch.inf)


def _test_hash(row: Audited, shop: Workshop, position: int) -> Tensor | None:
    picture = _test_picture(row, shop, position)
    return None if picture is None else difference_hash(picture)


def _test_picture(row: Audited, shop: Workshop, position: int) -> Image.Image | None:
    with suppress(Unreadable, ChangedInput, FileNotFoundError):
        return shop.examples(row.features.dataset).images[position]
    return None


# ---------------------------------------------------------------- numbers for people


def _flagged(finding: Finding, looked: _Looked) -> Flagged:
    classnames = looked.classnames
    c, index = looked.places[finding.image]
    file = looked.file(c, index)
    value = None if math.isnan(finding.value) else round(finding.value, DIGITS)
    match finding.reason:
        case "blank":
            said = f"is blank: no channel varies by more than {value:.1f} of 256 levels"
            said += "" if looked.images.held[finding.image] else ", so no trial reads it"
        case "near-constant":
            said = f"shows next to nothing: no channel varies by more than {value:.1f} levels"
        case "not a number":
            said = "has CLIP features that are not finite"
        case "duplicate":
            twin = looked.places[finding.other][1]
            said = f"is {_called(twin, looked.file(c, twin))} again: {_like(finding)}"
        case "wrong class":
            said = (
                f"looks like {classnames[finding.other]!r}: {finding.beside:.0%} of the images "
                f"nearest to it were made for that class, and CLIP's margin is {value:+.2f}"
            )
        case "test copy":
            said = f"is test image {int(looked.test[finding.other])}: {_like(finding)}"
    called = f"{classnames[c]!r}: {_called(index, file)}"
    return Flagged(classnames[c], index, file, finding.reason, value, f"{called} {said}")


def _called(index: int, file: str | None) -> str:
    return f"image {index}" + (f" ({file})" if file else "")


def _like(finding: Finding) -> str:
    return f"cosine {finding.value:.3f}, {finding.beside:.0f} of 256 bits of the hash differ"


def _files(row: Audited) -> Mapping[str, Sequence[Path]]:
    """Of a folder of ready images, as it is now."""
    images = row.row.images
    if not isinstance(images, FolderImages):
        return {}
    with suppress(OSError, ValueError):
        return class_files(images_folder(images.model.name), images.classnames)
    return {}


def _share(right: Tensor, among: Tensor) -> float | None:
    return _rounded(float(right[among].double().mean()))


def _recognised(images: Labelled, text: LinearClassifier, classes: Sequence[int]) -> float | None:
    guesses = _logits(text, images.batch.features, classes).argmax(dim=-1)
    return _rounded(float((guesses == images.labels).double().mean()))


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(value, DIGITS)


def _largest(values: Tensor) -> float:
    known = values[~values.isnan()]
    return float(known.max()) if len(known) else math.nan


def _pair(distance: Any) -> tuple[float, float] | None:
    if math.isnan(distance.mean):
        return None
    return round(distance.mean, DIGITS), round(distance.std, DIGITS)


def _quantiles(margins: Tensor) -> tuple[float, float, float] | None:
    known = margins[~margins.isnan()]
    if not len(known):
        return None
    low, middle, high = known.quantile(torch.tensor([0.05, 0.5, 0.95]).double()).tolist()
    return round(low, DIGITS), round(middle, DIGITS), round(high, DIGITS)


def _kept(looked: _Looked) -> dict[str, int]:
    """How many images each filter would leave to a trial that reads all of them."""
    images = looked.images
    read = images.held & images.features.isfinite().all(dim=1)
    bank = Labelled(Batch(images.features[read]), images.labels[read])
    filters = {
        "fidelity.min_margin: 0": FidelitySettings(min_margin=0.0),
        "fidelity.duplicates: drop": FidelitySettings(duplicates="drop"),
    }
    logits = looked.logits[read]
    return {name: len(credible(bank, how, logits)) for name, how in filters.items()}


def _lines(looked: _Looked, flagged: Sequence[Flagged]) -> tuple[ClassLine, ...]:
    found, images, places = looked.found, looked.images, looked.places
    faults = Counter(name for name, _ in {(one.classname, one.index) for one in flagged})
    lines = []
    for c in looked.row.classes:
        members = (images.labels == c).nonzero().flatten()
        margins = found.margins[members]
        best, worst = best_and_worst(margins.tolist(), 1)
        middle = _quantiles(margins)
        lines.append(
            ClassLine(
                classname=looked.classnames[c],
                images=len(members),
                recognised=_share(found.guesses[members] == c, found.sound[members]),
                margin=None if middle is None else middle[1],
                best=places[int(members[best[0]])][1] if best else None,
                worst=places[int(members[worst[0]])][1] if worst else None,
                flagged=faults[looked.classnames[c]],
            )
        )
    return tuple(lines)


# ---------------------------------------------------------------- pictures


def _shown(looked: _Looked) -> dict[str, tuple[Shown, ...]]:
    """Which images stand on a card: the best and the worst, and what is nearest to what."""
    found, places = looked.found, looked.places
    flags: dict[str, dict[int, Finding]] = {reason: {} for reason in REASONS}
    for one in found.findings:
        flags[one.reason][one.image] = one
    bad = {one.image for one in found.findings}

    def shown(i: int, value: float, flagged: bool, other: int | None = None) -> Shown:
        c, index = places[i]
        return Shown(looked.classnames[c], index, round(value, DIGITS), flagged, other)

    margins = found.margins.tolist()
    _, worst = best_and_worst(margins, SHOWN)
    # The surest images of all tend to be of one class.
    best = [i for c in looked.row.classes for i in _best_of(c, looked)]
    best = sorted(best, key=lambda i: (-margins[i], i))[:SHOWN]
    wrong = sorted(set(flags["wrong class"]) - set(worst), key=lambda i: (margins[i], i))
    alike = _pairs(found.like_cosine, found.like, flags["duplicate"], once=True)
    tests = _pairs(found.test_cosine, found.test_like, flags["test copy"], once=False)
    dull = [f for reason in REASONS[:3] for f in flags[reason].values()]
    return {
        "best": tuple(shown(i, margins[i], i in bad) for i in best),
        "worst": tuple(shown(i, margins[i], i in bad) for i in worst),
        "doubted": tuple(shown(i, margins[i], True) for i in wrong[:SHOWN]),
        "alike": tuple(shown(i, value, yes, places[j][1]) for i, j, value, yes in alike),
        "tests": tuple(shown(i, value, yes, int(looked.test[j])) for i, j, value, yes in tests),
        "dull": tuple(shown(f.image, np.nan_to_num(f.value), True) for f in dull[:SHOWN]),
    }


def _best_of(c: int, looked: _Looked) -> list[int]:
    """The position of a class's image of the largest margin; empty where it has none."""
    members = (looked.images.labels == c).nonzero().flatten()
    best, _ = best_and_worst(looked.found.margins[members].tolist(), 1)
    return members[best].tolist()


def _pairs(
    cosines: Tensor, others: Tensor, flagged: Mapping[int, Finding], once: bool
) -> list[tuple[int, int, float, bool]]:
    """The nearest pairs, flagged ones first.

    Args:
        once: a pair is the same the other way round.
    """
    pairs = [(i, one.other, one.value, True) for i, one in flagged.items()]
    for i, (j, value) in enumerate(zip(others.tolist(), cosines.tolist(), strict=True)):
        if j >= 0 and i not in flagged:
            pairs.append((i, j, value, False))
    kept: dict[tuple[int, int], tuple[int, int, float, bool]] = {}
    for pair in sorted(pairs, key=lambda pair: (not pair[3], -pair[2], pair[0])):
        i, j = pair[:2]
        kept.setdefault((min(i, j), max(i, j)) if once else (i, j), pair)
    return list(kept.values())[: SHOWN // 2]


def with_pictures(card: AuditCard, row: Audited, shop: Workshop) -> AuditCard:
    """The same card with its images as PNG bytes."""
    numbers = {name: c for c, name in enumerate(row.row.images.classnames)}
    wanted = set()
    for line in PICTURED:
        for one in getattr(card, line):
            wanted.add((numbers[one.classname], one.index))
            if one.other is not None and line != "tests":
                wanted.add((numbers[one.classname], one.other))
    pictures = read_pictures(row.row, wanted, shop.store)

    def pictured(one: Shown, line: str) -> Shown:
        c, other = numbers[one.classname], None
        if one.other is not None:
            of_test = line == "tests"
            other = _test_picture(row, shop, one.other) if of_test else pictures[c, one.other]
        png = thumbnail(pictures[c, one.index])
        return replace(one, png=png, other_png=b"" if other is None else thumbnail(other))

    lines: dict[str, Any] = {
        line: tuple(pictured(one, line) for one in getattr(card, line)) for line in PICTURED
    }
    return replace(card, **lines)


def thumbnail(picture: Image.Image) -> bytes:
    """THUMB_PX high and wide, the middle square of it, as PNG bytes."""
    small = min(picture.size) < THUMB_PX
    how = Image.Resampling.NEAREST if small else Image.Resampling.BICUBIC
    tile = ImageOps.fit(picture.convert("RGB"), (THUMB_PX, THUMB_PX), how)
    buffer = io.BytesIO()
    tile.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()

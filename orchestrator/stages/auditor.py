"""Audits one row of synthetic images in the store: makes an audit card and a sheet of pictures.

`air_core.audit` computes the numbers. This module arranges them in a table with one line for each
image, and adds names, files and pictures.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pandas import DataFrame, Series
from PIL import Image
from torch import Tensor

from air_core.audit import (
    Audit,
    Finding,
    ImageSet,
    ReferenceImages,
    audit,
    difference_hash,
    spread,
)
from air_core.auxiliary import credible
from air_core.classifiers import LinearClassifier, text_classifier
from air_core.datasets.class_folders import class_files
from air_core.datasets.images import Unreadable, open_png
from air_core.specs import FidelitySettings, FolderImages
from air_core.types import Batch, Labelled
from orchestrator.errors import MissingArtifact
from orchestrator.keys import artifact_key
from orchestrator.planning.audit_card import REASONS, AuditCard, AuditRow, card_facts, row_title
from orchestrator.planning.dataset_text import dataset_description, read_dataset_text
from orchestrator.planning.plan import BASE_PER_CLASS
from orchestrator.planning.resolve import images_folder
from orchestrator.stages.context import ChangedInput, WorkerContext, one_thread
from orchestrator.stages.features import read_target
from orchestrator.stages.images import read_drawn_images, read_pictures, read_synthetic
from orchestrator.stages.pictures import Tile, captioned_sheet
from orchestrator.store import ArtifactStore

log = logging.getLogger(__name__)

PER_LINE = 10  # pictures in a line of the sheet; half as many pairs
DIGITS = 4  # decimals of stored numbers: later ones differ by rounding

Report = Callable[[int, int], None]


@one_thread()
def make_card(
    row: AuditRow, worker: WorkerContext, report: Report | None = None
) -> tuple[AuditCard, bytes]:
    """The audit card of a row and its sheet of pictures, a PNG.

    Args:
        report: called with the number of images read and of all images.

    Raises:
        MissingArtifact: images or features are missing.
    """
    images, table = _read(row, worker.store, report)
    backbone = worker.backbone(row.row.backbone, row.row.precision)
    template = read_dataset_text(row.features, worker.store).template
    text = text_classifier(backbone, row.row.images.classnames, template)
    targets = [read_target(row.features, split, worker.store) for split in row.splits]
    pool = targets[0].features[targets[0].split.pool]
    test = torch.cat([target.split.test for target in targets]).unique()
    base = _base(row, worker.store)
    try:
        worker.examples(row.features.dataset)
    except ChangedInput as problem:
        log.warning("%s; the audit does not search for copies of test images", problem)
    logits = _logits(text, images.features, row.classes)
    surroundings = ReferenceImages(
        pool=pool,
        base=None if base is None else base.batch.features,
        test=targets[0].features[test],
        test_hash=lambda position: _test_hash(row, worker, int(test[position])),
    )
    result = audit(images, logits, surroundings)
    table = table.assign(
        sound=result.sound.numpy(),
        right=(result.guesses == images.labels).numpy(),
        margin=result.margins.numpy(),
        twin=result.like.numpy(),
        twin_cosine=result.like_cosine.numpy(),
        test=[int(test[i]) if i >= 0 else -1 for i in result.test_like.tolist()],
        test_cosine=result.test_cosine.numpy(),
    )
    flagged = [
        _flagged(finding, table, row.row.images.classnames, test) for finding in result.findings
    ]
    faulty = {finding.image for finding in result.findings}
    table["flagged"] = table.index.isin(faulty)
    labels = _lora_labels(row, worker.store)
    card = AuditCard(
        inputs_digest=row.inputs_digest,
        name=row.name,
        title=row_title(row),
        clip=row.row.backbone.name,
        dataset=dataset_description(row.features.dataset.name),
        row=str(artifact_key(row.row.images)),
        images_per_class=row.images_per_class,
        images=len(images),
        labels=labels.get("images", 0),
        labels_right=_rounded(labels.get("accuracy", math.nan)),
        redrawn=int(table.redrawn.sum()),
        counts={reason: sum(fault["reason"] == reason for fault in flagged) for reason in REASONS},
        recognised=_rounded(table.right[table.sound].mean()),
        base_recognised=None if base is None else _recognised(base, text, row.classes),
        margins=_quantiles(table.margin, 0.05, 0.5, 0.95),
        kid=_pair(result.distance),
        base_kid=None if result.base_distance is None else _pair(result.base_distance),
        base_images=0 if base is None else len(base),
        pool_images=len(pool),
        test_images=len(test),
        test_cosine=_rounded(table.test_cosine.max()),
        kept=_kept(images, logits),
        classes=[
            _class_line(str(name), lines) for name, lines in table.groupby("classname", sort=False)
        ],
        flagged=flagged,
    )
    return card, _sheet(card, table, result, row, worker)


def _lora_labels(row: AuditRow, store: ArtifactStore) -> Mapping[str, Any]:
    """What is recorded of the labels that the row's LoRA was trained on; empty if nothing is."""
    lora = getattr(row.row.images, "lora", None)
    if lora is not None:
        with suppress(MissingArtifact):
            info: Mapping[str, Any] = store.record(lora.labels)["info"]
            return info
    return {}


def _read(row: AuditRow, store: ArtifactStore, report: Report | None) -> tuple[ImageSet, DataFrame]:
    """Read the images; returns them, and a table with names and files."""
    count = row.images_per_class * len(row.classes)
    classnames, files = row.row.images.classnames, _files(row)
    lines, features, hashes = [], [], []
    for drawn in read_drawn_images(row.row, row.classes, row.images_per_class, store):
        picture = open_png(drawn.png)
        name = classnames[drawn.class_index]
        lines.append(
            {
                "label": drawn.class_index,
                "classname": name,
                "index": drawn.index,
                "file": _file(files.get(name, ()), drawn.index),
                "held": drawn.ok,
                "redrawn": drawn.ok and drawn.attempt > 0,
                "spread": spread(picture),
            }
        )
        features.append(drawn.features)
        hashes.append(difference_hash(picture))
        if report is not None:
            report(len(lines), count)
    table = DataFrame(lines)
    images = ImageSet(
        features=torch.from_numpy(np.stack(features)).float(),
        labels=torch.tensor(table.label.to_numpy()),
        hashes=torch.stack(hashes),
        spread=torch.tensor(table.spread.tolist()),
        held=torch.tensor(table.held.to_numpy()),
    )
    return images, table


def _files(row: AuditRow) -> Mapping[str, Sequence[Path]]:
    """Files of a folder of ready images by class, as the folder is now; empty for other rows."""
    images = row.row.images
    if not isinstance(images, FolderImages):
        return {}
    with suppress(OSError, ValueError):
        return class_files(images_folder(images.model.name), images.classnames)
    return {}


def _file(files: Sequence[Path], index: int) -> str | None:
    return f"{files[index].parent.name}/{files[index].name}" if index < len(files) else None


def _base(row: AuditRow, store: ArtifactStore) -> Labelled | None:
    """The images without LoRA, if they are drawn."""
    if row.base is not None:
        with suppress(MissingArtifact, FileNotFoundError):
            return read_synthetic(row.base, BASE_PER_CLASS, store, row.classes)
    return None


@torch.no_grad()
def _logits(text: LinearClassifier, features: Tensor, classes: Sequence[int]) -> Tensor:
    """(N, C) logits of the text classifier; -inf for classes without drawn images."""
    logits = text.logits(Batch(features))
    others = torch.ones(logits.shape[1], dtype=torch.bool)
    others[list(classes)] = False
    return logits.masked_fill(others, -torch.inf)


def _test_hash(row: AuditRow, worker: WorkerContext, position: int) -> Tensor | None:
    picture = _test_picture(row, worker, position)
    return None if picture is None else difference_hash(picture)


def _test_picture(row: AuditRow, worker: WorkerContext, position: int) -> Image.Image | None:
    with suppress(Unreadable, ChangedInput, FileNotFoundError):
        return worker.examples(row.features.dataset).images[position]
    return None


# ---------------------------------------------------------------- the card


def _flagged(
    finding: Finding, table: DataFrame, classnames: Sequence[str], test: Tensor
) -> dict[str, Any]:
    """A fault, as an entry of the card."""
    image = table.loc[finding.image]
    value = None if math.isnan(finding.value) else round(finding.value, DIGITS)
    match finding.reason:
        case "blank":
            text = f"is blank: no channel varies by more than {value:.1f} of 256 levels"
            text += "" if image.held else ", so no trial reads it"
        case "near-constant":
            text = f"is nearly constant: no channel varies by more than {value:.1f} levels"
        case "not a number":
            text = "has CLIP features that are not finite"
        case "duplicate":
            text = f"repeats {_name(table.loc[finding.other])}: {_similarity(finding)}"
        case "wrong class":
            text = (
                f"looks like {classnames[finding.other]!r}: {finding.beside:.0%} of the images "
                f"nearest to it were made for that class, and CLIP's margin is {value:+.2f}"
            )
        case "test copy":
            text = f"repeats test image {int(test[finding.other])}: {_similarity(finding)}"
    return {
        "classname": image.classname,
        "index": int(image["index"]),
        "file": image.file,
        "reason": finding.reason,
        "value": value,
        "sentence": f"{image.classname!r}: {_name(image)} {text}",
    }


def _name(image: Series) -> str:
    return f"image {image['index']}" + (f" ({image.file})" if image.file else "")


def _similarity(finding: Finding) -> str:
    return f"cosine {finding.value:.3f}, {finding.beside:.0f} of 256 bits of the hash differ"


def _recognised(images: Labelled, text: LinearClassifier, classes: Sequence[int]) -> float | None:
    predicted = _logits(text, images.batch.features, classes).argmax(dim=-1)
    return _rounded(float((predicted == images.labels).double().mean()))


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), DIGITS)


def _pair(distance: Any) -> list[float] | None:
    if math.isnan(distance.mean):
        return None
    return [round(distance.mean, DIGITS), round(distance.std, DIGITS)]


def _quantiles(values: Series, *shares: float) -> list[float] | None:
    known = values.dropna()
    return [round(float(q), DIGITS) for q in known.quantile(shares)] if len(known) else None


def _kept(images: ImageSet, logits: Tensor) -> dict[str, int]:
    """The number of images that each filter would keep in a trial that reads all of them."""
    read = images.held & images.features.isfinite().all(dim=1)
    bank = Labelled(Batch(images.features[read]), images.labels[read])
    filters = {
        "fidelity.min_margin: 0": FidelitySettings(min_margin=0.0),
        "fidelity.duplicates: drop": FidelitySettings(duplicates="drop"),
    }
    return {name: len(credible(bank, settings, logits[read])) for name, settings in filters.items()}


def _class_line(classname: str, images: DataFrame) -> dict[str, Any]:
    by_margin = images.dropna(subset="margin").sort_values(["margin", "index"])["index"].tolist()
    median = _quantiles(images.margin, 0.5)
    return {
        "classname": classname,
        "images": len(images),
        "recognised": _rounded(images.right[images.sound].mean()),
        "margin": median and median[0],
        "best": by_margin[-1] if by_margin else None,
        "worst": by_margin[0] if by_margin else None,
        "flagged": int(images.flagged.sum()),
    }


# ---------------------------------------------------------------- the sheet


def _sheet(
    card: AuditCard, table: DataFrame, result: Audit, row: AuditRow, worker: WorkerContext
) -> bytes:
    """The facts; below them the best, worst and flagged images, and the pairs most alike."""
    best_first = table.dropna(subset="margin").sort_values("margin", ascending=False, kind="stable")
    worst = best_first[::-1][:PER_LINE]
    flagged = table[table.flagged & ~table.index.isin(worst.index)].sort_values("margin")
    copies = {fault.image for fault in result.findings if fault.reason == "test copy"}
    duplicates = {
        fault.image: fault.other for fault in result.findings if fault.reason == "duplicate"
    }
    twins = table.assign(twin=[duplicates.get(i, j) for i, j in table.twin.items()])
    lines = {
        "best\none per class": _margins(best_first.groupby("classname").head(1)[:PER_LINE]),
        "worst\nsmallest margin": _margins(worst),
        "flagged\nother than worst": _margins(flagged[:PER_LINE]),
        "most alike\npairs in a class": _pairs(twins, "twin", "twin_cosine", {*duplicates}),
        "nearest test\ndrawn, test image": _pairs(table, "test", "test_cosine", copies),
    }
    shown = [image for line in lines.values() for images, _, _ in line for image in images]
    drawn = [tuple(table.loc[i, ["label", "index"]]) for kind, i in shown if kind != "test"]
    pictures = read_pictures(row.row, drawn, worker.store)

    def tile(kind: str, i: int, caption: str, flagged: bool) -> Tile:
        if kind == "test":
            return Tile(_test_picture(row, worker, i), "test image", str(i), flagged)
        image = table.loc[i]
        picture = pictures[image.label, image["index"]]
        return Tile(picture, image.classname, f"{image['index']}   {caption}", flagged)

    return captioned_sheet(
        f"{card.title}   {card.dataset}",
        card_facts(card),
        {
            name: [
                tile(*image, caption, flagged)
                for images, caption, flagged in line
                for image in images
            ]
            for name, line in lines.items()
        },
        "framed: flagged; `airsweep audit` lists the reasons",
    )


# Images that stand together, their caption, and whether they are flagged.
Shown = tuple[Sequence[tuple[str, int]], str, bool]


def _margins(images: DataFrame) -> list[Shown]:
    return [
        (
            [("drawn", int(i))],
            "" if math.isnan(image.margin) else f"{image.margin:+.2f}",
            image.flagged,
        )
        for i, image in images.iterrows()
    ]


def _pairs(table: DataFrame, other: str, cosine: str, flagged: set[int]) -> list[Shown]:
    """The pairs most alike, flagged ones first. Two images of a class make one pair, not two."""
    near = table[table[other] >= 0].assign(first=lambda lines: lines.index.isin(flagged))
    near = near.sort_values(["first", cosine], ascending=False, kind="stable")
    pairs: dict[Any, Shown] = {}
    for i, image in near.iterrows():
        partner = ("test" if other == "test" else "drawn", int(image[other]))
        pair = (("drawn", int(i)), partner)
        pairs.setdefault(frozenset(pair), (pair, f"{image[cosine]:.3f}", bool(image["first"])))
    return list(pairs.values())[: PER_LINE // 2]

"""Pictures for people: contact sheets and confusion matrices, as PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from air_core.specs import FeaturesSpec, SyntheticFeaturesSpec

if TYPE_CHECKING:
    from orchestrator.workshop import Workshop

ROWS = 20  # classes that a sheet shows at most
PER_GROUP = 6
TILE_PX, GAP_PX, LABEL_PX, HEAD_PX = 56, 2, 112, 26
INK, PAPER, FAINT = "#1b1f24", "#ffffff", "#6a737d"


def contact_sheet(
    drawn: SyntheticFeaturesSpec,
    base: SyntheticFeaturesSpec | None,
    features: FeaturesSpec,
    shop: Workshop,
) -> tuple[bytes, dict[str, float]]:
    """Real images, images without LoRA and with it, one class a row.

    Base and LoRA images in one column have the same noise. Real images stand under their true
    class, which nothing but this picture looks at.

    Returns:
        The PNG, and the share of each group that zero-shot CLIP takes for its class.
    """
    from air_core.datasets import get_dataset
    from orchestrator.image_rows import drawn_classes, read_images, recognised

    dataset = get_dataset(features.dataset.name)
    examples = shop.examples(features.dataset)
    shown = drawn_classes(drawn, shop.store)[:ROWS]
    real = [_readable(examples.images, np.flatnonzero(examples.labels == c)) for c in shown]
    named = "LoRA" if base is not None else "synthetic"
    groups = {"real": real, named: read_images(drawn, shown, PER_GROUP, shop.store)}
    shares = {named: recognised(drawn, PER_GROUP, shop, dataset.template)}
    if base is not None:
        groups = {
            "real": real,
            "base": read_images(base, shown, PER_GROUP, shop.store),
            named: groups[named],
        }
        shares["base"] = recognised(base, PER_GROUP, shop, dataset.template)
    return tile_sheet([dataset.classnames[c] for c in shown], groups), shares


def _readable(images: Sequence[Image.Image], positions: np.ndarray) -> list[Image.Image]:
    """The first few of a class."""
    from air_core.datasets.images import Unreadable

    found: list[Image.Image] = []
    for i in positions:
        if len(found) == PER_GROUP:
            break
        with suppress(Unreadable):
            found.append(images[i])
    return found


def tile_sheet(rows: list[str], groups: dict[str, list[list[Image.Image]]]) -> bytes:
    """A grid of pictures: a row for each name, groups of columns with a heading."""
    step = TILE_PX + GAP_PX
    group_px = PER_GROUP * step + 10
    width = LABEL_PX + group_px * len(groups)
    sheet = Image.new("RGB", (width, HEAD_PX + step * len(rows) + 6), PAPER)
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=13)
    for g, (heading, pictures) in enumerate(groups.items()):
        left = LABEL_PX + g * group_px
        pen.text((left, 5), heading, fill=INK, font=font)
        for r, line in enumerate(pictures):
            for k, picture in enumerate(line[:PER_GROUP]):
                resample = (
                    Image.Resampling.NEAREST
                    if picture.width < TILE_PX
                    else Image.Resampling.BICUBIC
                )
                tile = picture.convert("RGB").resize((TILE_PX, TILE_PX), resample)
                sheet.paste(tile, (left + k * step, HEAD_PX + r * step))
    for r, name in enumerate(rows):
        pen.text((6, HEAD_PX + r * step + TILE_PX // 2 - 8), name[:16], fill=FAINT, font=font)
    return _png(sheet)


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, names: list[str]) -> bytes:
    """Share of each true class (rows) that was taken for each class (columns).

    Args:
        labels: (T,) true classes.
        predictions: (T,) predicted classes.
        names: C class names.
    """
    from matplotlib.figure import Figure  # heavy, and without pyplot there is no global state

    count = len(names)
    matrix = np.zeros((count, count))
    np.add.at(matrix, (labels, predictions), 1)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = min(12.0, 2.4 + 0.42 * count)
    figure = Figure(figsize=(side + 0.6, side), layout="constrained")
    axes = figure.add_subplot()
    shades = axes.imshow(shares, vmin=0, vmax=1, cmap="cividis")
    figure.colorbar(shades, ax=axes, label="share of the true class", shrink=0.8)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if count <= 30:
        axes.set_xticks(range(count), names, rotation=60, ha="right", fontsize=8)
        axes.set_yticks(range(count), names, fontsize=8)
        for row, column in np.ndindex(count, count):
            if matrix[row, column]:
                color = "black" if shares[row, column] > 0.55 else "white"
                axes.text(
                    column,
                    row,
                    f"{matrix[row, column]:.0f}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color=color,
                )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()

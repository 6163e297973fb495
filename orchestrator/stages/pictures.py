"""Contact sheets, as PNG bytes."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from air_core.datasets.images import Unreadable
from orchestrator.stages.context import WorkerContext
from orchestrator.stages.dataset_text import read_dataset_text
from orchestrator.stages.features import FeaturesSpec
from orchestrator.stages.images import read_pictures
from orchestrator.stages.synthetic import (
    SyntheticFeaturesSpec,
    drawn_classes,
    drawn_per_class,
    recognised_share,
)

MAX_ROWS = 20  # classes on a sheet
PER_GROUP = 6
TILE_PX, GAP_PX, LABEL_PX, HEAD_PX = 56, 2, 112, 26
INK, PAPER, FAINT = "#1b1f24", "#ffffff", "#6a737d"

# A sheet of captioned pictures.
PER_LINE = 10
THUMB_PX, STEP_PX, CAPTION_PX, MARGIN_PX, NAME_LETTERS = 80, 94, 34, 14, 14
SHEET_BYTES = 300_000  # a larger sheet is reduced to 256 colours


def contact_sheet(
    drawn: SyntheticFeaturesSpec,
    base: SyntheticFeaturesSpec | None,
    features: FeaturesSpec,
    worker: WorkerContext,
) -> tuple[bytes, dict[str, float]]:
    """Real images, images without LoRA and images with LoRA, one class in each row.

    Base and LoRA images in one column start from the same noise. Real images stand in the row of
    their true class; only this picture uses these labels. Without labels it has no real images.

    Returns:
        The PNG, and the share of all drawn images of each row that zero-shot CLIP assigns to their
        class.
    """
    dataset = read_dataset_text(features, worker.store)
    examples = worker.examples(features.dataset)
    shown = drawn_classes(drawn, worker.store)[:MAX_ROWS]
    real = [_readable(examples.images, np.flatnonzero(examples.labels == c)) for c in shown]
    rows = {"synthetic": drawn} if base is None else {"base": base, "LoRA": drawn}
    groups, shares = {"real": real} if any(real) else {}, {}
    for name, row in rows.items():
        count = drawn_per_class(row, PER_GROUP, worker.store)
        pictures = read_pictures(row.images, itertools.product(shown, range(count)), worker.store)
        groups[name] = [[pictures[c, index] for index in range(count)] for c in shown]
        shares[name] = recognised_share(row, worker, dataset.template)
    sheet = tile_sheet([dataset.classnames[c] for c in shown], groups)
    return sheet, dict(reversed(shares.items()))  # the images that trials read come first


def _readable(images: Sequence[Image.Image], positions: np.ndarray) -> list[Image.Image]:
    """The first images of a class that can be decoded."""
    readable: list[Image.Image] = []
    for i in positions:
        if len(readable) == PER_GROUP:
            break
        with suppress(Unreadable):
            readable.append(images[i])
    return readable


def tile_sheet(rows: list[str], groups: dict[str, list[list[Image.Image]]]) -> bytes:
    """A grid of pictures, with a row for each name and a heading over each group of columns."""
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
                corner = (left + k * step, HEAD_PX + r * step)
                sheet.paste(_thumbnail(picture, TILE_PX), corner)
    for r, name in enumerate(rows):
        pen.text((6, HEAD_PX + r * step + TILE_PX // 2 - 8), name[:16], fill=FAINT, font=font)
    return _png(sheet)


def captioned_sheet(
    title: str, classnames: str, pictures: Sequence[Image.Image], names: Sequence[str], foot: str
) -> bytes:
    """Title and class names, then lines of numbered pictures with their names."""
    step = THUMB_PX + CAPTION_PX + 10
    top = 2 * MARGIN_PX + 40
    starts = range(0, len(names), PER_LINE)
    size = (2 * MARGIN_PX + PER_LINE * STEP_PX, top + step * len(starts) + 24)
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    small, middle, large = (ImageFont.load_default(size=size) for size in (11, 13, 16))
    pen.text((MARGIN_PX, MARGIN_PX), title, fill=INK, font=large)
    pen.text((MARGIN_PX, MARGIN_PX + 28), f"classes: {classnames}", fill=INK, font=middle)
    for i, (picture, name) in enumerate(zip(pictures, names, strict=True)):
        x, y = MARGIN_PX + i % PER_LINE * STEP_PX, top + i // PER_LINE * step
        sheet.paste(_thumbnail(picture, THUMB_PX), (x, y))
        # Names of photographs differ at their ends.
        end = name if len(name) <= NAME_LETTERS else f"..{name[2 - NAME_LETTERS :]}"
        pen.text((x, y + THUMB_PX + 1), str(i + 1), fill=INK, font=middle)
        pen.text((x, y + THUMB_PX + 17), end, fill=FAINT, font=small)
    pen.text((MARGIN_PX, top + step * len(starts)), foot, fill=FAINT, font=small)
    png = _png(sheet)
    return png if len(png) < SHEET_BYTES else _png(sheet.quantize(256))


def _thumbnail(picture: Image.Image, size: int) -> Image.Image:
    """The middle square of a picture, scaled to `size` pixels."""
    small = min(picture.size) < size
    method = Image.Resampling.NEAREST if small else Image.Resampling.BICUBIC
    return ImageOps.fit(picture.convert("RGB"), (size, size), method)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()

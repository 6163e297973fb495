"""Pictures for people: contact sheets and sheets of audits, as PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from air_core.specs import FeaturesSpec, SyntheticFeaturesSpec

if TYPE_CHECKING:
    from orchestrator.stages.context import WorkerContext

ROWS = 20  # classes that a sheet shows at most
PER_GROUP = 6
TILE_PX, GAP_PX, LABEL_PX, HEAD_PX = 56, 2, 112, 26
INK, PAPER, FAINT = "#1b1f24", "#ffffff", "#6a737d"
ALARM = "#d55e00"  # told from the rest by the colour-blind too

# A sheet of captioned tiles.
THUMB_PX, NAME_PX, STEP_PX, CAPTION_PX, MARGIN_PX = 64, 118, 76, 30, 14
SHEET_BYTES = 300_000  # a larger sheet is brought to 256 colours


def contact_sheet(
    drawn: SyntheticFeaturesSpec,
    base: SyntheticFeaturesSpec | None,
    features: FeaturesSpec,
    worker: WorkerContext,
) -> tuple[bytes, dict[str, float]]:
    """Real images, images without LoRA and with it, one class a row.

    Base and LoRA images in one column have the same noise. Real images stand under their true
    class, which nothing but this picture looks at.

    Returns:
        The PNG, and the share of each group that zero-shot CLIP takes for its class.
    """
    from orchestrator.planning.dataset_text import text_of
    from orchestrator.stages.image_rows import drawn_classes, drawn_of_each, read_images, recognised

    dataset = text_of(features, worker.store)
    examples = worker.examples(features.dataset)
    shown = drawn_classes(drawn, worker.store)[:ROWS]
    real = [_readable(examples.images, np.flatnonzero(examples.labels == c)) for c in shown]
    rows = {"synthetic": drawn} if base is None else {"base": base, "LoRA": drawn}
    groups, shares = {"real": real}, {}
    for named, row in rows.items():
        count = drawn_of_each(row, PER_GROUP, worker.store)
        groups[named] = read_images(row, shown, count, worker.store)
        shares[named] = recognised(row, count, worker, dataset.template)
    sheet = tile_sheet([dataset.classnames[c] for c in shown], groups)
    return sheet, dict(reversed(shares.items()))  # what trials read is told first


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
                place = (left + k * step, HEAD_PX + r * step)
                sheet.paste(_thumbnail(picture, TILE_PX), place)
    for r, name in enumerate(rows):
        pen.text((6, HEAD_PX + r * step + TILE_PX // 2 - 8), name[:16], fill=FAINT, font=font)
    return _png(sheet)


@dataclass(frozen=True)
class Tile:
    """A picture with two lines under it."""

    picture: Image.Image | None
    name: str
    words: str
    framed: bool = False


def captioned_sheet(
    title: str,
    facts: Sequence[tuple[str, str]],
    lines: Mapping[str, Sequence[Tile]],
    foot: str,
) -> bytes:
    """Labelled facts, then lines of captioned pictures; a line without any is left out."""
    lines = {name: tiles for name, tiles in lines.items() if tiles}
    step = THUMB_PX + CAPTION_PX + 10
    top = 2 * MARGIN_PX + 22 + 18 * len(facts)
    width = 2 * MARGIN_PX + NAME_PX + 10 * STEP_PX
    sheet = Image.new("RGB", (width, top + step * len(lines) + 24), PAPER)
    pen = ImageDraw.Draw(sheet)
    small, middle, large = (ImageFont.load_default(size=size) for size in (11, 13, 16))
    pen.text((MARGIN_PX, MARGIN_PX), title, fill=INK, font=large)
    for row, (label, text) in enumerate(facts):
        y = MARGIN_PX + 28 + 18 * row
        pen.text((MARGIN_PX, y), label, fill=FAINT, font=middle)
        pen.text((MARGIN_PX + NAME_PX, y), text, fill=INK, font=middle)
    for row, (name, tiles) in enumerate(lines.items()):
        y = top + step * row
        label, _, words = name.partition("\n")
        pen.text((MARGIN_PX, y + 18), label, fill=INK, font=middle)
        pen.text((MARGIN_PX, y + 34), words, fill=FAINT, font=small)
        for k, tile in enumerate(tiles):
            x, ink = MARGIN_PX + NAME_PX + k * STEP_PX, ALARM if tile.framed else INK
            if tile.picture is not None:
                sheet.paste(_thumbnail(tile.picture, THUMB_PX), (x, y))
            if tile.framed:
                corners = (x - 3, y - 3, x + THUMB_PX + 2, y + THUMB_PX + 2)
                pen.rectangle(corners, outline=ALARM, width=2)
            for down, text in ((3, tile.name), (15, tile.words)):
                said = _cut(text, STEP_PX - 6, small)
                pen.text((x, y + THUMB_PX + down), said, fill=ink, font=small)
    pen.text((MARGIN_PX, top + step * len(lines)), foot, fill=FAINT, font=small)
    png = _png(sheet)
    return png if len(png) < SHEET_BYTES else _png(sheet.quantize(256))


def _thumbnail(picture: Image.Image, size: int) -> Image.Image:
    """The middle square of a picture, so many pixels high and wide."""
    small = min(picture.size) < size
    how = Image.Resampling.NEAREST if small else Image.Resampling.BICUBIC
    return ImageOps.fit(picture.convert("RGB"), (size, size), how)


def _cut(text: str, room: int, font: Any) -> str:
    """As much of a text as fits into so many pixels."""
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(text + "..") > room:
        text = text[:-1]
    return text + ".."


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()

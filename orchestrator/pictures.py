"""Pictures for people: contact sheets and audit cards, as PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from air_core.datasets.images import open_png
from air_core.specs import FeaturesSpec, SyntheticFeaturesSpec
from orchestrator.audit_card import THUMB_PX, AuditCard, Shown, facts_of

if TYPE_CHECKING:
    from orchestrator.workshop import Workshop

ROWS = 20  # classes that a sheet shows at most
PER_GROUP = 6
TILE_PX, GAP_PX, LABEL_PX, HEAD_PX = 56, 2, 112, 26
INK, PAPER, FAINT = "#1b1f24", "#ffffff", "#6a737d"
ALARM = "#d55e00"  # told from the rest by the colour-blind too

# An audit card: its lines of pictures, what stands beside them, and whether they are pairs.
CARD_LINES = {
    "best": ("best", "one of a class"),
    "worst": ("worst", "smallest margin"),
    "doubted": ("wrong class", "beyond the worst"),
    "alike": ("most alike", "pairs of a class"),
    "tests": ("nearest test", "drawn | test image"),
    "dull": ("no picture", "levels"),
}
CARD_LABEL_PX, CARD_STEP_PX, CAPTION_PX, CARD_MARGIN_PX = 118, 76, 30, 14
CARD_BYTES = 300_000  # a larger card is brought to 256 colours


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
    from orchestrator.dataset_text import text_of
    from orchestrator.image_rows import drawn_classes, drawn_of_each, read_images, recognised

    dataset = text_of(features, shop.store)
    examples = shop.examples(features.dataset)
    shown = drawn_classes(drawn, shop.store)[:ROWS]
    real = [_readable(examples.images, np.flatnonzero(examples.labels == c)) for c in shown]
    rows = {"synthetic": drawn} if base is None else {"base": base, "LoRA": drawn}
    groups, shares = {"real": real}, {}
    for named, row in rows.items():
        count = drawn_of_each(row, PER_GROUP, shop.store)
        groups[named] = read_images(row, shown, count, shop.store)
        shares[named] = recognised(row, count, shop, dataset.template)
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


def audit_sheet(card: AuditCard) -> bytes:
    """An audit card as a picture: what was counted, then the images that it is about."""
    lines = {name: getattr(card, name) for name in CARD_LINES if getattr(card, name)}
    facts = facts_of(card)
    left, step = CARD_MARGIN_PX, THUMB_PX + CAPTION_PX + 10
    top = 2 * CARD_MARGIN_PX + 22 + 18 * len(facts)
    width = 2 * left + CARD_LABEL_PX + 10 * CARD_STEP_PX
    sheet = Image.new("RGB", (width, top + step * len(lines) + 24), PAPER)
    pen = ImageDraw.Draw(sheet)
    small, middle, large = (ImageFont.load_default(size=size) for size in (11, 13, 16))
    pen.text((left, left), f"{card.title}   {card.dataset}", fill=INK, font=large)
    for row, (label, text) in enumerate(facts):
        y = left + 28 + 18 * row
        pen.text((left, y), label, fill=FAINT, font=middle)
        pen.text((left + CARD_LABEL_PX, y), text, fill=INK, font=middle)
    for row, (name, shown) in enumerate(lines.items()):
        y = top + step * row
        for k, words in enumerate(CARD_LINES[name]):
            font, ink = (middle, INK) if k == 0 else (small, FAINT)
            pen.text((left, y + 18 + 16 * k), words, fill=ink, font=font)
        for k, one in enumerate(shown):
            wide = 1 if one.other is None else 2
            x = left + CARD_LABEL_PX + k * wide * CARD_STEP_PX
            _paste(sheet, pen, one, x, y)
            ink = ALARM if one.flagged else INK
            room = wide * CARD_STEP_PX - 6
            pen.text((x, y + THUMB_PX + 3), _cut(one.classname, room, small), fill=ink, font=small)
            said = _cut(_caption(one, name), room, small)
            pen.text((x, y + THUMB_PX + 15), said, fill=ink if one.flagged else FAINT, font=small)
    y = top + step * len(lines)
    pen.text((left, y), "framed: flagged; airsweep audit says why", fill=FAINT, font=small)
    png = _png(sheet)
    return png if len(png) < CARD_BYTES else _png(sheet.quantize(256))


def _paste(sheet: Image.Image, pen: ImageDraw.ImageDraw, one: Shown, x: int, y: int) -> None:
    for k, png in enumerate((one.png, one.other_png)):
        if png:
            sheet.paste(open_png(png), (x + k * (THUMB_PX + 4), y))
    if one.flagged:
        right = x + THUMB_PX + (THUMB_PX + 4 if one.other_png else 0)
        pen.rectangle((x - 3, y - 3, right + 2, y + THUMB_PX + 2), outline=ALARM, width=2)


def _caption(one: Shown, line: str) -> str:
    value = f"{one.value:+.2f}" if line in ("best", "worst", "doubted") else f"{one.value:.3f}"
    if one.other is None:
        return f"{one.index}   {value}"
    return f"{one.index} | {'test ' if line == 'tests' else ''}{one.other}   {value}"


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

"""Contact sheets, as PNG bytes."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from contextlib import suppress

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from air_core.datasets.images import Unreadable
from orchestrator.stages.context import WorkerContext
from orchestrator.stages.dataset_text import read_dataset_text
from orchestrator.stages.features import FeaturesSpec
from orchestrator.stages.images import read_pictures
from orchestrator.stages.synthetic import SyntheticFeaturesSpec, recognised_share

MAX_ROWS = 20  # classes on a sheet
PER_GROUP = 6
TILE_PX, GAP_PX, LABEL_PX, LINE_PX = 56, 2, 112, 18
INK, PAPER, FAINT = "#1b1f24", "#ffffff", "#6a737d"

Picture = tuple[Image.Image, str]  # with its caption


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
    # TRZSL draws only unseen classes.
    shown = sorted({c for c, _ in worker.store.row(drawn).existing_shards()})[:MAX_ROWS]
    real = [_readable(examples.images, np.flatnonzero(examples.labels == c)) for c in shown]
    rows = {"synthetic": drawn} if base is None else {"base": base, "LoRA": drawn}
    groups, shares = {"real": real} if any(real) else {}, {}
    for name, row in rows.items():
        groups[name] = _first_drawn(row, shown, worker)
        shares[name] = recognised_share(row, worker, dataset.template)
    sheet = tile_sheet([dataset.classnames[c] for c in shown], groups, PER_GROUP, TILE_PX)
    return sheet, dict(reversed(shares.items()))  # the images that trials read come first


def _readable(images: Sequence[Image.Image], positions: np.ndarray) -> list[Picture]:
    """The first images of a class that can be decoded."""
    readable: list[Picture] = []
    for i in positions:
        if len(readable) == PER_GROUP:
            break
        with suppress(Unreadable):
            readable.append((images[i], ""))
    return readable


def _first_drawn(
    row: SyntheticFeaturesSpec, classes: Sequence[int], worker: WorkerContext
) -> list[list[Picture]]:
    """The first images of some classes, as many as each of them has."""
    present, size = worker.store.row(row).existing_shards(), row.block_size
    blocks = itertools.takewhile(lambda b: {(c, b) for c in classes} <= present, itertools.count())
    count = min(PER_GROUP, size * len(list(itertools.islice(blocks, PER_GROUP))))
    pictures = read_pictures(row.images, itertools.product(classes, range(count)), worker.store)
    return [[(pictures[c, index], "") for index in range(count)] for c in classes]


def tile_sheet(
    names: Sequence[str],
    groups: Mapping[str, Sequence[Sequence[Picture]]],
    per_line: int,
    tile: int,
) -> bytes:
    """A grid of square pictures, with a name before each line and a heading over each group of
    columns.

    Args:
        groups: lines of pictures by heading, which may have several lines of text.
        per_line: pictures in a line of a group.
        tile: side of a picture in pixels.
    """
    captioned = any(text for lines in groups.values() for line in lines for _, text in line)
    height = tile + GAP_PX + captioned * LINE_PX
    head = 8 + LINE_PX * max(heading.count("\n") + 1 for heading in groups)
    label, group = LABEL_PX * any(names), per_line * (tile + GAP_PX) + 10
    sheet = Image.new("RGB", (label + group * len(groups), head + height * len(names) + 6), PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    for g, (heading, lines) in enumerate(groups.items()):
        pen.text((label + g * group, 5), heading, fill=INK, font=font)
        for r, line in enumerate(lines):
            for k, (picture, text) in enumerate(line):
                x, y = label + g * group + k * (tile + GAP_PX), head + r * height
                sheet.paste(_thumbnail(picture, tile), (x, y))
                pen.text((x, y + tile + 1), text, fill=INK, font=font)
    for r, name in enumerate(names):
        pen.text((6, head + r * height + tile // 2 - 8), name[:16], fill=FAINT, font=font)
    png = io.BytesIO()
    sheet.save(png, "PNG", optimize=True)
    return png.getvalue()


def _thumbnail(picture: Image.Image, size: int) -> Image.Image:
    """The middle square of a picture, scaled to `size` pixels."""
    small = min(picture.size) < size
    method = Image.Resampling.NEAREST if small else Image.Resampling.BICUBIC
    return ImageOps.fit(picture.convert("RGB"), (size, size), method)

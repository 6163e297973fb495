"""Rows of synthetic images: each class has an unlimited, numbered row that is drawn block by block,
and a trial reads the first images of each class.

`orchestrator.stages.synthetic` makes blocks of images together with their features.
"""

from __future__ import annotations

import io
import time
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from air_core.datasets.images import open_image
from air_core.settings import GenerationSettings, Ref
from air_core.settings.components import GENERATORS
from air_core.tools.captions import text_of
from air_core.tools.seal import BLANK, sealed
from orchestrator.keys import Indices, Needed, RowSpec
from orchestrator.stages.context import WorkerContext
from orchestrator.stages.inputs import images_folder
from orchestrator.stages.lora import LoraSpec
from orchestrator.store import ArtifactStore
from orchestrator.store.rows import Row

if TYPE_CHECKING:
    from PIL.Image import Image

    from air_core.diffusion import ImageGenerator

PNG_LEVEL = 3  # of compression: 2.4 times as fast as the default 6, files are 7 % larger


@dataclass(frozen=True, kw_only=True)
class ImagesSpec(RowSpec):
    """Base of both kinds of rows of images, which are one stage."""

    stage, title, guess, shard, counts = "images", "image blocks", 0.03, ".parquet", "steps"
    modules = ("air_core.diffusion.folder", "air_core.diffusion.pipeline")

    model: Ref
    classnames: tuple[str, ...]

    def name_of(self, index: int) -> str:
        return self.classnames[index]

    @abstractmethod
    def open(self, worker: WorkerContext) -> ImageGenerator:
        """The generator of the images.

        Raises:
            MissingArtifact: its LoRA is not made yet.
            ChangedInput: ready images do not match the digest of the spec.
        """

    def origin(self, class_index: int, index: int, attempt: int) -> tuple[str, int]:
        """Prompt and seed of an image; empty and 0: it was not drawn."""
        return "", 0


@dataclass(frozen=True, kw_only=True)
class GeneratedImages(ImagesSpec):
    """An unlimited seeded row of images for each class; the spec does not contain their number."""

    kind: Literal["generated"] = "generated"
    lora: LoraSpec | None
    lora_scale: float
    settings: GenerationSettings

    @property
    def words(self) -> list[str]:
        return [self.model.name, self.lora.slug if self.lora else "base"]

    @property
    def block_size(self) -> int:
        return self.settings.block

    def inputs(self, classes: Indices) -> Iterator[Needed]:
        if self.lora is not None:
            yield Needed(self.lora)

    def work(self) -> tuple[str, float]:
        """A unit is an image."""
        drawn = self.settings
        kind = f"{self.model.name} {drawn.size}px {drawn.num_inference_steps} steps"
        return kind, self.block_size

    def open(self, worker: WorkerContext) -> ImageGenerator:
        if self.model.name in GENERATORS:
            plugin: ImageGenerator = GENERATORS.load(self.model.name)(self.settings, worker.device)
            return plugin
        from air_core.diffusion.pipeline import PipelineGenerator  # diffusers takes seconds

        return PipelineGenerator(
            images_folder(self.model.name),
            self.settings,
            adapter=worker.store.get(self.lora).path if self.lora else None,
            scale=self.lora_scale,
            device=worker.device,
            thrift=worker.thrift,
        )

    def origin(self, class_index: int, index: int, attempt: int) -> tuple[str, int]:
        from air_core.diffusion import image_seed

        name = self.classnames[class_index]
        seed = image_seed(self.settings.seed, name, index, attempt)
        return text_of(self.settings.template, name, index), seed


@dataclass(frozen=True, kw_only=True)
class FolderImages(ImagesSpec):
    """Ready images, with one folder for each class."""

    kind: Literal["folder"] = "folder"
    size: int
    block: int

    @property
    def words(self) -> list[str]:
        return [self.model.name]

    @property
    def block_size(self) -> int:
        return self.block

    def work(self) -> tuple[str, float]:
        return "ready images", self.block_size

    def open(self, worker: WorkerContext) -> ImageGenerator:
        from air_core.diffusion.folder import FolderGenerator

        generator = FolderGenerator(images_folder(self.model.name), self.classnames, self.size)
        # After the generator has listed the images: it notices later changes itself.
        worker.check_ready_images(self.model)
        return generator


@dataclass(frozen=True)
class Drawn:
    """A block of images, each drawn in some attempt; one that is not `ok` is a hole."""

    indices: list[int]
    images: list[Image]
    attempts: list[int]
    ok: list[bool]


def draw_block(
    spec: ImagesSpec, class_index: int, block: int, generator: ImageGenerator
) -> tuple[Drawn, dict[str, Any]]:
    """A block, and its counts as `synthetic.build` returns them."""
    from PIL import Image

    from air_core.diffusion import draw

    started = time.monotonic()
    indices = list(range(block * spec.block_size, (block + 1) * spec.block_size))
    pixels, attempts, ok = draw(generator, spec.classnames[class_index], indices)
    on_device = time.monotonic() - started
    images = [Image.fromarray(image) for image in pixels.numpy()]
    drawn = Drawn(indices, images, attempts, ok)
    counts = {"drawn": sum(ok), "holes": len(ok) - sum(ok)}
    redrawn = sum(attempt > 0 for attempt in attempts)
    return drawn, {**counts, "redrawn": redrawn, "on_device": on_device}


def publish(row: Row, spec: ImagesSpec, class_index: int, block: int, drawn: Drawn) -> None:
    """Write a block of images with their prompts and seeds."""
    import pyarrow as pa

    numbered = zip(drawn.indices, drawn.attempts, strict=True)
    prompts, seeds = zip(*(spec.origin(class_index, *each) for each in numbered), strict=True)
    with ThreadPoolExecutor() as threads:
        pngs = list(threads.map(_png, drawn.images))
    table = pa.table(
        {
            "index": pa.array(drawn.indices, pa.int32()),
            "class": [spec.classnames[class_index]] * len(drawn.indices),
            "prompt": prompts,
            "seed": pa.array(seeds, pa.uint64()),
            "attempt": pa.array(drawn.attempts, pa.int8()),
            "ok": drawn.ok,
            "image": pngs,
        }
    )
    row.publish(class_index, block, sealed(_parquet(table)))


def _png(image: Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=PNG_LEVEL)
    return buffer.getvalue()


def _parquet(table: Any) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = pa.BufferOutputStream()
    with pq.ParquetWriter(buffer, table.schema) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({"seal": BLANK})
    return bytes(buffer.getvalue())


def stored_block(shard: bytes) -> tuple[list[Image], list[bool]]:
    """The images of a shard, and whether each is no hole."""
    import pyarrow.parquet as pq

    table = pq.read_table(io.BytesIO(shard), columns=["image", "ok"])
    stored = map(io.BytesIO, table["image"].to_pylist())
    images = [open_image(png, "a stored image", ("PNG",)) for png in stored]
    return images, table["ok"].to_pylist()


def read_pictures(
    spec: ImagesSpec, positions: Iterable[tuple[int, int]], store: ArtifactStore
) -> dict[tuple[int, int], Image]:
    """Read pictures by class and index."""
    row, size = store.row(spec), spec.block_size
    wanted = sorted(set(positions))
    shards = dict.fromkeys((c, index // size) for c, index in wanted)
    row.pull(shards)
    blocks = {shard: stored_block(row.read(*shard))[0] for shard in shards}
    return {(c, index): blocks[c, index // size][index % size] for c, index in wanted}

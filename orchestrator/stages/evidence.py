"""Denoising errors of pool images: a row of draws for each block of images.

A shard holds one draw of one block: the errors of its images under the captions of the classes that
are scored, as triples of image, class and error. The blocks cover the pool in a random order, so
that the first ones are a sample.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import load, save

from air_core.settings import EvidenceScoring, Ref, SplitSettings
from air_core.tools.seal import BLANK, sealed
from orchestrator.errors import DamagedArtifact, MissingArtifact
from orchestrator.keys import Indices, Needed, RowSpec
from orchestrator.stages.context import WorkerContext, exclusive_shard, ignore
from orchestrator.stages.features import FeaturesSpec, read_target
from orchestrator.stages.inputs import images_folder
from orchestrator.stages.lora import LoraSpec
from orchestrator.store import ArtifactStore
from orchestrator.store.rows import Row

if TYPE_CHECKING:
    from torch import Tensor

    from air_core.diffusion.denoising import DenoisingScorer


@dataclass(frozen=True, kw_only=True)
class EvidenceSpec(RowSpec):
    """Denoising errors of the pool images of a split, for each class of the pool.

    An unlimited row of draws for each block of images; the spec contains neither the number of
    draws nor that of images. The images are in a random order, so the first ones are a sample.
    """

    stage, title, guess = "evidence", "denoising errors", 0.004
    shard, counts = ".safetensors", "pairs"
    modules = (
        "air_core.backbone.loading",
        "air_core.classifiers",
        "air_core.diffusion.denoising",
        "air_core.diffusion.folder",
        "air_core.diffusion.lora",
        "air_core.models.tokens",
        "air_core.paradigms",
    )

    features: FeaturesSpec
    split: SplitSettings
    model: Ref
    lora: LoraSpec | None
    lora_scale: float
    scoring: EvidenceScoring
    size: int

    @property
    def words(self) -> list[str]:
        return [(self.lora or self.features).slug, self.model.name]

    @property
    def block_size(self) -> int:
        return self.scoring.block

    @property
    def needs_earlier(self) -> bool:
        """Images whose candidates are pruned need the errors of the first draws."""
        return self.scoring.prune_after is not None

    def shards(self, images: int, indices: Indices) -> list[tuple[int, int]]:
        """The draws of one block come one after another, since they need the same images."""
        return [(draw, block) for block in range(self.blocks(images)) for draw in indices]

    def name_of(self, index: int) -> str:
        return f"draw {index}"

    def inputs(self, classes: Indices) -> Iterator[Needed]:
        yield Needed(self.features)
        if self.lora is not None:
            yield Needed(self.lora)

    def work(self) -> tuple[str, float]:
        """A unit is an image."""
        scoring = self.scoring
        kind = f"{self.model.name} {self.size}px {self.features.dataset.name}"
        kind += f" top {scoring.top or 'all'}"
        if scoring.prune_after is not None:
            kind += f" {scoring.prune_to} after {scoring.prune_after}"
        return kind, self.block_size


@dataclass
class BlockScorer:
    """Scores blocks of the pool images of one spec, and keeps the latents of the last block."""

    spec: EvidenceSpec
    worker: WorkerContext
    scorer: DenoisingScorer
    positions: Tensor  # (P,) in the dataset, in the order of the blocks
    logits: Tensor  # (P, C) of zero-shot CLIP
    latents: tuple[int, Tensor] | None = None  # block and its latents
    report: Callable[[int, int], None] = ignore  # receives the finished and all pairs of a shard

    def errors(self, block: int, draw: int, earlier: np.ndarray | None) -> np.ndarray:
        """(B, C) errors of one draw of a block; NaN for classes that are no candidates."""
        import torch

        from air_core.diffusion.denoiser import CHUNK
        from air_core.diffusion.denoising import candidate_classes

        images = slice(block * self.spec.block_size, (block + 1) * self.spec.block_size)
        positions = self.positions[images]
        if self.latents is None or self.latents[0] != block:
            self.latents = (
                block,
                torch.cat([self._encoded(part) for part in torch.split(positions, CHUNK)]),
            )
        scoring = self.spec.scoring
        candidates = candidate_classes(self.logits[images], scoring.top, earlier, scoring.prune_to)
        found = self.scorer.errors(
            self.latents[1], positions.tolist(), draw, candidates, self.report
        )
        return np.asarray(found.numpy())

    def _encoded(self, positions: Tensor) -> Tensor:
        """(B, c, h, w) latents."""
        import torch

        from air_core.diffusion.lora import square

        read = self.worker.images(self.spec.features.dataset, positions.tolist())
        pixels = [square(image, self.spec.size) for image in read]
        return self.scorer.latents(torch.from_numpy(np.stack(pixels)))


def pool_order(spec: EvidenceSpec, images: int) -> Tensor:
    """(P,) a random order of the pool images, which the split determines."""
    import torch

    generator = torch.Generator().manual_seed(spec.split.split_seed)
    return torch.randperm(images, generator=generator)


def open_model(spec: EvidenceSpec, worker: WorkerContext) -> BlockScorer:
    """Load the model with its LoRA from the store.

    Raises:
        MissingArtifact: the LoRA or the features are not made yet.
    """
    from air_core.classifiers import text_classifier
    from air_core.diffusion.denoising import DenoisingScorer
    from air_core.types import Classes

    target = read_target(spec.features, spec.split, worker.store)
    backbone = worker.backbone(spec.features.backbone, spec.features.precision)
    text = text_classifier(backbone, target.text.classnames, target.text.template)
    pool = target.split.pool
    order = pool_order(spec, len(pool))
    logits = text.logits(target.batch(pool[order]))
    classes = Classes(logits.shape[1], target.split.unseen).of_pool.tolist()
    scorer = DenoisingScorer(
        images_folder(spec.model.name),
        spec.scoring,
        [target.text.classnames[c] for c in classes],
        spec.size,
        adapter=worker.store.get(spec.lora).path if spec.lora else None,
        scale=spec.lora_scale,
        device=worker.device,
        thrift=worker.thrift,
    )
    return BlockScorer(spec, worker, scorer, pool[order], logits[:, list(classes)])


def build(
    spec: EvidenceSpec,
    draw: int,
    block: int,
    worker: WorkerContext,
    scorer: Callable[[], BlockScorer],
) -> dict[str, float]:
    """Compute one draw of one block, unless the store has it.

    After `prune_after` draws the candidates depend on the errors of these draws, which are computed
    first if they are missing.

    Returns:
        Number of computed pairs of image and class, 0 if the store had them, and the seconds.

    Raises:
        RuntimeError: the shard has killed the last processes that computed it.
    """
    counts: dict[str, float] = {"pairs": 0, "on_device": 0.0}
    row, after = worker.store.open_row(spec), spec.scoring.prune_after
    earlier = None
    if after is not None and draw >= after:
        first_draws = []
        for first in range(after):
            try:
                first_draws.append(_read(row, first, block))
            except (FileNotFoundError, DamagedArtifact):
                made = build(spec, first, block, worker, scorer)
                counts = {name: counts[name] + made[name] for name in counts}
                first_draws.append(_read(row, first, block))
        earlier = np.stack(first_draws)
    with exclusive_shard(row, draw, block, worker.store) as exists:
        if exists:
            return counts
        loaded = scorer()
        started = time.monotonic()
        errors = loaded.errors(block, draw, earlier)
        counts["on_device"] += time.monotonic() - started
        counts["pairs"] += int(np.isfinite(errors).sum())
        row.publish(draw, block, sealed(save(_sparse(errors), {"seal": BLANK})))
    return counts


def read_evidence(
    spec: EvidenceSpec, draws: int, images: int | None, store: ArtifactStore
) -> Tensor:
    """Read denoising errors. Scores depend on the mean of the draws only, so it is read as one.

    Args:
        draws: number of draws, from the first.
        images: number of images of the random order that are read; None: all of the pool.

    Returns:
        (1, P, C) means in the order of the pool; NaN where a draw has not scored an image or class.

    Raises:
        MissingArtifact: a shard does not exist.
        DamagedArtifact: a shard is damaged.
    """
    import torch

    pool = len(read_target(spec.features, spec.split, store).split.pool)
    images = min(pool, images or pool)
    order = pool_order(spec, pool)[:images]
    row, blocks = store.row(spec), range(spec.blocks(images))
    row.pull([(draw, block) for draw in range(draws) for block in blocks])
    means = torch.empty(0)
    try:
        for block in blocks:
            mean = torch.from_numpy(sum(_read(row, draw, block) for draw in range(draws)) / draws)
            if not len(means):
                means = torch.full((pool, mean.shape[1]), torch.nan)
            positions = order[block * spec.block_size :][: len(mean)]
            means[positions] = mean[: len(positions)]
    except FileNotFoundError:
        raise MissingArtifact(
            f"draws of {row.key} are not complete under {store.name}; run "
            "`airsweep run SPEC --prepare` first"
        ) from None
    return means[None]


def _read(row: Row, draw: int, block: int) -> np.ndarray:
    """(B, C) errors of a shard; NaN where not computed."""
    shard = load(row.read(draw, block))
    errors = np.full(shard["shape"], np.nan, dtype=np.float32)
    errors[shard["image"], shard["class"]] = shard["error"]
    return errors


def _sparse(errors: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays of a shard. Most classes of an image are no candidates."""
    image, classes = np.isfinite(errors).nonzero()
    return {
        "shape": np.array(errors.shape, dtype=np.int32),
        "image": image.astype(np.int32),
        "class": classes.astype(np.int32),
        "error": errors[image, classes],
    }

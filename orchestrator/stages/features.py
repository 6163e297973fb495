"""CLIP features of every image of a dataset, and their split."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load_file, save_file

from air_core.datasets import Examples, get_dataset
from air_core.datasets.images import BAD_SHARE, ImageFiles, too_many_unreadable
from air_core.paradigms import make_split
from air_core.settings import UNKNOWN, ClipPrecision, Level, Ref, SplitSettings
from orchestrator.keys import Indices, Needed, StageSpec
from orchestrator.stages.context import WorkerContext, ignore
from orchestrator.stages.dataset_text import DatasetText, read_dataset_text
from orchestrator.stages.encoded import READING, EncodedSpec, encode, read_blocks
from orchestrator.store import ArtifactStore
from orchestrator.store.artifacts import Artifact

if TYPE_CHECKING:
    from torch import Tensor

    from air_core.types import Encoded, Labelled, Split

PARTS = ("train", "val", "test", "free", "bad")
LISTED = 100  # unreadable images whose names are recorded


@dataclass(frozen=True, kw_only=True)
class FeaturesSpec(StageSpec):
    """Features of every image of a dataset, encoded by a frozen CLIP.

    `level` is `features`, one vector per image, or `tokens`, those of its patches, for visual
    prompts.
    """

    stage, title, guess = "features", "CLIP features", 8.0
    modules = READING

    dataset: Ref
    backbone: Ref
    precision: ClipPrecision = "fp32"
    level: Level = "features"

    @property
    def encoded(self) -> EncodedSpec | None:
        """The blocks that the features of many image files are put together from."""
        row = EncodedSpec(features=self, block=EncodedSpec.size)
        return row if row.blocks(self.dataset.images) > row.few else None

    @property
    def words(self) -> list[str]:
        tokens = ["tokens"] if self.level == "tokens" else []
        return [self.dataset.name, self.backbone.name, *tokens]

    def inputs(self, classes: Indices) -> Iterator[Needed]:
        if (row := self.encoded) is not None:
            yield Needed(row, self.dataset.images, (0,))

    def work(self) -> tuple[str, float]:
        blocks = "" if self.encoded is None else " of blocks"
        return f"{self.dataset.name} {self.backbone.name} {self.level}{blocks}", 1


def build(
    spec: FeaturesSpec, worker: WorkerContext, report: Callable[[int, int], None] = ignore
) -> Artifact:
    """Make the CLIP features, or patch tokens, of a whole dataset, of many image files from blocks.

    An image that cannot be decoded is left out of every split.

    Args:
        report: called with the number of finished images and of all images.

    Raises:
        ValueError: too many images cannot be decoded.
    """

    def write(folder: Path) -> dict[str, Any]:
        with worker.unchanged_examples(spec.dataset) as examples:
            parts = np.array([PARTS.index(part) for part in examples.parts], dtype=np.int8)
            if row is None:
                features, bad = encode(spec, examples, range(len(parts)), worker, report)
            else:
                features, bad = read_blocks(row, len(parts), worker, report)
            parts[list(bad)] = PARTS.index("bad")
            name, problems = spec.dataset.name, list(bad.values())
            if problem := too_many_unreadable(name, problems, len(parts), BAD_SHARE):
                raise ValueError(f"{problem}; `airsweep check {name}` opens all")
            arrays = {"features": features, "labels": examples.labels, "parts": parts}
            save_file(arrays, folder / "features.safetensors")
            info = {"images": len(parts) - len(bad), "unreadable": len(bad), "batch": worker.batch}
            unused = _unused(examples, bad) | {"skipped": get_dataset(name).skipped()}
            info |= {kind: value for kind, value in unused.items() if value}
            return info | asdict(read_dataset_text(spec, worker.store))

    row = spec.encoded
    artifact = worker.store.get_or_build(spec, write)
    if row is not None:
        with suppress(PermissionError):  # of another user, whose `cache gc` removes it
            worker.store.row(row).remove()
    return artifact


def _unused(examples: Examples, bad: Mapping[int, str]) -> dict[str, Any]:
    """Paths below the dataset's folder and reasons of the first unreadable images."""
    if not isinstance(examples.images, ImageFiles):
        return {}
    files = examples.images.files
    return {
        "unreadable_files": {
            str(files[i].relative_to(examples.images.home)): why.removeprefix(
                f"{files[i]} cannot be read: "
            )
            for i, why in itertools.islice(bad.items(), LISTED)
        }
    }


@dataclass(frozen=True)
class Target:
    """The features of a dataset by a frozen CLIP, with its split."""

    features: Tensor  # (N, D)
    labels: Tensor  # (N,)
    split: Split
    text: DatasetText
    tokens: Tensor | None = None  # (N, T, V)

    def batch(self, index: Tensor) -> Encoded:
        from air_core.types import Encoded

        return Encoded(self.features[index], None if self.tokens is None else self.tokens[index])

    def labelled(self, index: Tensor) -> Labelled:
        from air_core.types import Labelled

        return Labelled(self.batch(index), self.labels[index])


def read_target(
    spec: FeaturesSpec,
    split: SplitSettings,
    store: ArtifactStore,
    tokens: FeaturesSpec | None = None,
) -> Target:
    """Read the features and the split of a dataset, with patch tokens if a trial needs them.

    Raises:
        MissingArtifact: the features are not made yet.
    """
    text = read_dataset_text(spec, store)
    target = _target(store.get(spec).path / "features.safetensors", split, text)
    if tokens is None:
        return target
    return replace(target, tokens=_tokens(store.get(tokens).path / "features.safetensors"))


@lru_cache(maxsize=1)  # patch tokens are large
def _tokens(path: Path) -> Tensor:
    import torch

    return torch.from_numpy(load_file(path)["features"])


@cache
def _target(path: Path, split: SplitSettings, text: DatasetText) -> Target:
    import torch

    arrays = load_file(path)
    parts = np.array(PARTS)[arrays["parts"]]
    return Target(
        features=torch.from_numpy(arrays["features"]),
        labels=torch.from_numpy(arrays["labels"]),
        split=make_split(arrays["labels"], parts, split),
        text=text,
    )


def known_accuracy(predicted: Tensor, labels: Tensor) -> float | None:
    """Share of right predictions (N,) on the images whose label (N,) is known; None: none is."""
    known = labels != UNKNOWN
    return (predicted == labels)[known].double().mean().item() if bool(known.any()) else None

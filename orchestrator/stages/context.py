"""Context of a worker process: store, data, device, and the CLIP that encodes images.

The driver makes it too, so this module imports torch only where a worker needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from air_core.datasets import Examples, get_dataset
from air_core.datasets.images import ImageFiles
from air_core.settings import Ref
from orchestrator.errors import DamagedArtifact
from orchestrator.plugins import Plugin
from orchestrator.spec.resources import ENCODER_BATCH
from orchestrator.stages.inputs import Contents
from orchestrator.store import ArtifactStore
from orchestrator.store.artifacts import devices
from orchestrator.store.rows import DEATHS, Row

if TYPE_CHECKING:
    from PIL import Image

    from air_core.backbone import Backbone
    from air_core.backbone.clip import Images
    from orchestrator.stages.features import FeaturesSpec
    from orchestrator.stages.synthetic import SyntheticFeaturesSpec

CHANGED = (
    "has changed since the run was planned: its files no longer match the planned digest. Wait "
    "until no process writes to it and run again; the run then uses its new content"
)


class ChangedInput(ValueError):
    """The files of a dataset do not match its planned digest."""


@dataclass(frozen=True)
class WorkerContext:
    """Store, data and device of one worker process."""

    store: ArtifactStore
    data_root: Path | None = None
    device: str = "cpu"
    batch: int = ENCODER_BATCH
    # User and commit of the driver, as environment variables of the worker processes: these have
    # no .git, may run as another user, and may have started before the sweep.
    variables: Mapping[str, str] = field(default_factory=dict, compare=False)
    plugins: tuple[Plugin, ...] = ()
    thrift: int = 0  # how often the device ran out of memory

    def with_thrift(self, thrift: int) -> WorkerContext:
        """The same for a device that ran out of memory so often: each time with half as many images
        in a pass of CLIP, and less memory for diffusion models."""
        return replace(self, batch=max(1, self.batch >> thrift - self.thrift), thrift=thrift)

    def examples(self, dataset: Ref) -> Examples:
        """
        Raises:
            ChangedInput: the dataset's files do not match its digest.
        """
        return _examples(dataset, self.contents)

    @contextmanager
    def unchanged_examples(self, dataset: Ref) -> Iterator[Examples]:
        """Examples, with their files checked before and after the block. Raises as `examples`."""
        examples = self.examples(dataset)
        try:
            yield examples
        finally:  # also after another error, which a file raises that disappears during the block
            _check_content(dataset, self.contents)

    def images(self, dataset: Ref, positions: Sequence[int]) -> list[Image.Image]:
        """Some images. Only their files are checked again, since a dataset may have many.

        Raises:
            ChangedInput: the files of the dataset, or of these images, do not match its digest.
        """
        examples = self.examples(dataset)
        images = [examples.images[i] for i in positions]
        self.check_images(dataset, positions)
        return images

    def check_images(self, dataset: Ref, positions: Sequence[int]) -> None:
        """Check some image files after they were read. Raises as `images`."""
        images = self.examples(dataset).images
        if isinstance(images, ImageFiles):
            files = [images.files[i] for i in positions]
            if not self.contents.has_digests_of(files):
                raise ChangedInput(f"{dataset.name} {CHANGED}")

    def check_ready_images(self, folder: Ref) -> None:
        """
        Raises:
            ChangedInput: the images of a `folder:` generator do not match its digest.
        """
        _check_unchanged(folder, lambda: self.contents.weights_content("generator", folder.name))

    @property
    def contents(self) -> Contents:
        """Datasets and models as their files are now; one object in a process."""
        return _contents(self.store.root / "digests.json", self.data_root)

    def backbone(self, backbone: Ref, precision: str) -> Backbone:
        loaded = _backbone(backbone.name, self.device, precision)
        loaded.at_once = self.batch
        if assigned := devices():
            loaded.threads = max(1, int(assigned["cpu"]))
        return loaded

    def encode(self, images: Images, spec: FeaturesSpec | SyntheticFeaturesSpec) -> np.ndarray:
        """(N, D) features, or (N, T, V) tokens, which are in half precision to save space."""
        backbone = self.backbone(spec.backbone, spec.precision)
        if spec.level == "tokens":
            import torch

            return np.asarray(backbone.image_tokens(images, torch.float16))
        return np.asarray(backbone.encode_images(images))


@dataclass(frozen=True)
class Opened(Sequence[Any]):
    """Some images of a dataset, opened on access: a photograph takes 50 MB."""

    positions: Sequence[int]
    open: Callable[[int], Any]  # given a position

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: Any) -> Any:
        return self.open(self.positions[index])


CONTEXT = 2**29  # bytes of GPU memory that the CUDA context of each process takes


def memory_fraction(gpu: float, total: float) -> float:
    """Fraction of a GPU's memory that a process may allocate beside its CUDA context.

    Args:
        gpu: fraction of a GPU that a trial reserves.
        total: bytes of memory of the GPU.

    >>> memory_fraction(0.25, 80 * 2**30)
    0.24375
    >>> memory_fraction(1, 80 * 2**30)
    1.0
    """
    return max(gpu / 2, gpu - CONTEXT / total) if gpu < 1 else 1.0


def limit_gpu_memory(gpu: float) -> None:
    """Limit this process to its share of the device's memory.

    A process that needs more then fails by itself with an out-of-memory error, and the other
    processes on the device keep theirs.
    """
    import torch

    if not gpu or not torch.cuda.is_available():
        return
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(memory_fraction(gpu, total))


def ignore(done: int, total: int) -> None:
    """The default of `report`: discard the progress."""


def startup_seconds(finished: Sequence[tuple[int, float]], seconds: float) -> float | None:
    """Seconds beyond the training steps, at the pace of the steps after the first; None: unknown.

    Below 0 where a training resumed from steps of another process.

    Args:
        finished: (finished steps, seconds at that time), of some steps in their order.
        seconds: of the whole work.

    >>> startup_seconds([(1, 61.0), (2, 62.0)], 64.0)
    62.0
    """
    if len(finished) < 2:
        return None
    (first, since), (last, until) = finished[0], finished[-1]
    return seconds - last * (until - since) / (last - first)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread, as trials do: sums have one order, so results are reproducible."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def exclusive_shard(row: Row, index: int, block: int, store: ArtifactStore) -> Iterator[bool]:
    """Lock a shard of a row while it is made, by its class or draw and its block.

    The block receives whether the shard exists and can be read; a damaged one is set aside.

    Raises:
        RuntimeError: the shard has killed the last processes that made it.
    """
    with (
        store.locks.exclusive(f"{row.key.digest}-{index}-{block}"),
        # Counted on disk: after each death the cluster would start another process, without end.
        row.count_crashes(index, block) as deaths,
    ):
        if deaths >= DEATHS:
            raise RuntimeError(f"killed its process {deaths} times")
        exists = row.has_shard(index, block)
        try:
            if exists:
                row.read(index, block)
        except DamagedArtifact as damaged:
            store.set_aside(damaged)
            exists = False
        yield exists


_contents = cache(Contents)


@cache
def _examples(dataset: Ref, contents: Contents) -> Examples:
    try:
        return get_dataset(dataset.name).load(contents.data_root)
    finally:  # also after an error, which files raise that change meanwhile
        _check_content(dataset, contents)


def _check_content(dataset: Ref, contents: Contents) -> None:
    _check_unchanged(dataset, lambda: contents.dataset_content(get_dataset(dataset.name)))


def _check_unchanged(planned: Ref, read: Callable[[], Ref]) -> None:
    try:
        current = read()
    except ValueError as problem:  # for example, a folder has no images any more
        raise ChangedInput(f"{planned.name} {CHANGED} ({problem})") from None
    if current.digest != planned.digest:
        raise ChangedInput(f"{planned.name} {CHANGED}")


@cache
def _backbone(name: str, device: str, precision: str) -> Backbone:
    from air_core.backbone.loading import load_backbone

    return load_backbone(name, device, precision)

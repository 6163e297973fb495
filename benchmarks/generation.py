"""Images per second of two generator actors, compared with the bare pipeline.

Baselines, with the tiny pipeline without LoRA and one thread per process:
- *bare*: two processes draw half of the blocks each with `PipelineGenerator` and store nothing;
- *loop*: two processes call a diffusers pipeline for one image at a time.

*ours* is `execution._queue.WorkQueue` on a local Ray with two actors, which it gives blocks; each
block is drawn, checked for blank images, encoded by CLIP, and written as parquet and
safetensors. Rates count from the first complete block of each process to its last block, which
excludes start-up. The duration of the start is printed separately.

    python benchmarks/generation.py [--images 64] [--repeats 3] [--device cpu]

It takes some minutes on two cores, on which nothing else should run. The last line is JSON: `ratio`
is the rate of *ours* divided by *bare*, `loop_ratio` that of *ours* divided by *loop*; both are
medians over the repeats, which alternate between the three.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

from air_core.tools.captions import text_of
from benchmarks.harness import options, progress, report
from orchestrator.planning import Requirement, Resolver
from orchestrator.spec import presets
from orchestrator.stages import SyntheticFeaturesSpec

PROCESSES = 2
Shard = tuple[int, int]


def image_row(images: int, folder: Path) -> Requirement:
    """A row with `images` images of each digit, drawn by the tiny pipeline."""
    settings = {"dataset": "digits", "generator": "tiny", "images_per_class": images}
    flat = {**presets.defaults("air", settings), **settings}
    flat = {key: value for key, value in flat.items() if not key.startswith("lora.")}
    trial = Resolver(folder / "digests.json", None).trial({**flat, "lora": None})
    row = trial.synthetic_features
    assert isinstance(row, SyntheticFeaturesSpec)
    return Requirement(row, images, tuple(range(len(row.images.classnames))))


# ---------------------------------------------------------------- baselines


def bare(requirement: Requirement, shards: Sequence[Shard], device: str, queue: Any) -> None:
    """One process of *bare*; puts (time, images) of each block into the queue."""
    generator, names, size = _opened(requirement, device)
    for c, block in shards:
        indices = list(range(block * size, (block + 1) * size))
        generator.generate(names[c], indices, [0] * size)
        queue.put((time.time(), size))
    queue.put(None)


def loop(requirement: Requirement, shards: Sequence[Shard], device: str, queue: Any) -> None:
    """One process of *loop*; puts (time, images) of each block into the queue."""
    import torch

    generator, names, size = _opened(requirement, device)
    settings = requirement.spec.images.settings  # type: ignore[union-attr]
    pipeline = generator.pipeline
    for c, block in shards:
        for index in range(block * size, (block + 1) * size):
            pipeline(
                text_of(settings.template, names[c], index),
                height=settings.size,
                width=settings.size,
                num_inference_steps=settings.num_inference_steps,
                guidance_scale=settings.guidance_scale,
                generator=torch.Generator("cpu").manual_seed(index),
                output_type="np",
            )
        queue.put((time.time(), size))
    queue.put(None)


def _opened(requirement: Requirement, device: str) -> tuple[Any, Sequence[str], int]:
    import torch

    from air_core.diffusion.pipeline import PipelineGenerator
    from orchestrator.stages.inputs import images_folder

    torch.set_num_threads(1)
    images = requirement.spec.images  # type: ignore[union-attr]
    folder = images_folder(images.model.name)
    generator = PipelineGenerator(folder, images.settings, device=device)
    return generator, images.classnames, images.block_size


def processes(
    work: Callable[..., None], requirement: Requirement, device: str
) -> tuple[float, float]:
    """Images per second of two parallel processes, and seconds until both had a block."""
    spawn = multiprocessing.get_context("spawn")
    shards = requirement.shards()
    queues = [spawn.Queue() for _ in range(PROCESSES)]
    began = time.time()
    running = [
        spawn.Process(target=work, args=(requirement, shards[at::PROCESSES], device, queue))
        for at, queue in enumerate(queues)
    ]
    for one in running:
        one.start()
    runs = [list(iter(queue.get, None)) for queue in queues]
    for one in running:
        one.join()
    return _rate(runs), max(times[0][0] for times in runs) - began


def _rate(runs: Sequence[Sequence[tuple[float, int]]]) -> float:
    """Sum of the rates of all processes, each from its first block to its last."""
    return sum(sum(size for _, size in times[1:]) / (times[-1][0] - times[0][0]) for times in runs)


# ---------------------------------------------------------------- ours


class Listener:
    """Records the time at which each block was complete."""

    def __init__(self) -> None:
        self.blocks: list[tuple[float, int]] = []
        self.pool: Any = None

    def on_prepared(self, requirement: Requirement, seconds: float, facts: dict[str, Any]) -> None:
        self.blocks.append((time.time(), int(facts["drawn"] + facts["holes"])))

    def on_pool_closed(self, pool: Any) -> None:
        self.pool = pool


def ours(requirement: Requirement, device: str) -> tuple[float, float, float]:
    """Images per second of two actors, seconds until the first block, and their busy fraction."""
    from orchestrator.cluster.session import machines
    from orchestrator.execution._allocation import Allocation
    from orchestrator.execution._progress import ProgressMonitor
    from orchestrator.execution._queue import WorkQueue
    from orchestrator.execution._stream import Workers
    from orchestrator.spec import Resources
    from orchestrator.spec.resources import GeneratorResources
    from orchestrator.stages.context import WorkerContext
    from orchestrator.store import ArtifactStore

    gpu = 1 / PROCESSES if device != "cpu" else 0
    resources = Resources(generator=GeneratorResources(actors=PROCESSES, gpu=gpu))
    listener = Listener()
    with tempfile.TemporaryDirectory() as folder:
        worker = WorkerContext(ArtifactStore(Path(folder)), device=device)
        began = time.time()
        allocation = Allocation(resources, machines)
        workers = Workers(worker, resources, ProgressMonitor().actor)
        queue = WorkQueue([requirement], workers, allocation, listener)
        while not queue.is_over:
            queue.take()
            queue.begin()
            time.sleep(0.01)
        assert not requirement.missing(worker.store)
    # Blocks do not name their actor: count the rate of both from the second block, when
    # both have started.
    times = listener.blocks[1:]
    rate = sum(size for _, size in times[1:]) / (times[-1][0] - times[0][0])
    busy = listener.pool.busy / (listener.pool.actors * (times[-1][0] - began))
    return rate, listener.blocks[0][0] - began, busy


def main() -> None:
    args = options(__doc__, images=64, repeats=3, device="cpu")

    from orchestrator.cluster import ray_session

    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, ray_session():
        requirement = image_row(args.images, Path(folder))
        few = Requirement(
            requirement.spec, max(16, args.images // 4), requirement.classes
        )  # fewer images, since the loop is slow
        for repeat in range(args.repeats):
            figures = {}
            figures["bare"], figures["bare_start"] = processes(bare, requirement, args.device)
            figures["ours"], figures["ours_start"], figures["busy"] = ours(requirement, args.device)
            figures["loop"], _ = processes(loop, few, args.device)
            for name, value in figures.items():
                found.setdefault(name, []).append(value)
            progress(repeat, *(f"{name} {value:.2f}" for name, value in figures.items()))
    ratios = {
        name: [a / b for a, b in zip(found["ours"], found[name], strict=True)]
        for name in ("bare", "loop")
    }
    report(
        "generation",
        statistics.median(ratios["bare"]),
        "two bare processes of the same pipeline, images per second",
        loop_ratio=statistics.median(ratios["loop"]),
        ratios=ratios,
        images_per_second=found,
        images=args.images * 10,
        device=args.device,
    )


if __name__ == "__main__":
    main()

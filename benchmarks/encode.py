"""Images per second of the CLIP features of a dataset of JPEG files, on two cores.

Baseline: a plain torch `DataLoader` with two workers that feeds the same tower, with the same
preprocessing and batches. *ours* is `WorkerContext.encode` with two threads that open images, as in
a task with two CPUs. The tower has one thread in both, and both give the same bits.

*row* is the whole work of a run with one CPU per encoder: `execution._prepare.prepare` on a local
Ray, where two actors encode blocks and store them, and a task puts them together; *pool* is the
part of the actors. Both include the start of processes.

    python benchmarks/encode.py [--images 5000] [--repeats 3] [--skip-row]

The model is the tiny CLIP, so that opening images takes most of the time; the images have 500 x 375
px. It takes some minutes on two cores, on which nothing else should run. The last line is JSON:
`ratio` is the rate of *ours* divided by the baseline's, the median over the repeats; `ratio_cpu` is
that of images per second of processor time, for a shared machine.
"""

from __future__ import annotations

import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from air_core.datasets.images import ImageFiles
from air_core.specs import FeaturesSpec
from benchmarks.harness import options, progress, report
from orchestrator.planning import Resolver, requirements_of
from orchestrator.stages.context import WorkerContext
from orchestrator.store import ArtifactStore
from orchestrator.store.artifacts import DEVICES

CORES = 2
SIZE = (500, 375)


def write_images(folder: Path, count: int) -> list[Path]:
    """JPEG files in two class folders."""
    rng, files = np.random.default_rng(0), []
    for number in range(count):
        file = folder / ("cat", "dog")[number % 2] / f"{number:05}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (47, 63, 3), dtype=np.uint8))
        coarse.resize(SIZE, Image.Resampling.BICUBIC).save(file, quality=90)
        files.append(file)
    return sorted(files)


class Photos(Dataset[torch.Tensor]):
    def __init__(self, files: Sequence[Path], preprocess: Any) -> None:
        self.files, self.preprocess = files, preprocess

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        pixels: torch.Tensor = self.preprocess(Image.open(self.files[index]).convert("RGB"))
        return pixels


@torch.no_grad()
def by_loader(files: Sequence[Path], worker: WorkerContext, spec: FeaturesSpec) -> np.ndarray:
    backbone = worker.backbone(spec.backbone, spec.precision)
    photos = Photos(files, backbone.preprocess)
    loader = DataLoader(photos, batch_size=worker.batch, num_workers=CORES)
    features = [backbone.model.encode_image(pixels, normalize=True) for pixels in loader]
    return np.asarray(torch.cat(features))


def by_threads(files: Sequence[Path], worker: WorkerContext, spec: FeaturesSpec) -> np.ndarray:
    return worker.encode(ImageFiles(tuple(files)), spec)


def cpu_seconds() -> float:
    """Processor time of this process and of the workers that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


class Listener:
    """Keeps the statistics of the pool."""

    pool: Any = None

    def on_prepared(self, requirement: Any, seconds: float, facts: dict[str, Any]) -> None:
        pass

    def on_failed(self, requirement: Any, failure: Any) -> None:
        raise RuntimeError(failure.message)

    def on_retried(self, requirement: Any, failure: Any) -> None:
        progress(failure.message)

    def on_pool_closed(self, pool: Any) -> None:
        self.pool = pool
        progress(pool)


def by_row(images: int, store: ArtifactStore, spec: FeaturesSpec) -> tuple[float, float]:
    """Images per second of the whole row, and of its pool."""
    from orchestrator.cluster import ray_session
    from orchestrator.cluster.session import machines
    from orchestrator.execution._allocation import Allocation
    from orchestrator.execution._prepare import prepare
    from orchestrator.execution._progress import ProgressMonitor
    from orchestrator.execution._state import PreparationContext
    from orchestrator.planning import Requirement
    from orchestrator.spec import Resources

    resources, listener = Resources(), Listener()
    with ray_session():
        began = time.perf_counter()
        allocation, actor = Allocation(resources, machines), ProgressMonitor().actor
        context = PreparationContext(WorkerContext(store), resources, listener, allocation, actor)
        needed = [Requirement(*each) for each in spec.inputs((), 0)]
        for _ in prepare([*needed, Requirement(spec)], context):
            time.sleep(0.01)
        seconds = time.perf_counter() - began
    return images / seconds, listener.pool.images / listener.pool.seconds


def main() -> None:
    args = options(__doc__, images=5000, repeats=3, skip_row=False)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    torch.set_num_threads(1)
    rates: dict[str, list[float]] = {name: [] for name in ("loader", "ours")}
    cpu_rates: dict[str, list[float]] = {name: [] for name in rates}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        files = write_images(home / "photos", args.images)
        store = ArtifactStore(home / "store")
        resolver = Resolver(store.root / "digests.json", None)
        trial = resolver.trial({"dataset": f"folder:{home / 'photos'}", "images_per_class": 0})
        [*_, spec] = [one.spec for one in requirements_of([trial]) if one.stage == "features"]
        assert isinstance(spec, FeaturesSpec)
        os.environ[DEVICES] = f'{{"cpu": {CORES}}}'
        worker = WorkerContext(store)
        worker.encode([Image.new("RGB", SIZE)], spec)  # load CLIP
        for _ in range(args.repeats):
            features = []
            for name, encode in (("loader", by_loader), ("ours", by_threads)):
                began, busy = time.perf_counter(), cpu_seconds()
                features.append(encode(files, worker, spec))
                rates[name].append(len(files) / (time.perf_counter() - began))
                cpu_rates[name].append(len(files) / (cpu_seconds() - busy))
                progress(name, f"{rates[name][-1]:.1f} images per second")
            assert np.array_equal(*features), "the features differ"
        del os.environ[DEVICES]
        if not args.skip_row:
            if spec.encoded is None:
                raise SystemExit(f"--images {args.images} are too few for a row; use --skip-row")
            whole, pool = by_row(len(files), store, spec)
            rates |= {"row": [whole], "pool": [pool]}
    ratios, ratios_cpu = (
        [ours / base for ours, base in zip(of["ours"], of["loader"], strict=True)]
        for of in (rates, cpu_rates)
    )
    report(
        "encode",
        statistics.median(ratios),
        f"a torch DataLoader with {CORES} workers and the same tower, tiny CLIP, JPEG of 500 x 375 "
        f"px, {CORES} cores",
        ratio_cpu=statistics.median(ratios_cpu),
        ratios=ratios,
        images_per_s=rates,
        images_per_cpu_s=cpu_rates,
        images=args.images,
    )


if __name__ == "__main__":
    main()

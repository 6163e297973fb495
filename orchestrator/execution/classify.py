"""Classifies many images with a bundle on the machines of a Ray cluster, by Ray Data.

The list of files is cut into blocks, and each block becomes one Parquet file of a folder. A block
does not depend on which actor classifies it, nor on Ray's own blocks. Its file is renamed into
place when it is complete, so that the same command after a kill classifies only missing blocks.

Importing this module does not import Ray: a command without missing blocks starts no cluster.
"""

from __future__ import annotations

import hashlib
import json
import math
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from air_core.bundle import load_bundle, read_bundle
from orchestrator.cluster import ray_session
from orchestrator.cluster.session import quiet_data_context
from orchestrator.errors import Refused
from orchestrator.files import make_folders, write_atomic
from orchestrator.formatting import plural
from orchestrator.planning import Machine
from orchestrator.reporting.classified import Row, classified_rows, write_table

if TYPE_CHECKING:
    import numpy as np
    import ray

    from air_core.bundle.classifier import Bundle

BLOCK = 512  # images of a file: a multiple of the bundle's batches
MANIFEST = "_classify.json"  # readers of Parquet folders skip names that begin with _ or .
CPUS = 4  # of an actor: CPU inference gains little from more
GPU_CPUS = 16  # the largest number of CPUs of an actor with a GPU, which open images
MAX_TRIES = 3  # of a block that kills its process, for example by an image that needs much memory


@dataclass(frozen=True)
class ClassifyJob:
    """Images to classify, and the folder of their tables. All paths are absolute.

    Args:
        bundle, weights, device, classifier, min_probability, runtime: arguments of `load_bundle`.
        names: columns of the table.
        files: image files, in order.
        true: classes of the files that have one.
        folder: one Parquet file per block, `part-00000.parquet` and so on.
    """

    bundle: Path
    weights: str | None
    device: str
    classifier: str | None
    min_probability: float
    runtime: str
    names: tuple[str, ...]
    files: Sequence[Path]
    true: Mapping[Path, str]
    folder: Path

    @property
    def blocks(self) -> int:
        return math.ceil(len(self.files) / BLOCK)

    def block(self, index: int) -> list[tuple[str, str | None]]:
        """Files of a block, with their classes."""
        files = self.files[index * BLOCK : (index + 1) * BLOCK]
        return [(str(file), self.true.get(file)) for file in files]

    def part(self, index: int) -> Path:
        return self.folder / f"part-{index:05}.parquet"

    def tries(self, index: int) -> Path:
        """A file with one byte for each process that has begun the block and not ended it."""
        return self.folder / f".part-{index:05}.tries"

    def missing(self) -> list[int]:
        return [index for index in range(self.blocks) if not self.part(index).exists()]


def classify_on_ray(job: ClassifyJob) -> Iterator[int]:
    """Classify the missing blocks of a folder; yields the index of each block that exists.

    Raises:
        ValueError: the folder has results of another job, or a machine lacks the bundle, the
            images, the folder or a GPU.
        Refused: the cluster cannot be joined, or it lost blocks.
        RuntimeError: a block failed.
    """
    _claim_folder(job)
    missing = job.missing()
    yield from sorted({*range(job.blocks)} - {*missing})
    if not missing:
        return
    for index in missing:
        job.tries(index).unlink(missing_ok=True)
    with ray_session() as machines:
        pool = _pool(machines, job.device, len(missing))
        for done in _stream(job, missing, pool).iter_rows():
            if done["error"]:
                kind = ValueError if done["by_user"] else RuntimeError
                raise kind(f"block {done['block']} of {job.folder} failed: {done['error']}")
            yield done["block"]
    if lost := job.missing():
        raise Refused(
            f"the cluster lost {plural(len(lost), 'block')} of {job.folder}, the first {lost[0]}; "
            "the same command classifies them again"
        )


def _claim_folder(job: ClassifyJob) -> None:
    """Create the folder with a description of the job, or compare it with the existing one."""
    listed = json.dumps([job.block(index) for index in range(job.blocks)]).encode()
    # Keys with the sentence for a folder that differs.
    about = {
        "bundle": (read_bundle(job.bundle).content["digest"], "another bundle"),
        "files": (hashlib.sha256(listed).hexdigest(), "another list of images or true classes"),
        "classifier": (job.classifier, "another --classifier"),
        "min_probability": (job.min_probability, "another --min-probability"),
        "columns": ([*job.names], "another number of classes per image (--topk)"),
    }
    content = {name: value for name, (value, _) in about.items()}
    file = job.folder / MANIFEST
    remedy = "give another -o, or remove the folder"
    if job.folder.exists() and not job.folder.is_dir():
        raise ValueError(
            f"{job.folder} is a file, but on Ray -o is a folder; give another -o, or remove it"
        )
    if file.exists():
        try:
            found = dict(json.loads(file.read_bytes()))
        except (TypeError, ValueError):
            raise ValueError(f"{file} is damaged; {remedy}") from None
        for name, (value, other) in about.items():
            if found.get(name) != value:
                raise ValueError(f"{job.folder} has the results of {other}; {remedy}")
    elif job.folder.exists() and any(job.folder.iterdir()):
        raise ValueError(
            f"{job.folder} has files, but no {MANIFEST} of `airsweep classify`; {remedy}"
        )
    else:
        make_folders(job.folder)
        write_atomic(file, json.dumps(content, indent=1) + "\n")


@dataclass(frozen=True)
class _Pool:
    """Number of actors, and the CPUs and GPUs of each."""

    actors: int
    cpus: int
    gpus: int


def _pool(machines: Sequence[Machine], device: str, blocks: int) -> _Pool:
    """A pool that fills the cluster.

    Raises:
        ValueError: no machine has the device.
    """
    if device.startswith("cuda"):
        hosts = [machine for machine in machines if machine.get("GPU", 0) >= 1]
        if not hosts:
            raise ValueError(
                f"no machine of the cluster has a GPU for --device {device}; cpu works"
            )
        actors = sum(int(host["GPU"]) for host in hosts)
        cpus = min(GPU_CPUS, *(int(host.get("CPU", 0) / host["GPU"]) for host in hosts))
        return _Pool(min(actors, blocks), cpus, 1)
    hosts = [machine for machine in machines if machine.get("CPU", 0) >= 1]
    if not hosts:
        raise ValueError("no machine of the cluster has a CPU for Ray's processes")
    cpus = min(CPUS, *(int(host["CPU"]) for host in hosts))
    return _Pool(min(sum(int(host["CPU"] // cpus) for host in hosts), blocks), cpus, 0)


def _stream(job: ClassifyJob, blocks: Sequence[int], pool: _Pool) -> ray.data.Dataset:
    import ray

    items = [{"block": index, "files": json.dumps(job.block(index))} for index in blocks]
    with quiet_data_context():
        return ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            ClassifierActor,
            fn_constructor_args=(replace(job, files=(), true={}), pool.cpus),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=pool.actors),
            num_cpus=pool.cpus,
            num_gpus=pool.gpus,
        )


class ClassifierActor:
    """One actor of the pool. It loads the bundle once.

    Args:
        job: without its files, which come with the blocks.
        cpus: threads of torch, and threads that open images.
    """

    def __init__(self, job: ClassifyJob, cpus: int) -> None:
        self.job, self.cpus = job, cpus
        self.bundle: Bundle | None = None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        index, error, by_user = int(batch["block"][0]), "", False
        try:
            self._classify(index, json.loads(batch["files"][0]))
        except Exception as problem:  # returned as data: an exception would restart the actor
            by_user = isinstance(problem, ValueError)
            error = str(problem) if by_user else f"{type(problem).__name__}: {problem}"
        return {"block": [index], "error": [error], "by_user": [by_user]}

    def _classify(self, index: int, block: Sequence[tuple[str, str | None]]) -> None:
        files = [Path(file) for file, _ in block]
        self._check_shared(files)
        self._count_try(index)
        true = {Path(file): name for file, name in block if name is not None}
        rows = classified_rows(self._loaded(), files, true, self.job.names)
        write_table(self.job.part(index), self.job.names, rows)
        self.job.tries(index).unlink(missing_ok=True)

    def _check_shared(self, files: Sequence[Path]) -> None:
        """Refuse a machine without the folders: there, all images would count as unreadable."""
        manifest = self.job.folder / MANIFEST
        for path, seen in (
            (self.job.bundle, self.job.bundle.exists()),
            (manifest, manifest.exists()),
            (files[0], any(file.exists() for file in files)),
        ):
            if not seen:
                raise ValueError(
                    f"{path} does not exist on the machine {socket.gethostname()}; bundle, images "
                    "and -o must be in folders that all machines of the cluster share"
                )

    def _count_try(self, index: int) -> None:
        # Ray Data runs a block again for ever if it kills its process.
        with open(self.job.tries(index), "ab") as handle:
            if handle.tell() >= MAX_TRIES:
                first, last = index * BLOCK + 1, (index + 1) * BLOCK
                raise RuntimeError(
                    f"images {first:,} to {last:,} of the list killed {MAX_TRIES} processes; an "
                    "image that needs too much memory can do this: remove it, or give the actors "
                    "more memory"
                )
            handle.write(b"x")

    def _loaded(self) -> Bundle:
        if self.bundle is None:
            import torch

            torch.set_num_threads(max(1, self.cpus))
            job = self.job
            self.bundle = load_bundle(
                job.bundle,
                job.weights,
                job.device,
                job.classifier,
                job.min_probability,
                job.runtime,
            )
        return self.bundle


def rows_of(job: ClassifyJob) -> Iterator[Row]:
    """Columns `class`, `true` and `error` of all rows, in order."""
    import pyarrow.parquet as pq

    names = [name for name in ("class", "true", "error") if name in job.names]
    for index in range(job.blocks):
        yield from pq.read_table(job.part(index), columns=names).to_pylist()

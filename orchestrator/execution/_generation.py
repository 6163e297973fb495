"""Missing image blocks, drawn by a pool of generator actors on Ray Data.

A shard is a class and a block, never a Ray block: which actor draws it changes no pixel. Images
and their CLIP features are made in one stream, and each shard is renamed into place when whole,
so that a killed generation goes on where it stopped.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import ray
from ray.data import ActorPoolStrategy, DataContext

from air_core.specs import SyntheticFeaturesSpec
from orchestrator.cluster.session import note_devices
from orchestrator.execution._allocation import Context, Pool
from orchestrator.execution._progress import Note
from orchestrator.failures import CLASSES, Failure, classify
from orchestrator.keys import artifact_key
from orchestrator.planning import Requirement, name_of
from orchestrator.redact import redacted
from orchestrator.spec.sweep import GeneratorResources
from orchestrator.stages.context import WorkerContext, keep_to_share
from orchestrator.stages.image_rows import DEATHS, build_image_block, open_generator
from orchestrator.store.artifacts import devices

THRIFT = 2  # the most that a generator can save


class Generate:
    """One actor: one generator at a time, switched when the row changes."""

    def __init__(
        self, rows: Sequence[SyntheticFeaturesSpec], worker: WorkerContext, board: Any
    ) -> None:
        import torch

        torch.set_num_threads(1)  # one actor a core; more threads would fight
        note_devices()
        keep_to_share(devices().get("gpu", 0.0))
        self.rows, self.worker = rows, worker
        self.notes = [Note(board, name_of(artifact_key(spec.images))) for spec in rows]
        self.open: tuple[int, Any] | None = None
        self.thrift = 0  # how much memory is saved for time, see diffusion.pipeline
        self.startup = 0.0  # seconds in which models were loaded for the block in hand

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        row, c, block = (int(batch[name][0]) for name in ("row", "class", "block"))
        started, self.startup = time.monotonic(), 0.0
        error = name = ""
        drawn: dict[str, float] = {"drawn": 0, "redrawn": 0, "holes": 0, "on_device": 0.0}
        spec = self.rows[row]
        self.worker.store.locks.on_wait = self.notes[row].waits
        try:
            drawn = self._drawn(spec, row, c, block)
        except Exception as problem:  # told to the driver as data: an exception ends the stream
            error = redacted(f"{type(problem).__name__}: {problem}")  # here, where its secrets are
            name = classify(problem)
        return {
            "row": [row],
            "class": [c],
            "block": [block],
            "error": [error],
            "failure_class": [name],
            "seconds": [time.monotonic() - started],
            "startup": [self.startup],
            **{name: [count] for name, count in (drawn | devices()).items()},
        }

    def _drawn(self, spec: SyntheticFeaturesSpec, row: int, c: int, block: int) -> dict[str, float]:
        """A block; with less memory where there is too little. Its size is part of its key."""
        while True:
            try:
                worker = self.worker.with_less(self.thrift)
                return build_image_block(spec, c, block, worker, lambda: self._generator(row))
            except Exception as problem:
                if classify(problem) != "oom" or self.thrift == THRIFT:
                    raise
                self.thrift, self.open = self.thrift + 1, None  # of this actor from now on

    def _generator(self, row: int) -> Any:
        if self.open is None or self.open[0] != row:
            started, spec = time.monotonic(), self.rows[row]
            self.open = None  # one LoRA at a time: free the last before the next is loaded
            self.open = (row, open_generator(spec.images, self.worker, self.thrift))
            self.worker.backbone(spec.backbone, spec.precision)  # encodes the block
            self.startup += time.monotonic() - started
        return self.open[1]


# Seconds that another pool has to save to be opened: until its actors draw, a minute may pass.
PAYS = 60.0
# Blocks that one pool draws: Ray Data takes 8 kB of the driver for each before it begins.
POOL = 20_000


def draw(
    requirements: Sequence[Requirement], context: Context
) -> Generator[None, None, list[tuple[Requirement, Failure]]]:
    """Draw the missing blocks of some rows; what could not be drawn, after all others were tried.

    A coroutine: it yields while it waits for the cluster.

    The pool is opened anew where trials come that need room, or go and leave some: a block that is
    whole stays, so that costs what the actors have in hand.
    """
    drawing = _Drawing(requirements, context)
    while left := drawing.left():
        if context.allocation.pool():
            yield from drawing.draw(left)
            context.worker.store.refresh_listings()
        else:
            yield
    return [
        (requirement, _failure(drawing.errors.get(requirement, []), lacks))
        for requirement in requirements
        if (lacks := len(requirement.missing(context.worker.store)))
    ]


class _Drawing:
    """Shards of some rows, until each is drawn or was tried."""

    def __init__(self, requirements: Sequence[Requirement], context: Context) -> None:
        self.requirements, self.worker, self.watcher = requirements, context.worker, context.watcher
        self.allocation, self.board = context.allocation, context.board
        self.want = context.resources.generator
        self.errors: dict[Requirement, list[tuple[str, str]]] = {}
        self.tried: set[tuple[int, int, int]] = set()  # row, class, block
        self.over = False

    def left(self) -> list[dict[str, int]]:
        if self.over:
            return []
        missing = (
            {"row": row, "class": c, "block": block}
            for row, requirement in enumerate(self.requirements)
            for c, block in requirement.missing(self.worker.store)
            if (row, c, block) not in self.tried
        )
        return list(itertools.islice(missing, POOL))

    def draw(self, shards: Sequence[dict[str, int]]) -> Iterator[None]:
        """Draw until there is nothing left, or another pool is worth its start."""
        began, count, spent = time.monotonic(), 0, 0.0
        beside_trials = self.allocation.tuning
        pool = Pool(actors=min(self.allocation.pool(), len(shards)), gpu=bool(self.want.gpu))
        rows = [requirement.spec for requirement in self.requirements]
        self.allocation.wide = not beside_trials
        reader = _Reader(
            partial(_stream, shards, rows, self.worker, self.want, pool.actors, self.board)
        )
        while (result := (yield from reader.next())) is not None:
            self._note(result)
            count, spent = count + 1, spent + result["seconds"]
            pool.images += result["drawn"]
            pool.busy += result["on_device"]
            left = (len(shards) - count) * spent / count
            if self.over or (count < len(shards) and self._elsewhere(pool, beside_trials, left)):
                reader.close()
        if reader.closed:
            self._forgive(shards, 4 * pool.actors)
        else:  # what is missing now was lost, or has failed
            self.tried.update((s["row"], s["class"], s["block"]) for s in shards)
        self.allocation.wide = False
        pool.seconds = time.monotonic() - began
        self.watcher.drew(pool)

    def _forgive(self, shards: Sequence[dict[str, int]], most: int) -> None:
        """Actors are ended with a block in hand: no block has killed them."""
        self.worker.store.refresh_listings()
        missing = {
            row: set(requirement.missing(self.worker.store))
            for row, requirement in enumerate(self.requirements)
        }
        left = (s for s in shards if (s["class"], s["block"]) in missing[s["row"]])
        for shard in itertools.islice(left, most):  # they are handed out in order
            spec = self.requirements[shard["row"]].spec
            assert isinstance(spec, SyntheticFeaturesSpec)
            row = self.worker.store.open_row(spec.images)
            row.reset_crashes(shard["class"], shard["block"], DEATHS)

    def _note(self, result: dict[str, Any]) -> None:
        requirement = self.requirements[result["row"]]
        if not result["error"]:
            self.watcher.prepared(requirement, result["seconds"], result)
            return
        self.tried.add((result["row"], result["class"], result["block"]))
        assert isinstance(requirement.spec, SyntheticFeaturesSpec)
        name = requirement.spec.images.classnames[result["class"]]
        said = f"{name}, block {result['block']}: {result['error']}"
        self.errors.setdefault(requirement, []).append((result["failure_class"], said))
        # What would be drawn from now on would be drawn for nothing.
        self.over = CLASSES[result["failure_class"]].stops_after == 1

    def _elsewhere(self, pool: Pool, beside_trials: bool, left: float) -> bool:
        """Is another pool worth its start? One that is in the way of trials goes in any case.

        Args:
            left: seconds of work for one actor.
        """
        if self.allocation.tuning == beside_trials:
            return False
        now = self.allocation.pool()
        if not beside_trials:
            return now < pool.actors
        return left * (1 / pool.actors - 1 / max(now, 1)) > PAYS


class _Reader:
    """Reads a stream of Ray Data on a thread: to read it blocks, and the driver has other work.

    Its thread does not outlive the process: the driver may be stopped at any time.
    """

    def __init__(self, stream: Callable[[], ray.data.Dataset]) -> None:
        self.closed = False
        self._rows: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self._problem: BaseException | None = None
        self._thread = threading.Thread(target=self._read, args=(stream,), daemon=True)
        self._thread.start()

    def _read(self, stream: Callable[[], ray.data.Dataset]) -> None:
        try:
            rows = iter(stream().iter_rows())
            for row in rows:
                self._rows.put(row)
                if self.closed:
                    rows.close()
                    return
        except BaseException as problem:
            self._problem = problem

    def next(self) -> Generator[None, None, dict[str, Any] | None]:
        """A row; None: that was all. A coroutine.

        Raises:
            Exception: what the stream has raised.
        """
        while True:
            over = not self._thread.is_alive()
            try:
                return self._rows.get_nowait()
            except Empty:
                if over and self._problem is not None:
                    raise self._problem from None
                if over:
                    return None
                yield

    def close(self) -> None:
        """Stop after the next row."""
        self.closed = True


def _stream(
    shards: Sequence[dict[str, int]],
    rows: Sequence[Any],
    worker: WorkerContext,
    want: GeneratorResources,
    actors: int,
    board: Any,
) -> ray.data.Dataset:
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    device = "cuda" if want.gpu else "cpu"
    with DataContext.current(context):
        return ray.data.from_items(list(shards), override_num_blocks=len(shards)).map_batches(
            Generate,
            fn_constructor_args=(rows, replace(worker, device=device), board),
            batch_size=1,
            compute=ActorPoolStrategy(size=actors),
            num_cpus=want.cpu,
            num_gpus=want.gpu,
            resources=dict(want.custom) or None,
        )


def _failure(errors: Sequence[tuple[str, str]], left: int) -> Failure:
    said = [text for _, text in errors[:3]] or ["they were lost by the cluster; run again"]
    names = [name for name, _ in errors] or ["infra"]
    blocks = "1 block is" if left == 1 else f"{left} blocks are"
    return Failure(max(set(names), key=names.count), f"{blocks} missing; {'; '.join(said)}")

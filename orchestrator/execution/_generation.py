"""Makes missing shards of rows on a pool of actors with the diffusion model or CLIP, by Ray Data.

A shard is one block of images of a class, one draw of denoising errors of a block of pool images,
or the features of a block of real images. Its content does not depend on which actor makes it, nor
on Ray's own blocks. Each shard is renamed into place when it is complete, so that a killed
generation resumes with the missing ones.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np

from orchestrator.cluster.session import prepare_worker, quiet_data_context
from orchestrator.execution._allocation import MAX_POOL_WAIT, PoolStatistics
from orchestrator.execution._progress import ProgressReporter, report_working
from orchestrator.execution._state import PreparationContext
from orchestrator.failures import CLASSES, Failure, classify
from orchestrator.keys import RowSpec
from orchestrator.planning import Requirement, artifact_title
from orchestrator.planning.estimate import estimate, stage_work
from orchestrator.redact import redact
from orchestrator.stages import stage_module
from orchestrator.stages.context import WorkerContext, limit_gpu_memory
from orchestrator.store import ArtifactStore
from orchestrator.store.artifacts import devices

if TYPE_CHECKING:
    from ray.data import Dataset

MAX_THRIFT = 2  # lacks of memory after which a shard fails


class GeneratorActor:
    """One actor of a pool. It keeps one generator loaded and replaces it when the row changes."""

    def __init__(
        self, requirements: Sequence[Requirement], worker: WorkerContext, progress_actor: Any
    ) -> None:
        import torch  # not in the driver, which does not compute

        torch.set_num_threads(1)  # one actor a core; more threads would compete for it
        prepare_worker(worker.variables, worker.plugins)
        limit_gpu_memory(devices().get("gpu", 0.0))
        self.specs, self.worker = [requirement.spec for requirement in requirements], worker
        self.progress_actor = progress_actor
        self.titles = [artifact_title(requirement.key) for requirement in requirements]
        self.loaded: tuple[int, Any] | None = None  # row, generator or scorer
        self.startup = 0.0  # seconds of loading models for the current block

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Make the shards of a batch, `_together`; a column for each field of `_result`."""
        made = [self._result(*shard) for shard in json.loads(batch["shards"][0])]
        return {name: [each[name] for each in made] for name in made[0]}

    def _result(self, row: int, c: int, block: int) -> dict[str, Any]:
        """Make a shard; returns what became of it."""
        started, self.startup = time.monotonic(), 0.0
        error = failure_class = ""
        counts: dict[str, Any] = dict(NO_COUNTS)
        waits = ProgressReporter(self.progress_actor, self.titles[row])
        self.worker.store.locks.on_wait = waits.report_wait
        try:
            with report_working(self.progress_actor):
                counts |= self._make(row, c, block)
        except Exception as problem:  # returned as data: an exception would end the stream
            # Redacted in this process, which knows the secrets.
            error = redact(f"{type(problem).__name__}: {problem}")
            failure_class = classify(problem)
        return {
            **{"row": row, "class": c, "block": block},
            **{"error": error, "failure_class": failure_class},
            **{"seconds": time.monotonic() - started, "startup": self.startup},
            **counts,
            **devices(),
        }

    def _make(self, row: int, c: int, block: int) -> dict[str, Any]:
        """Make a shard. After a lack of memory, try with less: the number of images in a block is
        part of its key, so it is the generator and the encoder that save memory."""
        spec = self.specs[row]
        while True:
            try:
                made: dict[str, Any] = stage_module(spec).build(
                    spec, c, block, self.worker, lambda: self._model(row, c, block)
                )
                return made
            except Exception as problem:
                thrift = self.worker.thrift + 1
                if classify(problem) != "oom" or thrift > MAX_THRIFT:
                    raise
                # For all later blocks too.
                self.worker, self.loaded = self.worker.with_thrift(thrift), None

    def _model(self, row: int, c: int, block: int) -> Any:
        """What makes the shards of a row; it reports the progress of this shard, if it can."""
        spec = self.specs[row]
        if self.loaded is None or self.loaded[0] != row:
            started = time.monotonic()
            self.loaded = None  # free the last LoRA before the next is loaded
            self.loaded = (row, stage_module(spec).open_model(spec, self.worker))
            self.startup += time.monotonic() - started
        model = self.loaded[1]
        if hasattr(model, "report") and isinstance(spec, RowSpec):
            name = f"{self.titles[row]}, {spec.name_of(c)}, block {block}"
            model.report = ProgressReporter(self.progress_actor, name, spec.maker.counts)
        return model


# Of a shard: numbers of images drawn, drawn again and given up, of pairs of image and class
# scored, and of real images encoded; seconds; files of ready images given up, as JSON.
NO_COUNTS = {
    "drawn": 0,
    "redrawn": 0,
    "holes": 0,
    "pairs": 0,
    "encoded": 0,
    "on_device": 0.0,
    "hole_files": "[]",
}

# A pool grows if the work left takes this many times as long as the first block took, with the
# start of its actor.
MIN_STARTS = 2.0
# Blocks that one pool draws: Ray Data takes 8 kB of the driver's memory for each before it starts.
MAX_POOL_BLOCKS = 20_000


def draw(
    requirements: Sequence[Requirement], context: PreparationContext
) -> Generator[Requirement | None, None, list[tuple[Requirement, Failure]]]:
    """Draw the missing blocks of some rows of the same process, each at least once.

    A coroutine: it yields while it waits for the cluster; a row when the row is complete.

    When trials need its resources and it would hold them for long, the pool is closed and opened
    again with fewer actors; when trials end, or the work takes longer than estimated, it gets more.
    Complete blocks stay, so closing costs only the blocks that are being drawn.

    Returns:
        The rows that still lack blocks, with the reason.
    """
    generation = _Generation(requirements, context)
    while shards := generation.untried_shards():
        if generation.pool_size():
            yield from generation.draw(shards)
            context.worker.store.refresh_listings()
        else:
            yield None
    return [
        (requirement, _failure(generation.errors.get(requirement, []), missing))
        for requirement in requirements
        if (missing := len(requirement.missing(context.worker.store)))
    ]


def reset_crashes(rows: Iterable[Requirement], store: ArtifactStore) -> None:
    """Reset how many processes the shards of some rows have killed."""
    for requirement in rows:
        store.row(requirement.rows[0]).reset_crashes()


Shard = tuple[int, int, int]  # row, class, block


def _shard(fields: Mapping[str, Any]) -> Shard:
    return fields["row"], fields["class"], fields["block"]


class _Generation:
    """Draws the shards of some rows with one pool after another; tries each shard once."""

    def __init__(self, requirements: Sequence[Requirement], context: PreparationContext) -> None:
        self.requirements, self.worker = requirements, context.worker
        self.listener, self.allocation = context.listener, context.allocation
        self.progress_actor = context.progress_actor
        self.want = context.resources.process_resources(requirements[0].spec.maker.process)
        self.pool_size = partial(self.allocation.pool_size, self.want)
        self.resources = context.resources
        self.errors: dict[Requirement, list[tuple[str, str]]] = {}
        self.tried: set[Shard] = set()
        self.unread: set[Shard] = set()  # of closed pools, without a result
        self.stopped = False

    def untried_shards(self) -> list[dict[str, int]]:
        """Missing shards for the next pool."""
        self._take_unread()  # also what an actor completed after its pool was closed
        if self.stopped:
            return []
        missing = (
            {"row": row, "class": c, "block": block}
            for row, requirement in enumerate(self.requirements)
            for c, block in requirement.missing(self.worker.store)
            if (row, c, block) not in self.tried
        )
        return list(itertools.islice(missing, MAX_POOL_BLOCKS))

    def draw(self, shards: Sequence[dict[str, int]]) -> Iterator[Requirement | None]:
        """Draw with one pool until all shards are drawn, or trials need its resources.

        More actors start from the other end of the shards. Where the two streams meet, an actor
        finds the shards of the other one in the store.
        """
        began, work_seconds, startup = time.monotonic(), 0.0, 0.0
        every, taken, must_close = set(map(_shard, shards)), set[Shard](), False
        left = Counter(shard["row"] for shard in shards)
        work = [stage_work(self.requirements[row].spec, count) for row, count in left.items()]
        expected = estimate(work, self.worker.store, self.resources)
        pool = PoolStatistics(
            actors=min(self.pool_size(), len(shards), expected.worthwhile_processes),
            gpu=bool(self.want.gpu),
            process=self.requirements[0].spec.maker.process,
        )
        reserved = self.allocation.reserved(self.want)
        self.allocation.pool_exceeds_reserve = pool.actors > reserved
        readers = [_StreamReader(partial(self._stream, shards, pool.actors))]
        while taken != every and (result := (yield from _next_row(readers))) is not None:
            shard = _shard(result)
            if shard in taken or (len(readers) > 1 and _is_found(result)):
                continue  # of the other stream
            self._take_result(result)
            taken.add(shard)
            left[result["row"]] -= 1
            if not left[result["row"]]:
                self.worker.store.refresh_listings()
                yield self.requirements[result["row"]]
            work_seconds += result["seconds"] - result["startup"]
            startup = startup or time.monotonic() - began
            pool.images += result["drawn"] + result["encoded"]
            pool.pairs += result["pairs"]
            pool.busy += result["on_device"]
            more = 0 if self.allocation.trials_running else self.pool_size() - pool.actors
            count = len(taken)
            seconds_left = (len(every) - count) * work_seconds / count / pool.actors
            must_close = self.stopped or (
                seconds_left > MAX_POOL_WAIT and self.pool_size() < pool.actors
            )
            if must_close:
                break
            if len(readers) == 1 and more > 0 and seconds_left > MIN_STARTS * startup:
                untaken = [each for each in reversed(shards) if _shard(each) not in taken]
                readers.append(
                    _StreamReader(partial(self._stream, untaken, min(more, len(untaken))))
                )
                pool.actors += more
                self.allocation.pool_exceeds_reserve = pool.actors > reserved
        for reader in readers:
            reader.close()
        if must_close or len(readers) > 1:
            self.worker.store.refresh_listings()
            self.unread |= every - taken
            pool.images += self._take_unread()
        if must_close:
            reset_crashes(self.requirements, self.worker.store)  # its actors were stopped
        else:  # shards that are missing now were lost, or have failed
            self.tried.update(every)
        self.allocation.pool_exceeds_reserve = False
        pool.seconds = time.monotonic() - began
        self.listener.on_pool_closed(pool)

    def _stream(self, shards: Sequence[dict[str, int]], actors: int) -> Dataset:
        # Not in a worker that makes one artifact.
        from ray.data import ActorPoolStrategy, from_items

        worker = replace(self.worker, device="cuda" if self.want.gpu else "cpu")
        with quiet_data_context():
            items = [{"shards": json.dumps(group)} for group in self._together(shards)]
            return from_items(items, override_num_blocks=len(items)).map_batches(
                GeneratorActor,
                fn_constructor_args=(self.requirements, worker, self.progress_actor),
                batch_size=1,
                compute=ActorPoolStrategy(size=actors),
                num_cpus=self.want.cpu,
                num_gpus=self.want.gpu,
                resources=dict(self.want.custom) or None,
            )

    def _together(self, shards: Sequence[dict[str, int]]) -> Iterator[list[Shard]]:
        """Shards that one actor makes: those of a block, where later ones need earlier ones."""

        def group(shard: dict[str, int]) -> Shard:
            (row, c, block), spec = _shard(shard), self.requirements[shard["row"]].spec
            return (row, -1 if isinstance(spec, RowSpec) and spec.needs_earlier else c, block)

        for _, same in itertools.groupby(shards, key=group):
            yield [_shard(shard) for shard in same]

    def _take_unread(self) -> int:
        """Report unread shards that the store has; returns the number of their images."""
        images = 0
        for row in {row for row, _, _ in self.unread}:
            requirement = self.requirements[row]
            missing = {(row, *shard) for shard in requirement.missing(self.worker.store)}
            for shard in sorted(s for s in self.unread - missing if s[0] == row):
                counts = self._counts_of_unread(shard)
                self.listener.on_prepared(requirement, 0.0, {**counts, "startup": None})
                images += counts["drawn"] + counts["encoded"]
        return images

    def _counts_of_unread(self, shard: Shard) -> dict[str, Any]:
        """The counts of an unread shard, from the store. It is then no longer unread."""
        self.unread.remove(shard)
        row, c, block = shard
        spec, store = self.requirements[row].spec, self.worker.store
        return {**NO_COUNTS, **stage_module(spec).stored_counts(spec, c, block, store)}

    def _take_result(self, result: dict[str, Any]) -> None:
        requirement = self.requirements[result["row"]]
        self.listener.stage = requirement.stage
        if not result["error"]:
            if (shard := _shard(result)) in self.unread:
                made = self._counts_of_unread(shard)
                if _is_found(result):
                    # By an actor of the last pool.
                    result |= made
            self.listener.on_prepared(requirement, result["seconds"], result)
            return
        self.tried.add(_shard(result))
        assert isinstance(requirement.spec, RowSpec)
        name = requirement.spec.name_of(result["class"])
        message = f"{name}, block {result['block']}: {result['error']}"
        self.errors.setdefault(requirement, []).append((result["failure_class"], message))
        # After a failure such as a full disk, further images could not be stored.
        self.stopped = CLASSES[result["failure_class"]].stops_after == 1


def _is_found(result: Mapping[str, Any]) -> bool:
    """Whether the store had the shard already."""
    return not result["error"] and not any(result[name] for name in ("drawn", "pairs", "encoded"))


class _StreamReader:
    """Reads a stream of Ray Data on a thread, since reading blocks and the driver has other work.

    The thread is a daemon, so that it does not keep the process of a stopped driver alive.
    """

    def __init__(self, stream: Callable[[], Dataset]) -> None:
        self.closed = False
        self._rows: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self._problem: BaseException | None = None
        self._thread = threading.Thread(target=self._read, args=(stream,), daemon=True)
        self._thread.start()

    def _read(self, stream: Callable[[], Dataset]) -> None:
        try:
            rows = iter(stream().iter_rows())
            for row in rows:
                self._rows.put(row)
                if self.closed:
                    rows.close()
                    return
        except BaseException as problem:
            self._problem = problem

    def row(self) -> dict[str, Any] | None:
        """The next row that has arrived; None if there is none yet.

        Raises:
            EOFError: the stream has ended.
            Exception: the stream raised it.
        """
        ended = not self._thread.is_alive()
        try:
            return self._rows.get_nowait()
        except Empty:
            if ended:
                raise self._problem or EOFError from None
        return None

    def close(self) -> None:
        """Stop after the next row."""
        self.closed = True


def _next_row(
    readers: Sequence[_StreamReader],
) -> Generator[None, None, dict[str, Any] | None]:
    """A coroutine that returns the next row of some streams; None at the end of all."""
    left = list(readers)
    while left:
        for reader in list(left):
            try:
                row = reader.row()
            except EOFError:
                left.remove(reader)
                continue
            if row is not None:
                return row
        yield
    return None


def _failure(errors: Sequence[tuple[str, str]], missing: int) -> Failure:
    messages = [text for _, text in errors[:3]] or ["the cluster lost them; run again"]
    names = [name for name, _ in errors] or ["infra"]
    blocks = "1 block is" if missing == 1 else f"{missing} blocks are"
    return Failure(max(set(names), key=names.count), f"{blocks} missing; {'; '.join(messages)}")

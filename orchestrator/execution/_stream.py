"""The life of a shard, and of an artifact without shards: it is a row of a dataset of Ray Data.

A shard is one block of images of a class, one draw of denoising errors of a block of pool images,
or the features of a block of real images.

1. Its inputs exist, and the queue releases it as a row of a stream (`Stream.release`).
2. The source of the stream's dataset yields the row (`Released`).
3. A free actor of `map_batches` makes it (`ArtifactMaker`). If the actor dies, Ray starts it again
   and gives it the row again; deaths are counted, and what has killed its actors fails.
4. The shard is renamed into place when it is complete, so that a killed run resumes with the
   missing ones. Its content does not depend on which process made it.
5. The row comes back with the facts of what was made (`Stream.returned`).
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, replace
from functools import partial
from queue import SimpleQueue
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, Datasource, ReadTask, read_datasource
from ray.data.block import BlockMetadata

from orchestrator.cluster.session import data_context, prepare_worker
from orchestrator.execution._progress import ProgressReporter, report_working
from orchestrator.execution._queue import Made, Row
from orchestrator.failures import Failure, classify
from orchestrator.keys import Process, RowSpec, StageSpec, artifact_key
from orchestrator.planning import artifact_title
from orchestrator.planning.requirements import STAGE_TITLES
from orchestrator.spec import Resources
from orchestrator.stages import stage_module
from orchestrator.stages.context import WorkerContext, limit_gpu_memory, startup_seconds
from orchestrator.store.artifacts import devices

MAX_THRIFT = 2  # lacks of memory after which a shard fails
# Of a shard: numbers of images drawn, drawn again and given up, of pairs of image and class
# scored, and of real images encoded; seconds.
NO_COUNTS = {
    "drawn": 0,
    "redrawn": 0,
    "holes": 0,
    "pairs": 0,
    "encoded": 0,
    "on_device": 0.0,
}


class Workers:
    """Starts streams and tasks with the resources of their kind.

    Args:
        worker: store, data and batch of the processes.
        progress_actor: keeps the released rows and the reports of the processes.
    """

    def __init__(self, worker: WorkerContext, resources: Resources, progress_actor: Any) -> None:
        self.worker, self.want = worker, resources.process_resources
        self.progress_actor = progress_actor

    def stream(self, kind: Process, size: int, specs: Mapping[str, StageSpec]) -> Stream:
        """Start a stream.

        Args:
            size: number of its actors.
            specs: of what it can make, by digest.
        """
        want = self.want(kind)
        worker = replace(self.worker, device="cuda" if want.gpu else "cpu")
        options: dict[str, Any] = {"num_cpus": want.cpu, "num_gpus": want.gpu}
        options["resources"] = dict(want.custom) or None
        return Stream(specs, size, (worker, want.gpu, self.progress_actor), options)


# ---------------------------------------------------------------- streams


class Stream:
    """A dataset whose rows are released while it runs, and the actors that make them.

    A thread reads the rows that come back, since reading blocks. It is a daemon, so that it does
    not keep the process of a stopped driver alive.

    Attributes:
        problem: why the dataset has failed; None: it has not.
    """

    def __init__(
        self,
        specs: Mapping[str, StageSpec],
        size: int,
        arguments: Sequence[Any],
        options: Mapping[str, Any],
    ) -> None:
        self.specs = specs
        self.problem: Exception | None = None
        self._name, self._actor = uuid.uuid4().hex, arguments[-1]
        self._returned: SimpleQueue[Mapping[str, Any] | Exception] = SimpleQueue()
        stages = dict.fromkeys(STAGE_TITLES[spec.maker.stage] for spec in specs.values())
        with data_context():
            shards = read_datasource(
                Released(self._name, self._actor),
                override_num_blocks=1,
                num_cpus=0,
                # The released rows are lost with the driver's machine anyway.
                label_selector={"ray.io/node-id": ray.get_runtime_context().get_node_id()},
            )
            made = shards.map_batches(
                ArtifactMaker,
                fn_constructor_args=(specs, *arguments),
                batch_size=1,
                batch_format="pyarrow",
                # The second row of an actor waits where it runs. It has one only if shards are
                # short: the queue releases no further row otherwise.
                compute=ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=2),
                **options,
            )
        made.set_name(" and ".join(stages).replace(" ", "_"))
        self._thread = threading.Thread(target=self._read, args=(made,), daemon=True)
        self._thread.start()

    def release(self, row: Row, thrift: int) -> None:
        """Add a row, whose inputs exist.

        Args:
            thrift: how often an artifact without shards ran out of memory.
        """
        spec = self.specs[row.key]
        name = artifact_title(artifact_key(spec.maker))
        of = spec.name_of(row.indices[0]) if isinstance(spec, RowSpec) else ""
        facts = {"artifact": name, "of": of, **row._asdict(), "thrift": thrift}
        self._actor.release.remote(self._name, facts)

    def returned(self) -> list[tuple[Row, list[Made]]]:
        """The rows that have come back since the last call, with a `Made` for each shard."""
        rows: list[tuple[Row, list[Made]]] = []
        while not self._returned.empty():
            row = self._returned.get()
            if isinstance(row, Exception):
                self.problem = row
                break
            made = [_made(*each) for each in json.loads(row["made"])]
            rows.append((Row(row["key"], tuple(row["indices"]), row["block"]), made))
        return rows

    def end(self) -> None:
        """Release no further row. The actors end after the rows that they have."""
        self._actor.end.remote(self._name)

    def is_alive(self) -> bool:
        """Whether actors still end; Ray must not end before."""
        return self._thread.is_alive()

    def _read(self, made: Any) -> None:
        try:
            with data_context():
                # Prefetching would hold a row back until the next one has come.
                for rows in made.iter_batches(
                    batch_size=None, batch_format="pyarrow", prefetch_batches=0
                ):
                    for row in rows.to_pylist():
                        self._returned.put(row)
        except Exception as problem:
            self._returned.put(problem)


class Released(Datasource):  # type: ignore[misc]
    """The released rows of a stream, in their order. It ends when the stream does.

    Args:
        name: of the stream.
        progress_actor: has the rows.
    """

    def __init__(self, name: str, progress_actor: Any) -> None:
        super().__init__()
        self.name, self.progress_actor = name, progress_actor

    def estimate_inmemory_data_size(self) -> None:
        return None

    def get_read_tasks(self, parallelism: int, *more: Any, **others: Any) -> list[ReadTask]:
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(self._rows, unknown)]

    def _rows(self) -> Iterator[pa.Table]:
        """Each row as a block. A task that Ray repeats yields the same rows again."""
        number = 0
        while row := ray.get(self.progress_actor.row.remote(self.name, number)):
            yield pa.Table.from_pylist([{**row}])
            number += 1


# ---------------------------------------------------------------- processes


class ArtifactMaker:
    """Actor of a stream. It keeps the diffusion model or CLIP of a row of the store loaded until a
    shard of another one comes."""

    def __init__(
        self, specs: Mapping[str, StageSpec], worker: WorkerContext, gpu: float, progress_actor: Any
    ) -> None:
        limit_gpu_memory(gpu)
        _prepare_process(worker)
        self.specs, self.worker, self.progress_actor = specs, worker, progress_actor
        self.loaded: tuple[RowSpec, Any] | None = None  # generator or scorer
        self.startup = 0.0  # seconds of loading models for the current shard

    def __call__(self, batch: pa.Table) -> pa.Table:
        [row] = batch.to_pylist()
        spec, key = self.specs[row["key"]], row["key"]
        if isinstance(spec, RowSpec):
            made = [self.make(spec, index, row["block"]) for index in row["indices"]]
        else:
            has_died = ray.get(self.progress_actor.begin.remote(key))
            made = [self.make(spec, thrift=row["thrift"], has_died=has_died)]
            self.progress_actor.finish.remote(key)
        plain = [(*each[:2], each.failure and astuple(each.failure)) for each in made]
        text = json.dumps(plain, default=lambda each: each.item())
        return batch.append_column("made", [[text]])

    def make(
        self,
        spec: StageSpec,
        index: int = 0,
        block: int = 0,
        thrift: int = 0,
        has_died: bool = False,
    ) -> Made:
        """Make an artifact or a shard, unless the store has it.

        Args:
            index: class or draw of the shard.
            thrift: how often an artifact without shards ran out of memory.
            has_died: whether it has killed the last process that made it.
        """
        started, self.startup = time.monotonic(), 0.0
        title = artifact_title(artifact_key(spec.maker))
        reporter = ProgressReporter(self.progress_actor, title, spec.counts)
        self.worker.store.locks.on_wait = reporter.report_wait
        facts: dict[str, Any] = {}
        failure = None
        try:
            with report_working(self.progress_actor):
                if isinstance(spec, RowSpec):  # the store counts the processes that it has killed
                    facts = self._shard(spec, index, block)
                elif has_died and not self.worker.store.has(spec):
                    raise RuntimeError("it killed its process")
                else:
                    worker = self.worker.with_thrift(max(thrift, self.worker.thrift))
                    facts = self._artifact(spec, worker, reporter)
        except Exception as problem:  # returned as data: other shards have results
            failure = Failure(classify(problem), f"{type(problem).__name__}: {problem}")
        return Made(time.monotonic() - started, facts, failure)

    def _artifact(
        self, spec: StageSpec, worker: WorkerContext, reporter: ProgressReporter
    ) -> dict[str, Any]:
        self.loaded = None  # a LoRA needs the memory
        started = time.monotonic()
        steps: list[tuple[int, float]] = []  # finished steps, and seconds until then

        def report(done: int, total: int) -> None:
            steps.append((done, time.monotonic() - started))
            reporter(done, total)

        artifact = stage_module(spec).build(spec, worker, report)
        seconds = time.monotonic() - started
        startup = startup_seconds(steps, seconds) if spec.counts == "steps" else 0.0
        return {**artifact.record["info"], "startup": startup}

    def _shard(self, spec: RowSpec, index: int, block: int) -> dict[str, Any]:
        """Make a shard. After a lack of memory, try with less: the number of images in a block is
        part of its key, so it is the generator and the encoder that save memory."""
        while True:
            try:
                made = stage_module(spec).build(
                    spec, index, block, self.worker, lambda: self._model(spec, index, block)
                )
                place = {"class": index, "block": block, "startup": self.startup}
                return {**place, **NO_COUNTS, **made, **devices()}
            except Exception as problem:
                thrift = self.worker.thrift + 1
                if classify(problem) != "oom" or thrift > MAX_THRIFT:
                    raise
                # For all later blocks too.
                self.worker, self.loaded = self.worker.with_thrift(thrift), None

    def _model(self, spec: RowSpec, index: int, block: int) -> Any:
        """What makes the shards of a row; it reports the progress of this shard, if it can."""
        if self.loaded is None or self.loaded[0] != spec:
            started = time.monotonic()
            self.loaded = None  # free the last LoRA before the next is loaded
            self.loaded = (spec, stage_module(spec).open_model(spec, self.worker))
            self.startup += time.monotonic() - started
        model = self.loaded[1]
        if hasattr(model, "report"):
            title = artifact_title(artifact_key(spec.maker))
            name = f"{title}, {spec.name_of(index)}, block {block}"
            model.report = ProgressReporter(self.progress_actor, name, spec.maker.counts)
        return model


def start_task(
    function: Callable[..., Any], arguments: Sequence[Any], worker: WorkerContext
) -> Any:
    """Start a task that makes a picture of what exists, and reserves no resources; its future.

    Args:
        function: is called with `arguments` and a `WorkerContext`.
    """
    task = ray.remote(_call).options(num_cpus=0, max_retries=0, name=function.__name__)
    return task.remote(function, arguments, replace(worker, device="cpu"))


def ended_tasks(futures: Iterable[Any]) -> Iterator[tuple[Any, Callable[[], Any]]]:
    """The futures of tasks that have ended, and what returns the result of each, or raises its
    exception."""
    waiting = [*futures]
    for future in ray.wait(waiting, num_returns=len(waiting), timeout=0)[0]:
        yield future, partial(ray.get, future)


def _call(function: Callable[..., Any], arguments: Sequence[Any], worker: WorkerContext) -> Any:
    _prepare_process(worker)
    return function(*arguments, worker)


def draw_contact_sheet(*arguments: Any) -> tuple[bytes, dict[str, float]]:
    """`pictures.contact_sheet`."""
    from orchestrator.stages.pictures import contact_sheet

    return contact_sheet(*arguments)


def find_copies(*arguments: Any) -> list[tuple[str, int]]:
    """`copies.copies_of_test_images`."""
    from orchestrator.stages.copies import copies_of_test_images  # imports torch

    return copies_of_test_images(*arguments)


def _prepare_process(worker: WorkerContext) -> None:
    import torch  # not in the driver, which does not compute

    torch.set_num_threads(1)  # one process a core; more threads would compete for it
    prepare_worker(worker.variables, worker.plugins)


def _made(seconds: float, facts: dict[str, Any], failure: Sequence[str] | None) -> Made:
    return Made(seconds, facts, Failure(*failure) if failure else None)

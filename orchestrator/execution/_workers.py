"""Processes that prepare artifacts on the cluster, in pools of Ray Data.

A shard is one block of images of a class, one draw of denoising errors of a block of pool images,
or the features of a block of real images. Its content does not depend on which process makes it.
Each shard is renamed into place when it is complete, so that a killed run resumes with the missing
ones.
"""

from __future__ import annotations

import base64
import json
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import astuple, replace
from functools import partial
from typing import Any, NamedTuple

import ray

from orchestrator.cluster.session import prepare_worker, quiet_data_context
from orchestrator.execution._progress import ProgressReporter, report_working
from orchestrator.execution._queue import Shard
from orchestrator.failures import Failure, classify
from orchestrator.keys import Process, RowSpec, StageSpec, artifact_key
from orchestrator.planning import artifact_title
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


ENDED = RuntimeError("the processes of the pool have ended")
KILLED = "it killed its process"


class Made(NamedTuple):
    """What became of an artifact or a shard."""

    seconds: float
    facts: Mapping[str, Any]
    failure: Failure | None = None


class Workers:
    """Starts processes with the resources of their kind."""

    def __init__(self, worker: WorkerContext, resources: Resources, progress_actor: Any) -> None:
        self.worker, self.want = worker, resources.process_resources
        self.progress_actor = progress_actor

    def start(self, kind: Process, count: int, calls: int) -> DataPool:
        """Start `count` processes, which make at most `calls` calls together."""
        want = self.want(kind)
        worker = replace(self.worker, device="cuda" if want.gpu else "cpu")
        arguments = (worker, want.gpu, self.progress_actor)
        options: dict[str, Any] = {"num_cpus": want.cpu, "num_gpus": want.gpu}
        options["resources"] = dict(want.custom) or None
        return DataPool(count, calls, arguments, options)


class DataPool:
    """A pool of Ray Data. Row n of its dataset stands for call n: the process that gets the row
    waits for this call, so the queue decides what a process makes until the process is free. A row
    that Ray computes again, after the loss of a machine, is the same call.

    A thread reads the results, since reading blocks. It is a daemon, so that it does not keep the
    process of a stopped driver alive.
    """

    def __init__(
        self, count: int, calls: int, arguments: Sequence[Any], options: Mapping[str, Any]
    ) -> None:
        self._name, self._progress_actor = uuid.uuid4().hex, arguments[-1]
        self._given = 0
        self._futures: dict[int, Future[list[Made]]] = {}  # of calls without a result, by number
        self._ended = False
        read = partial(self._read, count, calls, arguments, options)
        self._thread = threading.Thread(target=read, daemon=True)
        self._thread.start()

    def make(self, spec: StageSpec, shards: Sequence[Shard], thrift: int) -> Future[list[Made]]:
        """Make an artifact, or shards of a row; the result has a `Made` for each.

        Args:
            thrift: how often the artifact ran out of memory.
        """
        return self._call("make", spec, shards, thrift)

    def run(self, function: Callable[..., Any], arguments: Sequence[Any]) -> Future[list[Made]]:
        """Call a function, whose last argument is a `WorkerContext`; the fact `result` of the one
        `Made` is what it returns, as JSON has it."""
        return self._call("run", function, arguments)

    def _call(self, method: str, *arguments: Any) -> Future[list[Made]]:
        """Call a method of an `ArtifactMaker`."""
        number, future = self._given, Future[list[Made]]()
        self._given += 1
        self._futures[number] = future
        self._progress_actor.give.remote(self._name, number, (method, arguments))
        if self._ended:
            self._fail(ENDED)
        return future

    def end(self) -> None:
        """End the processes. Calls that have not returned raise an exception."""
        self._ended = True
        self._progress_actor.end.remote(self._name)
        self._fail(ENDED)

    def is_alive(self) -> bool:
        """Whether they still end; Ray must not end before."""
        return self._thread.is_alive()

    def _read(
        self, count: int, calls: int, arguments: Sequence[Any], options: Mapping[str, Any]
    ) -> None:
        from ray.data import ActorPoolStrategy, from_items

        # A process waits for one call at a time. It has a second thread for rows that Ray computes
        # again: behind a row that waits for a call, which may never come, they would not end.
        processes = ActorPoolStrategy(
            size=count,
            max_tasks_in_flight_per_actor=1,
            max_concurrent_calls_per_actor=2,
            enable_true_multi_threading=True,
        )
        problem: BaseException = ENDED
        try:
            with quiet_data_context():
                pool = from_items(range(calls), override_num_blocks=calls).map_batches(
                    ArtifactMaker,
                    fn_constructor_args=(*arguments, self._name),
                    batch_size=1,
                    compute=processes,
                    **options,
                )
                # Prefetching would hold a result back until the next one has come.
                results = iter(pool.iter_batches(batch_size=1, prefetch_batches=0))
                for result in results:
                    number = int(result["number"][0])
                    self._progress_actor.give.remote(self._name, number, None)
                    if future := self._futures.pop(number, None):
                        future.set_result([_made(*each) for each in json.loads(result["made"][0])])
                    if self._ended:
                        results.close()
                        break
        except BaseException as error:
            problem = error
        self._ended = True
        self._fail(problem)

    def _fail(self, problem: BaseException) -> None:
        for number in [*self._futures]:
            if future := self._futures.pop(number, None):
                future.set_exception(problem)


class ArtifactMaker:
    """Process of a `DataPool`. It keeps the diffusion model or CLIP of a row loaded until the row
    changes."""

    def __init__(
        self, worker: WorkerContext, gpu: float, progress_actor: Any, pool: str = ""
    ) -> None:
        import torch  # not in the driver, which does not compute

        torch.set_num_threads(1)  # one process a core; more threads would compete for it
        limit_gpu_memory(gpu)
        prepare_worker(worker.variables, worker.plugins)
        self.worker, self.progress_actor = worker, progress_actor
        self.pool, self.lock = pool, threading.Lock()
        self.loaded: tuple[StageSpec, Any] | None = None  # spec of the row, generator or scorer
        self.startup = 0.0  # seconds of loading models for the current shard

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        number = int(batch["item"][0])
        call, has_died = ray.get(self.progress_actor.call.remote(self.pool, number))
        made: list[Made] = []
        if call:
            method, arguments = call
            with self.lock:
                made = getattr(self, method)(*arguments, has_died)
        plain = [(*each[:2], each.failure and astuple(each.failure)) for each in made]
        text = json.dumps(plain, default=lambda each: each.item())
        return {"number": [number], "made": [text]}

    def make(
        self, spec: StageSpec, shards: Sequence[Shard], thrift: int, has_died: bool = False
    ) -> list[Made]:
        return [self._made(spec, *shard, thrift, has_died) for shard in shards]

    def run(
        self, function: Callable[..., Any], arguments: Sequence[Any], has_died: bool = False
    ) -> list[Made]:
        started = time.monotonic()
        facts, failure = {}, None
        try:
            with report_working(self.progress_actor):
                if has_died:
                    raise RuntimeError(KILLED)
                facts = {"result": function(*arguments, self.worker)}
        except Exception as problem:
            failure = Failure(classify(problem), f"{type(problem).__name__}: {problem}")
        return [Made(time.monotonic() - started, facts, failure)]

    def _made(self, spec: StageSpec, index: int, block: int, thrift: int, has_died: bool) -> Made:
        started, self.startup = time.monotonic(), 0.0
        title = artifact_title(artifact_key(spec.maker))
        reporter = ProgressReporter(self.progress_actor, title, spec.counts)
        self.worker.store.locks.on_wait = reporter.report_wait
        facts: Mapping[str, Any] = {}
        failure = None
        try:
            with report_working(self.progress_actor):
                if isinstance(spec, RowSpec):
                    facts = self._shard(spec, index, block)
                # The store counts the processes that a shard has killed, the queue those of others.
                elif has_died and not self.worker.store.has(spec):
                    raise RuntimeError(KILLED)
                else:
                    worker = self.worker.with_thrift(max(thrift, self.worker.thrift))
                    facts = self._artifact(spec, worker, reporter)
        except Exception as problem:  # returned as data: other shards have results
            failure = Failure(classify(problem), f"{type(problem).__name__}: {problem}")
        return Made(time.monotonic() - started, facts, failure)

    def _artifact(
        self, spec: StageSpec, worker: WorkerContext, reporter: ProgressReporter
    ) -> Mapping[str, Any]:
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

    def _shard(self, spec: RowSpec, index: int, block: int) -> Mapping[str, Any]:
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


def _made(seconds: float, facts: dict[str, Any], failure: Sequence[str] | None) -> Made:
    return Made(seconds, facts, Failure(*failure) if failure else None)


def draw_contact_sheet(*arguments: Any) -> tuple[str, dict[str, float]]:
    """`pictures.contact_sheet`, with the PNG in base64. The driver does not import torch."""
    from orchestrator.stages.pictures import contact_sheet

    png, shares = contact_sheet(*arguments)
    return base64.b64encode(png).decode(), shares


def find_copies(*arguments: Any) -> list[tuple[str, int]]:
    """`copies.copies_of_test_images`."""
    from orchestrator.stages.copies import copies_of_test_images

    return copies_of_test_images(*arguments)

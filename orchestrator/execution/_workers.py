"""Processes that prepare artifacts on the cluster, by Ray: a task makes an artifact, an actor makes
one shard of a row after another.

A shard is one block of images of a class, one draw of denoising errors of a block of pool images,
or the features of a block of real images. Its content does not depend on which process makes it.
Each shard is renamed into place when it is complete, so that a killed run resumes with the missing
ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import ray

from orchestrator.cluster.session import prepare_worker
from orchestrator.execution._progress import ProgressReporter, report_working
from orchestrator.failures import classify
from orchestrator.keys import Process, RowSpec, StageSpec, artifact_key
from orchestrator.planning import artifact_title
from orchestrator.redact import redact
from orchestrator.spec import Resources
from orchestrator.stages import stage_module
from orchestrator.stages.context import WorkerContext, limit_gpu_memory, startup_seconds
from orchestrator.store.artifacts import devices

MAX_THRIFT = 2  # lacks of memory after which a shard fails
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


class Workers:
    """Starts processes with the resources of their kind, and returns the future of each call."""

    def __init__(self, worker: WorkerContext, resources: Resources, progress_actor: Any) -> None:
        self.worker, self.want = worker, resources.process_resources
        self.progress_actor = progress_actor

    def build(self, spec: StageSpec, thrift: int) -> Any:
        """Make an artifact in a task."""
        kind = spec.maker.process
        task = ray.remote(_build_artifact).options(max_retries=0, **self._options(kind))
        worker = self._worker(kind).with_thrift(thrift)
        return task.remote(spec, worker, self.want(kind).gpu, self.progress_actor)

    def start(self, kind: Process) -> tuple[Any, Any]:
        """Start an actor for shards; returns it with the future of its start."""
        actor = ray.remote(ShardMaker).options(**self._options(kind)).remote()
        gpu = self.want(kind).gpu
        return actor, actor.prepare.remote(self._worker(kind), gpu, self.progress_actor)

    def make(self, actor: Any, spec: RowSpec, shards: Sequence[tuple[int, int]]) -> Any:
        """Make shards of a row; the result has the counts of each."""
        return actor.make.remote(spec, shards)

    def end(self, actor: Any) -> None:
        ray.kill(actor)

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run a task on no core, since trials hold all of them while they run."""
        return ray.remote(function).options(num_cpus=0).remote(*arguments)

    def finished(self, futures: Sequence[Any]) -> Any:
        """The calls that have ended by now."""
        if not futures:
            return []
        return ray.wait(list(futures), num_returns=len(futures), timeout=0)[0]

    def result(self, future: Any) -> Any:
        """The result of a call; raises its exception, or Ray's of a dead process."""
        return ray.get(future)

    def _worker(self, kind: Process) -> WorkerContext:
        return replace(self.worker, device="cuda" if self.want(kind).gpu else "cpu")

    def _options(self, kind: Process) -> dict[str, Any]:
        want = self.want(kind)
        resources = dict(want.custom) or None
        return {"num_cpus": want.cpu, "num_gpus": want.gpu, "resources": resources}


def _prepare_process(worker: WorkerContext, gpu: float) -> None:
    import torch  # not in the driver, which does not compute

    torch.set_num_threads(1)  # one process a core; more threads would compete for it
    limit_gpu_memory(gpu)
    prepare_worker(worker.variables, worker.plugins)


def _build_artifact(
    spec: StageSpec, worker: WorkerContext, gpu: float, progress_actor: Any
) -> tuple[float, dict[str, Any]]:
    """Make one artifact; returns its seconds and facts."""
    _prepare_process(worker, gpu)
    started = time.monotonic()
    reporter = ProgressReporter(progress_actor, artifact_title(artifact_key(spec)), spec.counts)
    worker.store.locks.on_wait = reporter.report_wait
    steps: list[tuple[int, float]] = []  # finished steps, and seconds until then

    def report(done: int, total: int) -> None:
        steps.append((done, time.monotonic() - started))
        reporter(done, total)

    with report_working(progress_actor):
        artifact = stage_module(spec).build(spec, worker, report)
    seconds = time.monotonic() - started
    startup = startup_seconds(steps, seconds) if spec.counts == "steps" else 0.0
    return seconds, {**artifact.record["info"], "startup": startup}


class ShardMaker:
    """Actor with a diffusion model or CLIP. It keeps one model loaded and replaces it when the row
    changes."""

    def prepare(self, worker: WorkerContext, gpu: float, progress_actor: Any) -> None:
        _prepare_process(worker, gpu)
        self.worker, self.progress_actor = worker, progress_actor
        self.loaded: tuple[StageSpec, Any] | None = None  # spec of the row, generator or scorer
        self.startup = 0.0  # seconds of loading models for the current shard

    def make(self, spec: RowSpec, shards: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
        """Make some shards; returns what became of each."""
        return [self._result(spec, *shard) for shard in shards]

    def _result(self, spec: RowSpec, index: int, block: int) -> dict[str, Any]:
        started, self.startup = time.monotonic(), 0.0
        error = failure_class = ""
        counts: dict[str, Any] = dict(NO_COUNTS)
        waits = ProgressReporter(self.progress_actor, artifact_title(artifact_key(spec.maker)))
        self.worker.store.locks.on_wait = waits.report_wait
        try:
            with report_working(self.progress_actor):
                counts |= self._make(spec, index, block)
        except Exception as problem:  # returned as data: the other shards have results
            # Redacted in this process, which knows the secrets.
            error = redact(f"{type(problem).__name__}: {problem}")
            failure_class = classify(problem)
        return {
            **{"class": index, "block": block},
            **{"error": error, "failure_class": failure_class},
            **{"seconds": time.monotonic() - started, "startup": self.startup},
            **counts,
            **devices(),
        }

    def _make(self, spec: RowSpec, index: int, block: int) -> dict[str, Any]:
        """Make a shard. After a lack of memory, try with less: the number of images in a block is
        part of its key, so it is the generator and the encoder that save memory."""
        while True:
            try:
                made: dict[str, Any] = stage_module(spec).build(
                    spec, index, block, self.worker, lambda: self._model(spec, index, block)
                )
                return made
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
            name = f"{artifact_title(artifact_key(spec.maker))}, {spec.name_of(index)}"
            counts = spec.maker.counts
            model.report = ProgressReporter(self.progress_actor, f"{name}, block {block}", counts)
        return model


def draw_contact_sheet(*arguments: Any) -> tuple[bytes, dict[str, float]]:
    """Task on a worker: `pictures.contact_sheet`, which imports torch."""
    from orchestrator.stages.pictures import contact_sheet

    return contact_sheet(*arguments)


def find_copies(*arguments: Any) -> list[tuple[str, int]]:
    """Task on a worker: `copies.copies_of_test_images`, which imports torch."""
    from orchestrator.stages.copies import copies_of_test_images

    return copies_of_test_images(*arguments)

"""Processes that prepare artifacts on the cluster: actors of Ray.

A process makes one artifact, or one shard of a row, after another. A shard is one block of images
of a class, one draw of denoising errors of a block of pool images, or the features of a block of
real images. Its content does not depend on which process makes it. Each shard is renamed into place
when it is complete, so that a killed run resumes with the missing ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import ray

from orchestrator.cluster.session import prepare_worker
from orchestrator.execution._progress import ProgressReporter, report_working
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


class Made(NamedTuple):
    """What became of an artifact or a shard."""

    seconds: float
    facts: Mapping[str, Any]
    failure: Failure | None = None


class Workers:
    """Starts processes with the resources of their kind, and returns the future of each call."""

    def __init__(self, worker: WorkerContext, resources: Resources, progress_actor: Any) -> None:
        self.worker, self.want = worker, resources.process_resources
        self.progress_actor = progress_actor

    def start(self, kind: Process) -> tuple[Any, Any]:
        """Start a process; returns it with the future of its start."""
        want = self.want(kind)
        resources = dict(want.custom) or None
        options = {"num_cpus": want.cpu, "num_gpus": want.gpu, "resources": resources}
        actor = ray.remote(ArtifactMaker).options(**options).remote()
        worker = replace(self.worker, device="cuda" if want.gpu else "cpu")
        return actor, actor.prepare.remote(worker, want.gpu, self.progress_actor)

    def make(
        self, actor: Any, spec: StageSpec, shards: Sequence[tuple[int, int]], thrift: int
    ) -> Any:
        """Make an artifact, or shards of a row; the result has a `Made` for each.

        Args:
            thrift: how often the artifact ran out of memory.
        """
        return actor.make.remote(spec, shards, thrift)

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


class ArtifactMaker:
    """Actor that keeps the diffusion model or CLIP of a row loaded until the row changes."""

    def prepare(self, worker: WorkerContext, gpu: float, progress_actor: Any) -> None:
        import torch  # not in the driver, which does not compute

        torch.set_num_threads(1)  # one process a core; more threads would compete for it
        limit_gpu_memory(gpu)
        prepare_worker(worker.variables, worker.plugins)
        self.worker, self.progress_actor = worker, progress_actor
        self.loaded: tuple[StageSpec, Any] | None = None  # spec of the row, generator or scorer
        self.startup = 0.0  # seconds of loading models for the current shard

    def make(self, spec: StageSpec, shards: Sequence[tuple[int, int]], thrift: int) -> list[Made]:
        return [self._made(spec, *shard, thrift) for shard in shards]

    def _made(self, spec: StageSpec, index: int, block: int, thrift: int) -> Made:
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


def draw_contact_sheet(*arguments: Any) -> tuple[bytes, dict[str, float]]:
    """Task on a worker: `pictures.contact_sheet`, which imports torch."""
    from orchestrator.stages.pictures import contact_sheet

    return contact_sheet(*arguments)


def find_copies(*arguments: Any) -> list[tuple[str, int]]:
    """Task on a worker: `copies.copies_of_test_images`, which imports torch."""
    from orchestrator.stages.copies import copies_of_test_images

    return copies_of_test_images(*arguments)

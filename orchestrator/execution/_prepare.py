"""Makes missing artifacts on the cluster: features, labels, LoRA, images."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, TypeVar

import ray

from orchestrator.cluster.session import prepare_worker
from orchestrator.execution._generation import draw, reset_crashes
from orchestrator.execution._progress import ProgressReporter, report_working
from orchestrator.execution._state import PreparationContext
from orchestrator.failures import CLASSES, Failure, classify, classify_death
from orchestrator.keys import StageSpec, artifact_key
from orchestrator.planning import Requirement, artifact_title
from orchestrator.planning.plan import build_level, independent_of
from orchestrator.stages import stage_module
from orchestrator.stages.context import WorkerContext, limit_gpu_memory, startup_seconds

T = TypeVar("T")


def prepare(
    requirements: Sequence[Requirement], context: PreparationContext
) -> Iterator[Requirement | None]:
    """Make missing artifacts, stage after stage; within a stage side by side.

    A coroutine: it yields while it waits for the cluster; a row when the row is complete.

    Failures are retried as their class allows. The listener receives each final failure, and
    artifacts that depend on a failed one are left out.
    """
    store, listener = context.worker.store, context.listener
    failed: list[Requirement] = []
    store.refresh_listings()
    missing = [requirement for requirement in requirements if not requirement.is_complete(store)]
    # A shard whose process died with an earlier driver or its Ray did not kill that process.
    reset_crashes((requirement for requirement in missing if requirement.rows), store)
    levels = _levels(missing)
    missing.sort(key=lambda requirement: levels[requirement])
    for _, group in groupby(missing, key=levels.__getitem__):
        buildable = independent_of(failed, group)
        rows = [requirement for requirement in buildable if requirement.rows]
        others = [requirement for requirement in buildable if not requirement.rows]
        failures: list[tuple[Requirement, Failure]] = []
        if others:
            listener.stage = others[-1].stage
            failures = yield from _build_side_by_side(others, context)
        for same in _by_process(rows):
            listener.stage = same[0].stage
            failures += yield from draw(same, context)
        for requirement, failure in failures:
            failed.append(requirement)
            listener.on_failed(requirement, failure)


def _by_process(rows: Sequence[Requirement]) -> Iterator[list[Requirement]]:
    """Rows that one pool can make: those of encoders, then those of generators."""
    for is_drawn in (False, True):
        if same := [requirement for requirement in rows if requirement.spec.is_drawn == is_drawn]:
            yield same


def _levels(missing: Sequence[Requirement]) -> dict[Requirement, int]:
    """Sort requirements into levels, in an order that starts few processes: rows without LoRA are
    drawn together with the last row."""
    levels = {requirement: build_level(requirement.spec) for requirement in missing}
    drawn = [requirement for requirement in missing if requirement.spec.is_drawn]
    last = max((levels[requirement] for requirement in drawn), default=0)
    for requirement in drawn:
        if levels[requirement] == 1:
            levels[requirement] = last
    return levels


def _build_artifact(
    spec: StageSpec, worker: WorkerContext, gpu: float, progress_actor: Any
) -> tuple[float, dict[str, Any]]:
    """Task on a worker: make one artifact; returns its seconds and facts."""
    import torch  # not in the driver, which does not compute

    torch.set_num_threads(1)
    limit_gpu_memory(gpu)
    prepare_worker(worker.variables, worker.plugins)
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


def _build_side_by_side(
    requirements: Sequence[Requirement], context: PreparationContext
) -> Generator[None, None, list[tuple[Requirement, Failure]]]:
    worker, resources, listener = context.worker, context.resources, context.listener
    waiting = deque((requirement, worker) for requirement in requirements)
    running: dict[Any, Requirement] = {}
    tries: Counter[tuple[Requirement, str]] = Counter()
    failures = []
    while waiting or running:
        while waiting and len(running) < context.allocation.max_tasks(
            resources.process_resources(waiting[0][0].spec.process)
        ):
            requirement, task_worker = waiting.popleft()
            want = resources.process_resources(requirement.spec.process)
            task = ray.remote(_build_artifact).options(
                num_cpus=want.cpu,
                num_gpus=want.gpu,
                resources=dict(want.custom) or None,
                max_retries=0,
            )
            task_worker = replace(task_worker, device="cuda" if want.gpu else "cpu")
            future = task.remote(requirement.spec, task_worker, want.gpu, context.progress_actor)
            running[future] = requirement
        finished, _ = ray.wait(list(running), timeout=0)
        if not finished:
            yield
        for future in finished:
            requirement = running.pop(future)
            try:
                seconds, facts = ray.get(future)
            except Exception as problem:
                failure = _failure(problem)
                name = failure.failure_class
                tries[requirement, name] += 1
                if tries[requirement, name] > CLASSES[name].retries:
                    failures.append((requirement, failure))
                    continue
                listener.on_retried(requirement, failure)
                retry_worker = worker.with_thrift(tries[requirement, "oom"])
                waiting.append((requirement, retry_worker))
                continue
            listener.on_prepared(requirement, seconds, facts)
    return failures


def _failure(problem: Exception) -> Failure:
    """The failure of a task: its own exception, or Ray's reason for the death of its process."""
    cause = getattr(problem, "cause", None)
    if isinstance(cause, Exception):
        return Failure(classify(cause), f"{type(cause).__name__}: {cause}")
    message = f"{type(problem).__name__}: {problem}"
    return Failure(classify_death(message), message.partition("\n")[0])


def draw_contact_sheet(*arguments: Any) -> tuple[bytes, dict[str, float]]:
    """Task on a worker: `pictures.contact_sheet`, which imports torch."""
    from orchestrator.stages.pictures import contact_sheet

    return contact_sheet(*arguments)


def find_copies(*arguments: Any) -> list[tuple[str, int]]:
    """Task on a worker: `copies.copies_of_test_images`, which imports torch."""
    from orchestrator.stages.copies import copies_of_test_images

    return copies_of_test_images(*arguments)


def run_beside_trials(function: Callable[..., T], *arguments: Any) -> Generator[None, None, T]:
    """A coroutine that runs a task on no core, since trials hold all of them while they run."""
    task = ray.remote(function).options(num_cpus=0).remote(*arguments)
    while not ray.wait([task], timeout=0)[0]:
        yield
    result: T = ray.get(task)
    return result

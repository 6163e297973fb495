"""Run a plan's missing stages on the cluster: features, labels, LoRA, images."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, TypeVar

import ray

from air_core.backbone.loading import import_open_clip_alone
from air_core.specs import FeaturesSpec, LabelsSpec, LoraSpec, SyntheticFeaturesSpec
from orchestrator.cluster.session import note_devices
from orchestrator.execution._allocation import Context
from orchestrator.execution._generation import draw
from orchestrator.execution._progress import Note, Watcher
from orchestrator.failures import CLASSES, Failure, classify, of_death
from orchestrator.keys import artifact_key
from orchestrator.planning import Requirement, holds, name_of
from orchestrator.planning.audit_card import Audited, card_files
from orchestrator.planning.plan import level
from orchestrator.stages import auditor, pictures
from orchestrator.stages.build import build_features, build_labels, build_lora
from orchestrator.stages.context import WorkerContext, keep_to_share

T = TypeVar("T")


def prepare(requirements: Sequence[Requirement], context: Context) -> Iterator[None]:
    """Make what is missing, stage after stage; within a stage side by side.

    A coroutine: it yields while it waits for the cluster.

    What fails is tried again as its class allows. In the end the watcher is told of it, and what
    would be made from it is left out.
    """
    store, watcher = context.worker.store, context.watcher
    failed: list[Any] = []  # specs
    store.refresh_listings()
    missing = [
        requirement for requirement in requirements if requirement.have(store) < requirement.total()
    ]
    levels = _levels(missing)
    missing.sort(key=lambda requirement: levels[requirement])
    for _, group in groupby(missing, key=levels.__getitem__):
        together = [
            requirement
            for requirement in group
            if not any(holds(requirement.spec, one) for one in failed)
        ]
        images = [requirement for requirement in together if requirement.stage == "images"]
        others = [requirement for requirement in together if requirement.stage != "images"]
        failures: list[tuple[Requirement, Failure]] = []
        if others:
            watcher.stage = others[-1].stage
            failures = yield from _build(others, context)
        if images:
            watcher.stage = "images"
            failures += yield from draw(images, context)
        for requirement, failure in failures:
            failed += lost_with(requirement)
            watcher.failed(requirement, failure)


def lost_with(requirement: Requirement) -> list[Any]:
    """The specs that are not there if it could not be made."""
    return [requirement.spec, getattr(requirement.spec, "images", None)]


def _levels(missing: Sequence[Requirement]) -> dict[Requirement, int]:
    """When each need comes, so that few processes have to start: labels are made by the process
    that trains the LoRA on them, and rows without LoRA are drawn with the last row."""
    levels = {requirement: level(requirement.spec) for requirement in missing}
    trained = {
        requirement.spec.labels for requirement in missing if isinstance(requirement.spec, LoraSpec)
    }
    last = max(
        (levels[requirement] for requirement in missing if requirement.stage == "images"), default=0
    )
    for requirement in missing:
        if requirement.spec in trained:
            levels[requirement] += 1
        elif requirement.stage == "images" and levels[requirement] == 1:
            levels[requirement] = last
    return levels


def _run(spec: Any, worker: WorkerContext, gpu: float, board: Any) -> tuple[float, dict[str, Any]]:
    import torch

    import_open_clip_alone()
    torch.set_num_threads(1)
    keep_to_share(gpu)
    note_devices()
    started = time.monotonic()
    note = Note(board, name_of(artifact_key(spec)))
    worker.store.locks.on_wait = note.waits
    startup: float | None = 0.0
    match spec:
        case FeaturesSpec():
            artifact = build_features(spec, worker, note)
        case LabelsSpec():
            artifact = build_labels(spec, worker)
        case LoraSpec():
            build_labels(spec.labels, worker)  # before, where they are missing
            steps: list[tuple[int, float]] = []  # that are done, and when

            def report(step: int, total: int, loss: float) -> None:
                steps.append((step, time.monotonic()))
                note(step, total)

            artifact = build_lora(spec, worker, report)
            startup = _startup(steps, spec.training.steps, time.monotonic() - started)
        case _:
            raise TypeError(type(spec).__name__)
    return time.monotonic() - started, {**artifact.record["info"], "startup": startup}


def _startup(done: Sequence[tuple[int, float]], steps: int, seconds: float) -> float | None:
    """Seconds beyond what all steps take at the pace of those after the first; None: not known.

    Below 0 where a training went on from steps of another process.
    """
    if len(done) < 2:
        return None
    (first, since), (last, until) = done[0], done[-1]
    return seconds - steps * (until - since) / (last - first)


def _build(
    requirements: Sequence[Requirement], context: Context
) -> Generator[None, None, list[tuple[Requirement, Failure]]]:
    worker, resources, watcher = context.worker, context.resources, context.watcher
    follow = {
        requirement.spec.labels
        for requirement in requirements
        if isinstance(requirement.spec, LoraSpec)
    }
    waiting = deque(
        (requirement, worker) for requirement in requirements if requirement.spec not in follow
    )
    running: dict[Any, Requirement] = {}
    tries: Counter[tuple[Requirement, str]] = Counter()
    failures = []
    while waiting or running:
        while waiting and len(running) < context.allocation.tasks(
            resources.want(waiting[0][0].stage)
        ):
            requirement, there = waiting.popleft()
            want = resources.want(requirement.stage)
            task = ray.remote(_run).options(
                num_cpus=want.cpu,
                num_gpus=want.gpu,
                resources=dict(want.custom) or None,
                max_retries=0,
            )
            there = replace(there, device="cuda" if want.gpu else "cpu")
            running[task.remote(requirement.spec, there, want.gpu, context.board)] = requirement
        over, _ = ray.wait(list(running), timeout=0)
        if not over:
            yield
        for one in over:
            requirement = running.pop(one)
            try:
                seconds, facts = ray.get(one)
            except Exception as problem:
                failure = _failure(problem)
                name = failure.failure_class
                tries[requirement, name] += 1
                if tries[requirement, name] > CLASSES[name].retries:
                    failures.append((requirement, failure))
                    continue
                watcher.retried(requirement, failure)
                waiting.append((requirement, worker.with_less(tries[requirement, "oom"])))
                continue
            if isinstance(requirement.spec, LoraSpec):
                _labels_are_there(requirement.spec.labels, requirements, worker, watcher)
            watcher.prepared(requirement, seconds, facts)
    return failures


def _failure(problem: Exception) -> Failure:
    """What a task died of: its own exception, or what the cluster says of its process."""
    cause = getattr(problem, "cause", None)
    if isinstance(cause, Exception):
        return Failure(classify(cause), f"{type(cause).__name__}: {cause}")
    said = f"{type(problem).__name__}: {problem}"
    return Failure(of_death(said), said.partition("\n")[0])


def _labels_are_there(
    labels: LabelsSpec, requirements: Sequence[Requirement], worker: WorkerContext, watcher: Watcher
) -> None:
    for requirement in requirements:
        if requirement.spec == labels:
            record = worker.store.record(labels)
            watcher.prepared(requirement, record["seconds"], record["info"])


def contact_sheet(
    drawn: SyntheticFeaturesSpec,
    base: SyntheticFeaturesSpec | None,
    features: FeaturesSpec,
    worker: WorkerContext,
) -> Generator[None, None, tuple[bytes, dict[str, float]]]:
    """A PNG of real, base and LoRA images, and how many of each CLIP recognises. A coroutine."""
    return (yield from _beside(pictures.contact_sheet, drawn, base, features, worker))


def audit(
    row: Audited, worker: WorkerContext, board: Any
) -> Generator[None, None, dict[str, bytes]]:
    """The audit card of a row, as files to keep beside the sweep. A coroutine."""
    card, png = yield from _beside(auditor.made, row, worker, Note(board, "audit"))
    return card_files(card, png)


def _beside(work: Callable[..., T], *given: Any) -> Generator[None, None, T]:
    """The result of a task that runs beside trials, which hold all the cores while they run."""
    task = ray.remote(work).options(num_cpus=0).remote(*given)
    while not ray.wait([task], timeout=0)[0]:
        yield
    result: T = ray.get(task)
    return result

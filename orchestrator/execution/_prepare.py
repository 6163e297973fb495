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
from orchestrator.planning import Need, holds, name_of
from orchestrator.planning.audit_card import Audited, card_files
from orchestrator.planning.plan import level
from orchestrator.stages import auditor, pictures
from orchestrator.stages.build import build_features, build_labels, build_lora
from orchestrator.stages.context import Workshop, keep_to_share

T = TypeVar("T")


def prepare(needs: Sequence[Need], context: Context) -> Iterator[None]:
    """Make what is missing, stage after stage; within a stage side by side.

    A coroutine: it yields while it waits for the cluster.

    What fails is tried again as its class allows. In the end the watcher is told of it, and what
    would be made from it is left out.
    """
    store, watcher = context.shop.store, context.watcher
    failed: list[Any] = []  # specs
    store.look_again()
    missing = [need for need in needs if need.have(store) < need.total()]
    levels = _levels(missing)
    missing.sort(key=lambda need: levels[need])
    for _, group in groupby(missing, key=levels.__getitem__):
        together = [need for need in group if not any(holds(need.spec, one) for one in failed)]
        images = [need for need in together if need.stage == "images"]
        others = [need for need in together if need.stage != "images"]
        failures: list[tuple[Need, Failure]] = []
        if others:
            watcher.stage = others[-1].stage
            failures = yield from _build(others, context)
        if images:
            watcher.stage = "images"
            failures += yield from draw(images, context)
        for need, failure in failures:
            failed += lost_with(need)
            watcher.failed(need, failure)


def lost_with(need: Need) -> list[Any]:
    """The specs that are not there if it could not be made."""
    return [need.spec, getattr(need.spec, "images", None)]


def _levels(missing: Sequence[Need]) -> dict[Need, int]:
    """When each need comes, so that few processes have to start: labels are made by the process
    that trains the LoRA on them, and rows without LoRA are drawn with the last row."""
    levels = {need: level(need.spec) for need in missing}
    trained = {need.spec.labels for need in missing if isinstance(need.spec, LoraSpec)}
    last = max((levels[need] for need in missing if need.stage == "images"), default=0)
    for need in missing:
        if need.spec in trained:
            levels[need] += 1
        elif need.stage == "images" and levels[need] == 1:
            levels[need] = last
    return levels


def _run(spec: Any, shop: Workshop, gpu: float, board: Any) -> tuple[float, dict[str, Any]]:
    import torch

    import_open_clip_alone()
    torch.set_num_threads(1)
    keep_to_share(gpu)
    note_devices()
    started = time.monotonic()
    note = Note(board, name_of(artifact_key(spec)))
    shop.store.locks.waits = note.waits
    startup: float | None = 0.0
    match spec:
        case FeaturesSpec():
            artifact = build_features(spec, shop, note)
        case LabelsSpec():
            artifact = build_labels(spec, shop)
        case LoraSpec():
            build_labels(spec.labels, shop)  # before, where they are missing
            steps: list[tuple[int, float]] = []  # that are done, and when

            def report(step: int, total: int, loss: float) -> None:
                steps.append((step, time.monotonic()))
                note(step, total)

            artifact = build_lora(spec, shop, report)
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
    needs: Sequence[Need], context: Context
) -> Generator[None, None, list[tuple[Need, Failure]]]:
    shop, resources, watcher = context.shop, context.resources, context.watcher
    follow = {need.spec.labels for need in needs if isinstance(need.spec, LoraSpec)}
    waiting = deque((need, shop) for need in needs if need.spec not in follow)
    running: dict[Any, Need] = {}
    tries: Counter[tuple[Need, str]] = Counter()
    failures = []
    while waiting or running:
        while waiting and len(running) < context.allocation.tasks(
            resources.want(waiting[0][0].stage)
        ):
            need, there = waiting.popleft()
            want = resources.want(need.stage)
            task = ray.remote(_run).options(
                num_cpus=want.cpu,
                num_gpus=want.gpu,
                resources=dict(want.custom) or None,
                max_retries=0,
            )
            there = replace(there, device="cuda" if want.gpu else "cpu")
            running[task.remote(need.spec, there, want.gpu, context.board)] = need
        over, _ = ray.wait(list(running), timeout=0)
        if not over:
            yield
        for one in over:
            need = running.pop(one)
            try:
                seconds, facts = ray.get(one)
            except Exception as problem:
                failure = _failure(problem)
                name = failure.failure_class
                tries[need, name] += 1
                if tries[need, name] > CLASSES[name].retries:
                    failures.append((need, failure))
                    continue
                watcher.retried(need, failure)
                waiting.append((need, shop.with_less(tries[need, "oom"])))
                continue
            if isinstance(need.spec, LoraSpec):
                _labels_are_there(need.spec.labels, needs, shop, watcher)
            watcher.prepared(need, seconds, facts)
    return failures


def _failure(problem: Exception) -> Failure:
    """What a task died of: its own exception, or what the cluster says of its process."""
    cause = getattr(problem, "cause", None)
    if isinstance(cause, Exception):
        return Failure(classify(cause), f"{type(cause).__name__}: {cause}")
    said = f"{type(problem).__name__}: {problem}"
    return Failure(of_death(said), said.partition("\n")[0])


def _labels_are_there(
    labels: LabelsSpec, needs: Sequence[Need], shop: Workshop, watcher: Watcher
) -> None:
    for need in needs:
        if need.spec == labels:
            record = shop.store.record(labels)
            watcher.prepared(need, record["seconds"], record["info"])


def contact_sheet(
    drawn: SyntheticFeaturesSpec,
    base: SyntheticFeaturesSpec | None,
    features: FeaturesSpec,
    shop: Workshop,
) -> Generator[None, None, tuple[bytes, dict[str, float]]]:
    """A PNG of real, base and LoRA images, and how many of each CLIP recognises. A coroutine."""
    return (yield from _beside(pictures.contact_sheet, drawn, base, features, shop))


def audit(row: Audited, shop: Workshop, board: Any) -> Generator[None, None, dict[str, bytes]]:
    """The audit card of a row, as files to keep beside the sweep. A coroutine."""
    card, png = yield from _beside(auditor.made, row, shop, Note(board, "audit"))
    return card_files(card, png)


def _beside(work: Callable[..., T], *given: Any) -> Generator[None, None, T]:
    """The result of a task that runs beside trials, which hold all the cores while they run."""
    task = ray.remote(work).options(num_cpus=0).remote(*given)
    while not ray.wait([task], timeout=0)[0]:
        yield
    result: T = ray.get(task)
    return result

"""Run a plan's missing stages on the cluster: features, labels, LoRA, images."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Protocol

import ray

from air_core.backbone.loading import import_open_clip_alone
from air_core.specs import FeaturesSpec, LabelsSpec, LoraSpec, SyntheticFeaturesSpec
from orchestrator import auditor, pictures
from orchestrator.audit_card import Audited, card_files
from orchestrator.board import Note, watched
from orchestrator.failures import CLASSES, Failure, classify, of_death
from orchestrator.generation import draw
from orchestrator.keys import artifact_key
from orchestrator.plan import Need, holds, level, name_of
from orchestrator.session import note_devices
from orchestrator.shares import LOOK_EVERY, Pool, Shares
from orchestrator.stages import build_features, build_labels, build_lora
from orchestrator.sweep import Resources
from orchestrator.workshop import Workshop, keep_to_share


class Watcher(Protocol):
    """Is told what is being prepared."""

    def prepared(self, need: Need, seconds: float, facts: dict[str, Any]) -> None:
        """An artifact, or one shard of a row, is whole."""
        ...

    def failed(self, need: Need, failure: Failure) -> None:
        """It could not be made."""
        ...

    def retried(self, need: Need, failure: Failure) -> None:
        """It failed and is tried again."""
        ...

    def progress(self, name: str, done: int, total: int) -> None:
        """How far something long is."""
        ...

    def waiting(self, name: str, holder: str, seconds: float) -> None:
        """Somebody else makes it, or what it is made from, and is waited for so long."""
        ...

    def phase(self, stage: str, seconds: float) -> None:
        """A stage is over; it took so long by the clock."""
        ...

    def drew(self, pool: Pool) -> None:
        """A pool of generators is closed."""
        ...


def prepare(
    needs: Sequence[Need], shop: Workshop, resources: Resources, watcher: Watcher, shares: Shares
) -> None:
    """Make what is missing, stage after stage; within a stage side by side.

    What fails is tried again as its class allows. In the end the watcher is told of it, and what
    would be made from it is left out.
    """
    failed: list[Any] = []  # specs
    shop.store.look_again()
    missing = [need for need in needs if need.have(shop.store) < need.total()]
    levels = _levels(missing)
    missing.sort(key=lambda need: levels[need])
    for _, group in groupby(missing, key=levels.__getitem__):
        together = [need for need in group if not any(holds(need.spec, one) for one in failed)]
        images = [need for need in together if need.stage == "images"]
        others = [need for need in together if need.stage != "images"]
        failures: list[tuple[Need, Failure]] = []
        if others:
            with _clocked(watcher, others[-1].stage):
                failures = _build(others, shop, resources, watcher, shares)
        if images:
            with _clocked(watcher, "images"):
                failures += draw(images, shop, resources, watcher, shares)
        for need, failure in failures:
            failed += [need.spec, getattr(need.spec, "images", None)]
            watcher.failed(need, failure)


@contextmanager
def _clocked(watcher: Watcher, stage: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    watcher.phase(stage, time.monotonic() - started)


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


@dataclass(frozen=True)
class _Task:
    """One piece of work, and how much less memory it may take."""

    need: Need
    shop: Workshop
    place: ExitStack  # is closed when it is over


def _build(
    needs: Sequence[Need], shop: Workshop, resources: Resources, watcher: Watcher, shares: Shares
) -> list[tuple[Need, Failure]]:
    follow = {need.spec.labels for need in needs if isinstance(need.spec, LoraSpec)}
    waiting = deque((need, shop) for need in needs if need.spec not in follow)
    running: dict[Any, _Task] = {}
    tries: Counter[tuple[Need, str]] = Counter()
    failures = []

    def start(need: Need, shop: Workshop, board: Any) -> None:
        want = resources.want(need.stage)
        there = replace(shop, device="cuda" if want.gpu else "cpu")
        with ExitStack() as stack:
            place = stack.enter_context(shares.beside())
            stage = ray.remote(_run).options(
                num_cpus=want.cpu,
                num_gpus=want.gpu,
                resources=dict(want.custom) or None,
                scheduling_strategy=place or "DEFAULT",
                max_retries=0,
            )
            task = stage.remote(need.spec, there, want.gpu, board)
            running[task] = _Task(need, shop, stack.pop_all())

    with watched(watcher) as board:
        while waiting or running:
            while waiting and len(running) < shares.places(resources.want(waiting[0][0].stage)):
                start(*waiting.popleft(), board)
            over, _ = ray.wait(list(running), timeout=LOOK_EVERY)
            for one in over:
                task = running.pop(one)
                task.place.close()
                need = task.need
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
) -> tuple[bytes, dict[str, float]]:
    """A PNG of real, base and LoRA images, and how many of each CLIP recognises."""
    result: tuple[bytes, dict[str, float]] = ray.get(
        _beside(pictures.contact_sheet).remote(drawn, base, features, shop)
    )
    return result


LONG_LOOK = 5_000  # images: a look at fewer takes seconds, a board to report on takes one


def audit(row: Audited, shop: Workshop, watcher: Watcher) -> dict[str, bytes]:
    """The audit card of a row, as files to keep beside the sweep."""
    look = _beside(auditor.made)
    if row.images_per_class * len(row.classes) < LONG_LOOK:
        return card_files(*ray.get(look.remote(row, shop)))
    with watched(watcher) as board:
        return card_files(*ray.get(look.remote(row, shop, Note(board, "audit"))))


def _beside(work: Callable[..., Any]) -> Any:
    """As a task beside trials, which hold all the cores while they run."""
    return ray.remote(work).options(num_cpus=0)

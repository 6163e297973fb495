"""What cells read is made in a thread of its own, group after group, while trials of earlier ones
run; so is what no trial reads. A thread works and notes what became of it; the driver tells, so
ledger and budget keep their one writer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from air_core.specs import FeaturesSpec, LabelsSpec, LoraSpec
from orchestrator.failures import CLASSES, Failure
from orchestrator.plan import Need, holds
from orchestrator.store import ArtifactStore, StoreFull

if TYPE_CHECKING:
    from orchestrator.prepare import Watcher
    from orchestrator.shares import Pool

LOOK_EVERY = 0.2  # seconds


def without_images(needs: Sequence[Need], store: ArtifactStore) -> list[Need]:
    """Those that are missing and are made without a synthetic image."""
    return [need for need in needs if _without_images(need.spec) and need.have(store) == 0]


def _without_images(spec: Any) -> bool:
    match spec:
        case FeaturesSpec():
            return True
        case LabelsSpec():
            return spec.images is None
        case LoraSpec():
            return spec.labels.images is None
    return False


def waves(
    groups: Sequence[Sequence[Need]], store: ArtifactStore, workers: Callable[[], int]
) -> Iterator[tuple[int | None, list[Need]]]:
    """What to make together, in order; each group's number where that was the last of it.

    A LoRA takes one worker. So before a group's images are drawn, by all of them, as many LoRAs of
    the groups behind it are trained beside its own as there are workers.

    Args:
        groups: what each reads, in the order in which they are wanted.
        workers: how many generators there are, now.
    """
    for number, needs in enumerate(groups):
        early = {need.key: need for need in without_images(needs, store)}
        if any(isinstance(need.spec, LoraSpec) for need in early.values()):
            for behind in groups[number + 1 :]:
                if sum(isinstance(need.spec, LoraSpec) for need in early.values()) >= workers():
                    break
                early |= {need.key: need for need in without_images(behind, store)}
        if early:
            yield None, list(early.values())
        yield number, list(needs)


def hopeful(needs: Sequence[Need], lost: Sequence[Any]) -> list[Need]:
    """Without specs that were tried in vain, and what would be made from them."""
    return [need for need in needs if not any(holds(need.spec, one) for one in lost)]


class Ahead:
    """Work in a thread of its own, and a Watcher for `prepare` there.

    Args:
        make: prepares, tells the one that it is given, and says with `reached` how far it is.
        watcher: the driver's; how far something is it hears at once, all else from `tell`.
        coming: cells that it will come to.
    """

    def __init__(
        self, make: Callable[[Ahead], None], watcher: Watcher, coming: Iterable[str] = ()
    ) -> None:
        self._coming, self._awaited = set(coming), ""
        self.lost: list[Any] = []  # specs that could not be made
        self._watcher = watcher
        self._told: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._problem: BaseException | None = None
        self._spans: list[tuple[str, float, float]] = []  # stages, from when to when
        # Who is being stopped does not wait for it: its work dies with Ray.
        self._thread = threading.Thread(target=self._work, args=(make,), daemon=True)
        self._thread.start()

    def _work(self, make: Callable[[Ahead], None]) -> None:
        try:
            make(self)
        except BaseException as problem:
            self._problem = problem

    def reached(self, cells: Iterable[str]) -> bool:
        """What these read is made, or was tried. Has the driver waited for it?"""
        self._coming -= set(cells)
        return self._awaited in cells

    def has(self, cell: str) -> bool:
        """Is what a cell reads made, or was it tried?"""
        return cell not in self._coming

    def wait(self, cell: str | None = None) -> None:
        """Until it has come to a cell, or to its end; and tell the driver what became of it."""
        began = time.monotonic()
        self._awaited = cell or ""
        while self._thread.is_alive() and (cell is None or cell in self._coming):
            self._thread.join(LOOK_EVERY)
            self.tell()
        self.tell()
        for stage, start, end in self._spans:  # by the clock it took what was waited for
            if end > began:
                self._watcher.phase(stage, end - max(start, began))
        self._spans.clear()
        if self._problem is not None:
            raise self._problem

    def tell(self) -> None:
        """The driver hears what became of it so far."""
        while True:
            try:
                tell = self._told.get_nowait()
            except Empty:
                return
            tell()

    # Watcher

    def prepared(self, need: Need, seconds: float, facts: dict[str, Any]) -> None:
        self._told.put(lambda: self._watcher.prepared(need, seconds, facts))

    def failed(self, need: Need, failure: Failure) -> None:
        self.lost += [need.spec, getattr(need.spec, "images", None)]
        self._told.put(lambda: self._watcher.failed(need, failure))
        if CLASSES[failure.failure_class].stops_after == 1:
            raise StoreFull(failure.message)

    def retried(self, need: Need, failure: Failure) -> None:
        self._told.put(lambda: self._watcher.retried(need, failure))

    def progress(self, name: str, done: int, total: int) -> None:
        self._watcher.progress(name, done, total)

    def waiting(self, name: str, holder: str, seconds: float) -> None:
        self._watcher.waiting(name, holder, seconds)

    def phase(self, stage: str, seconds: float) -> None:
        now = time.monotonic()
        self._spans.append((stage, now - seconds, now))

    def drew(self, pool: Pool) -> None:
        self._told.put(lambda: self._watcher.drew(pool))

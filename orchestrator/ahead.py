"""What the next cells read is begun while trials run that do not need it; so is what none needs.

Features, labels and LoRA alone, which take a worker each; rows of images take all of them. A thread
works and notes what became of it; the driver tells, so ledger and budget keep their one writer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from air_core.specs import FeaturesSpec, LabelsSpec, LoraSpec
from orchestrator.failures import Failure
from orchestrator.plan import Need
from orchestrator.store import ArtifactStore

if TYPE_CHECKING:
    from orchestrator.prepare import Watcher

LOOK_EVERY = 0.2  # seconds


def can_come_ahead(needs: Sequence[Need], store: ArtifactStore) -> list[Need]:
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


class Ahead:
    """Work in a thread of its own, and a Watcher for `prepare` there.

    Args:
        make: prepares, and tells the watcher that it is given.
        watcher: the driver's; how far something is it hears at once, all else from `tell`.
    """

    def __init__(self, make: Callable[[Watcher], None], watcher: Watcher) -> None:
        self._watcher = watcher
        self._told: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._problem: BaseException | None = None
        # Who is being stopped does not wait for it: its work dies with Ray.
        self._thread = threading.Thread(target=self._work, args=(make,), daemon=True)
        self._thread.start()

    def _work(self, make: Callable[[Watcher], None]) -> None:
        try:
            make(self)
        except BaseException as problem:
            self._problem = problem

    def tell(self) -> None:
        """Wait for the end, and tell the driver what became of it."""
        while self._thread.is_alive():
            self._thread.join(LOOK_EVERY)
            self._tell()
        self._tell()
        if self._problem is not None:
            raise self._problem

    def _tell(self) -> None:
        while not self._told.empty():  # nobody else takes from it
            self._told.get()()

    # Watcher

    def prepared(self, need: Need, seconds: float, facts: dict[str, Any]) -> None:
        self._told.put(lambda: self._watcher.prepared(need, seconds, facts))

    def failed(self, need: Need, failure: Failure) -> None:
        self._told.put(lambda: self._watcher.failed(need, failure))

    def retried(self, need: Need, failure: Failure) -> None:
        self._told.put(lambda: self._watcher.retried(need, failure))

    def progress(self, name: str, done: int, total: int) -> None:
        self._watcher.progress(name, done, total)

    def waiting(self, name: str, holder: str, seconds: float) -> None:
        self._watcher.waiting(name, holder, seconds)

    def phase(self, stage: str, seconds: float) -> None:
        """By the clock it took no time but what `tell` waits."""

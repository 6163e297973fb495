"""What the cells of a run read: made ahead of their trials, group after group, and shown."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from air_core.specs import FeaturesSpec, LabelsSpec, LoraSpec, SyntheticFeaturesSpec
from orchestrator.execution._allocation import Context
from orchestrator.execution._run import Run
from orchestrator.failures import first_line
from orchestrator.planning import Plan, Requirement, Slot, holds, possible_trials, requirements_of
from orchestrator.planning.audit_card import Audited, audited, known_card
from orchestrator.planning.plan import moved_slots
from orchestrator.spec import Cell
from orchestrator.store import ArtifactStore

if TYPE_CHECKING:
    from orchestrator.stages.context import WorkerContext

log = logging.getLogger(__name__)

PAUSE = 0.05  # seconds between two looks at what has come, while no trials run


def without_images(requirements: Sequence[Requirement], store: ArtifactStore) -> list[Requirement]:
    """Those that are missing and are made without a synthetic image."""
    return [
        requirement
        for requirement in requirements
        if _without_images(requirement.spec) and requirement.have(store) == 0
    ]


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
    groups: Sequence[Sequence[Requirement]], store: ArtifactStore, workers: Callable[[], int]
) -> Iterator[tuple[int | None, list[Requirement]]]:
    """What to make together, in order; each group's number where that was the last of it.

    A LoRA takes one worker. So before a group's images are drawn, by all of them, as many LoRAs of
    the groups behind it are trained beside its own as there are workers.

    Args:
        groups: what each reads, in the order in which they are wanted.
        workers: how many generators there are, now.
    """
    for number, requirements in enumerate(groups):
        early = {
            requirement.key: requirement for requirement in without_images(requirements, store)
        }
        if any(isinstance(requirement.spec, LoraSpec) for requirement in early.values()):
            for behind in groups[number + 1 :]:
                if (
                    sum(isinstance(requirement.spec, LoraSpec) for requirement in early.values())
                    >= workers()
                ):
                    break
                early |= {
                    requirement.key: requirement for requirement in without_images(behind, store)
                }
        if early:
            yield None, list(early.values())
        yield number, list(requirements)


class Prefetch:
    """Groups of cells, and which of them have what they read.

    What is missing is made group after group by coroutines (`prepare`), which `advance` moves on
    beside trials and `wait` while none run.

    Args:
        groups: cells that read the same images together, in the order in which they should come.
        prepare_only: no trial runs; what is missing is made, whoever reads it.
    """

    def __init__(
        self, run: Run, plan: Plan, groups: Sequence[Sequence[Cell]], prepare_only: bool
    ) -> None:
        self.run, self.plan, self.prepare_only = run, plan, prepare_only
        run.location.store.refresh_listings()  # another driver may have ended since it was planned
        self.requirements = {group[0].id: needs_of_cells(run, plan, group) for group in groups}
        self.waiting = deque(group for group in groups if self._waits(group))
        waits = {cell.id for group in self.waiting for cell in group}
        self.ready = {cell.id for group in groups for cell in group} - waits  # cells
        self.work: list[Iterator[None]] = []  # coroutines that have not ended
        self.sheet_begun = False
        self.shown: set[str] = set()  # rows that have a card or will have one
        self.begun = False

    def _waits(self, group: Sequence[Cell]) -> bool:
        """Has it trials to run that read what is not there?"""
        store = self.run.location.store
        if not any(
            requirement.have(store) < requirement.total()
            for requirement in self.requirements[group[0].id]
        ):
            return False
        cells = {cell.id for cell in group}
        slots = [slot for slot in self.plan.slots if slot.cell.id in cells]
        left = sum(self.plan.left[cell] for cell in cells)
        left -= sum(slot.id in self.run.given_up for slot in slots)
        return left > 0 or self.prepare_only or any(map(self._is_awaited, slots))

    def _is_awaited(self, slot: Slot) -> bool:
        """Is its trial that of another cell, as where two folders hold the same images, and not
        there yet? Whose turn comes first computes it."""
        away = slot.id in self.plan.pruned or slot.id in self.run.given_up
        return not away and not self.run.location.store.has(slot.spec)

    def has(self, cell: Cell) -> bool:
        """Is what a cell reads there, or known not to come?"""
        return cell.id in self.ready

    def begin(self) -> None:
        """Have everything that is missing made, from now on, whenever `advance` is called."""
        if self.begun:
            return
        self.begun = True
        for cell, requirements in self.requirements.items():
            if cell in self.ready:
                self._show(requirements)
        if self.waiting:
            self.work.append(self._make())

    def _make(self) -> Iterator[None]:
        """Make what each group reads, in order."""
        from orchestrator.execution._prepare import prepare

        run, groups = self.run, list(self.waiting)
        assert run.allocation is not None
        assert run.progress is not None
        last = len(groups) - 1
        requirements = [self._makeable(self.requirements[group[0].id]) for group in groups]
        run.allocation.preparing = True
        worker, resources = worker_context(run), run.sweep.resources
        context = Context(worker, resources, run, run.allocation, run.progress.board)
        for number, wave in waves(
            requirements, worker.store, partial(run.allocation.tasks, resources.generator)
        ):
            yield from prepare(self._makeable(wave), context)
            if number is not None:
                run.allocation.preparing = number < last
                run.event_log.append("cells_ready")
                self.waiting.popleft()
                self.ready |= {cell.id for cell in groups[number]}
                self._show(requirements[number])
                yield  # trials begin before the next pool is opened, which would take their room

    def _makeable(self, requirements: Sequence[Requirement]) -> list[Requirement]:
        """Without what failed in this run, and what would be made from it."""
        from orchestrator.execution._prepare import lost_with

        lost = [
            spec
            for requirement, _ in self.run.failed_requirements
            for spec in lost_with(requirement)
        ]
        return [
            requirement
            for requirement in requirements
            if not any(holds(requirement.spec, one) for one in lost)
        ]

    def can_afford(self) -> bool:
        """May what comes next be made?"""
        requirements = self.requirements[self.waiting[0][0].id]
        assert self.run.allocation is not None
        workers = max(1, self.run.allocation.generators())
        return self.run.budget_tracker.can_prepare(requirements, self.run.location.store, workers)

    def advance(self) -> None:
        """Look what has come, and start what can start. Returns at once."""
        self.run.check()
        for one in list(self.work):
            if next(one, self) is self:  # it ended
                self.work.remove(one)

    def wait(self) -> None:
        """Until the next group has what it reads, or it is known that some cannot be made."""
        run, store, group = self.run, self.run.location.store, self.waiting[0]
        requirements = self.requirements[group[0].id]
        left = {
            str(requirement.key): requirement.total() - requirement.have(store)
            for requirement in requirements
        }
        left = {key: count for key, count in left.items() if count}
        run.event_log.append("cells_waiting", cells=[cell.id for cell in group], artifacts=left)
        while self.waiting and self.waiting[0] is group:
            self._advance_alone()

    def finish(self) -> None:
        """Wait for what no trial reads."""
        while self.work:
            self._advance_alone()

    def _advance_alone(self) -> None:
        began = time.monotonic()
        self.advance()
        time.sleep(PAUSE)
        self.run.tally.add_wall(self.run.stage, time.monotonic() - began)

    @cached_property
    def _rows(self) -> Sequence[Audited]:
        assignments = self.run.sweep.seeds.assignments()
        return audited(possible_trials(self.plan.cells, assignments, self.run.resolver))

    def _show(self, requirements: Sequence[Requirement]) -> None:
        """Begin what people look at and no trial reads: contact sheet, audit cards. One after the
        other, so that one worker imports torch for all of it."""
        work = []
        if not self.sheet_begun and (sheet := _sheet(self.run, requirements)) is not None:
            self.sheet_begun = True
            work.append(sheet)
        new = [r for r in self._rows if r.name not in self.shown and _lacks_card(r, self.run)]
        self.shown |= {row.name for row in new}
        work += [_card(self.run, row) for row in new]
        if work:
            self.work.append(chain.from_iterable(work))


def needs_of_cells(run: Run, plan: Plan, cells: Sequence[Cell]) -> list[Requirement]:
    """What some cells read, also in trials that went on in fp32."""
    ids, moved = {cell.id for cell in cells}, moved_slots(run.event_log)
    earlier = [slot.spec for slot in plan.slots if slot.cell.id in ids and slot.id in moved]
    possible = possible_trials(cells, run.sweep.seeds.assignments(), run.resolver)
    return requirements_of([*possible, *earlier, *run.moving])


def worker_context(run: Run) -> WorkerContext:
    from orchestrator.stages.context import WorkerContext

    gpu = run.sweep.resources.trial.gpu
    batch = run.sweep.resources.encoder.batch
    return WorkerContext(
        run.location.store, run.location.data_root, "cuda" if gpu else "cpu", batch
    )


def _sheet(run: Run, requirements: Sequence[Requirement]) -> Iterator[None] | None:
    """Draws the contact sheet, where it is missing. A coroutine."""
    store = run.location.store
    rows = [
        requirement.spec
        for requirement in requirements
        if isinstance(requirement.spec, SyntheticFeaturesSpec)
        and requirement.have(store) == requirement.total()
    ]
    sheet = run.location.folder / "contact_sheet.png"
    if not rows or sheet.exists():
        return None
    drawn, base = _shown(rows)
    features = next(
        requirement.spec
        for requirement in requirements
        if isinstance(requirement.spec, FeaturesSpec)
    )

    def draw() -> Iterator[None]:
        from orchestrator.execution._prepare import contact_sheet

        try:
            png, run.tally.shares = yield from contact_sheet(
                drawn, base, features, worker_context(run)
            )
        except Exception as problem:  # a sweep is not about its picture
            log.warning("no contact sheet: %s", first_line(problem))
        else:
            run.location.write(sheet.name, png)

    return draw()


def _lacks_card(row: Audited, run: Run) -> bool:
    """Is a row whole by now, and without its audit card?"""
    whole = row.requirement.have(run.location.store) == row.requirement.total()
    return whole and known_card(row, run.location) is None


def _card(run: Run, row: Audited) -> Iterator[None]:
    """Makes the audit card of a row. A coroutine."""
    from orchestrator.execution._prepare import audit

    assert run.progress is not None
    try:
        files = yield from audit(row, worker_context(run), run.progress.board)
    except Exception as problem:  # a sweep is not about its audit
        log.warning("%s: no card: %s", row.name, first_line(problem))
        return
    for name, content in files.items():
        run.location.write(name, content)


def _shown(
    rows: Sequence[SyntheticFeaturesSpec],
) -> tuple[SyntheticFeaturesSpec, SyntheticFeaturesSpec | None]:
    """The row to show, and the one without LoRA to show it against.

    The row that trials read comes after those that it was made from.
    """
    tuned = [row for row in rows if getattr(row.images, "lora", None) is not None]
    plain = [row for row in rows if getattr(row.images, "lora", None) is None]
    if tuned:
        return tuned[-1], plain[-1] if plain else None
    return plain[-1], None

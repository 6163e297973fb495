"""What the cells of a run read: made ahead of their trials, group after group, and shown."""

from __future__ import annotations

import functools
import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from air_core.specs import FeaturesSpec, SyntheticFeaturesSpec
from orchestrator.ahead import Ahead, hopeful, waves
from orchestrator.audit_card import Audited, audited
from orchestrator.audits import known_card
from orchestrator.failures import first_line
from orchestrator.plan import Need, Plan, Slot, moved_slots, needs_of, possible_trials
from orchestrator.running import Run
from orchestrator.sweep import Budget, Cell

if TYPE_CHECKING:
    from orchestrator.prepare import Watcher
    from orchestrator.workshop import Workshop

log = logging.getLogger(__name__)


class Inputs:
    """Groups of cells, and which of them have what they read.

    Args:
        groups: cells that read the same images together, in the order in which they should come.
        prepare_only: no trial runs; what is missing is made, whoever reads it.
    """

    def __init__(
        self, run: Run, plan: Plan, groups: Sequence[Sequence[Cell]], prepare_only: bool
    ) -> None:
        self.run, self.plan, self.prepare_only = run, plan, prepare_only
        run.place.store.look_again()  # another driver may have ended since it was planned
        self.needs = {group[0].id: needs_of_cells(run, plan, group) for group in groups}
        self.waiting = deque(group for group in groups if self._waits(group))
        waits = {cell.id for group in self.waiting for cell in group}
        self.ready = {cell.id for group in groups for cell in group} - waits  # cells
        self.ahead: Ahead | None = None
        self.beside: list[Ahead] = []
        self.sheet_begun = False
        self.shown: set[str] = set()  # rows that have a card or will have one
        self.begun = False

    def _waits(self, group: Sequence[Cell]) -> bool:
        """Has it trials to run that read what is not there?"""
        store = self.run.place.store
        if not any(need.have(store) < need.total() for need in self.needs[group[0].id]):
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
        return not away and not self.run.place.store.has(slot.spec)

    def has(self, cell: Cell) -> bool:
        """Is what a cell reads there, or known not to come?"""
        return cell.id in self.ready

    def begin(self) -> None:
        """Let a thread make what is missing. Not on a budget: trials might spend meanwhile what
        it was to cost."""
        if self.begun:
            return
        self.begun = True
        ready = [
            need for first, needs in self.needs.items() if first in self.ready for need in needs
        ]
        self._show(ready)
        if not self.waiting or self.run.sweep.budget != Budget():
            return
        from orchestrator.prepare import prepare

        shares, groups = self.run.shares, list(self.waiting)
        assert shares is not None
        needs = [self._hopeful(group) for group in groups]
        shop, resources = workshop(self.run), self.run.sweep.resources

        def make(ahead: Ahead) -> None:
            loras = functools.partial(shares.places, resources.generator)
            for number, wave in waves(needs, shop.store, loras):
                prepare(hopeful(wave, ahead.lost), shop, resources, ahead, shares)
                if number is not None:
                    shares.preparing = number + 1 < len(needs)
                    awaited = ahead.reached([cell.id for cell in groups[number]])
                    if awaited and not self.prepare_only:
                        shares.give_way()

        shares.preparing = True
        self.ahead = Ahead(make, self.run, [cell.id for group in groups for cell in group])

    def _hopeful(self, group: Sequence[Cell]) -> list[Need]:
        """What a group reads, without what this run has tried often enough."""
        return hopeful(self.needs[group[0].id], [need.spec for need, _ in self.run.hopeless])

    def afforded(self) -> bool:
        """May what comes next be made?"""
        needs = self.needs[self.waiting[0][0].id]
        assert self.run.shares is not None
        workers = max(1, self.run.shares.generators())
        return self.run.purse.affords_preparing(needs, self.run.place.store, workers)

    def look(self) -> None:
        """Take what has come meanwhile."""
        if self.ahead is not None:
            self.ahead.tell()
            while self.waiting and self.ahead.has(self.waiting[0][0].id):
                self.wait_for_next()

    def wait_for_next(self) -> None:
        """Until the next group has what it reads, or it is known that some cannot be made."""
        from orchestrator.prepare import prepare

        run, store = self.run, self.run.place.store
        assert run.shares is not None
        group = self.waiting[0]
        needs = self.needs[group[0].id]
        left = {str(need.key): need.total() - need.have(store) for need in needs}
        left = {key: count for key, count in left.items() if count}
        run.ledger.append("cells_waiting", cells=[cell.id for cell in group], artifacts=left)
        if self.ahead is not None:
            self.ahead.wait(group[0].id)
        prepare(self._hopeful(group), workshop(run), run.sweep.resources, run, run.shares)
        run.ledger.append("cells_ready")
        self.waiting.popleft()
        self.ready |= {cell.id for cell in group}
        self._show(needs)

    @functools.cached_property
    def _rows(self) -> Sequence[Audited]:
        assignments = self.run.sweep.seeds.assignments()
        return audited(possible_trials(self.plan.cells, assignments, self.run.resolver))

    def _show(self, needs: Sequence[Need]) -> None:
        """Begin what people look at and no trial reads: contact sheet, audit cards. One after the
        other, so that one worker imports torch for all of it."""
        works = []
        sheet = None if self.sheet_begun else _sheet(self.run, needs)
        if sheet is not None:
            self.sheet_begun = True
            works.append(sheet)
        new = [r for r in self._rows if r.name not in self.shown and _lacks_card(r, self.run)]
        if new:
            self.shown |= {row.name for row in new}
            works.append(_cards(self.run, new))

        def make(ahead: Ahead) -> None:
            for work in works:
                work(ahead)

        if works:
            self.beside.append(Ahead(make, self.run))

    def finish(self) -> None:
        """Wait for what no trial reads."""
        for one in self.beside:
            one.wait()
        if self.ahead is not None:
            self.ahead.wait()


def needs_of_cells(run: Run, plan: Plan, cells: Sequence[Cell]) -> list[Need]:
    """What some cells read, also in trials that went on in fp32."""
    ids, moved = {cell.id for cell in cells}, moved_slots(run.ledger)
    earlier = [slot.spec for slot in plan.slots if slot.cell.id in ids and slot.id in moved]
    possible = possible_trials(cells, run.sweep.seeds.assignments(), run.resolver)
    return needs_of([*possible, *earlier, *run.moving])


def workshop(run: Run) -> Workshop:
    from orchestrator.workshop import Workshop

    gpu = run.sweep.resources.trial.gpu
    batch = run.sweep.resources.encoder.batch
    return Workshop(run.place.store, run.place.data_root, "cuda" if gpu else "cpu", batch)


def _sheet(run: Run, needs: Sequence[Need]) -> Callable[[Watcher], None] | None:
    """Draws the contact sheet, where it is missing."""
    store = run.place.store
    rows = [
        need.spec
        for need in needs
        if isinstance(need.spec, SyntheticFeaturesSpec) and need.have(store) == need.total()
    ]
    sheet = run.place.folder / "contact_sheet.png"
    if not rows or sheet.exists():
        return None
    from orchestrator.prepare import contact_sheet

    drawn, base = _shown(rows)
    features = next(need.spec for need in needs if isinstance(need.spec, FeaturesSpec))

    def draw(watcher: Watcher) -> None:
        try:
            png, run.tally.shares = contact_sheet(drawn, base, features, workshop(run))
        except Exception as problem:  # a sweep is not about its picture
            log.warning("no contact sheet: %s", first_line(problem))
        else:
            run.place.write(sheet.name, png)

    return draw


def _lacks_card(row: Audited, run: Run) -> bool:
    """Is a row whole by now, and without its audit card?"""
    whole = row.need.have(run.place.store) == row.need.total()
    return whole and known_card(row, run.place) is None


def _cards(run: Run, rows: Sequence[Audited]) -> Callable[[Watcher], None]:
    """Makes the audit cards of rows."""
    from orchestrator.prepare import audit

    def look(watcher: Watcher) -> None:
        for row in rows:
            try:
                files = audit(row, workshop(run), watcher)
            except Exception as problem:  # a sweep is not about its audit
                log.warning("%s: no card: %s", row.name, first_line(problem))
                continue
            for name, content in files.items():
                run.place.write(name, content)

    return look


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

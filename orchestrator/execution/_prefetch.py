"""Prefetch: prepares the inputs of cells before their trials, group after group, then draws the
contact sheet and searches ready images for copies of test images."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, takewhile

from air_core.specs import SplitSettings
from orchestrator.execution._state import PreparationContext, RunState
from orchestrator.failures import first_line
from orchestrator.formatting import plural
from orchestrator.keys import StageSpec
from orchestrator.planning import (
    Plan,
    Requirement,
    possible_trials,
    requirements_of,
)
from orchestrator.planning.plan import fp32_slots, independent_of, merge
from orchestrator.spec import Cell
from orchestrator.stages import FeaturesSpec, FolderImages, LoraSpec, SyntheticFeaturesSpec
from orchestrator.stages.context import WorkerContext
from orchestrator.store import ArtifactStore
from orchestrator.store.artifacts import PROVENANCE

log = logging.getLogger(__name__)

POLL_INTERVAL = 0.05  # seconds between checks of the cluster while no trials run
MAX_COPIES = 3  # copies of test images that a message names


def missing_without_images(
    requirements: Sequence[Requirement], store: ArtifactStore
) -> list[Requirement]:
    """Missing requirements that can be made without a synthetic image."""
    return [
        requirement
        for requirement in requirements
        if not requirement.spec.is_drawn and not requirement.is_complete(store)
    ]


def waves(
    groups: Sequence[Sequence[Requirement]], store: ArtifactStore, workers: Callable[[], int]
) -> Iterator[tuple[int, list[Requirement]]]:
    """Requirements to make together, in order, each time with the number of groups that need
    nothing more afterwards.

    Training a LoRA takes one worker, drawing images takes all. So before the images of a group are
    drawn, its LoRAs are trained side by side with LoRAs of later groups, as many as there are
    workers. Groups that then lack only images or denoising errors are drawn together, since each
    pool of generators takes a while to start. The images without LoRA of a group, which no trial
    reads, come after the images of the next group.

    Args:
        groups: requirements of each group, in the order in which trials need them.
        workers: returns the number of generators that fit the cluster now.
    """
    done = 0
    while done < len(groups):
        early = dict.fromkeys(missing_without_images(groups[done], store))
        if _lora_count(early):
            for later in groups[done + 1 :]:
                if _lora_count(early) >= workers():
                    break
                early |= dict.fromkeys(missing_without_images(later, store))
        if early:
            yield done, list(early)
        wave: list[Requirement] = []
        compared: list[Requirement] = []
        together = [groups[done]]
        together += takewhile(
            lambda group: not missing_without_images(group, store), groups[done + 1 :]
        )
        for group in together:
            wave += [*(each for each in group if not each.compared_with), *compared]
            compared = [each for each in group if each.compared_with]
        done += len(together)
        yield done, merge([*wave, *compared])


def _lora_count(requirements: Iterable[Requirement]) -> int:
    return sum(requirement.stage == LoraSpec.stage for requirement in requirements)


class Prefetch:
    """Makes the inputs of groups of cells, and tracks which cells have all their inputs.

    Coroutines make missing inputs group after group (`prepare`). `advance` resumes them beside
    trials, `wait` while no trials run.

    Args:
        groups: cells that read the same images together, in the order in which they should run.
        prepare_only: no trial runs, and all missing inputs are made.
    """

    def __init__(
        self, state: RunState, plan: Plan, groups: Sequence[Sequence[Cell]], prepare_only: bool
    ) -> None:
        self.state, self.plan, self.prepare_only = state, plan, prepare_only
        state.location.store.refresh_listings()  # of artifacts that another driver added
        self.requirements = {group[0].id: cell_requirements(state, plan, group) for group in groups}
        self.pending = deque(group for group in groups if self._is_pending(group))
        self.unpictured = deque(self.pending)  # groups whose pictures have not started
        pending_cells = {cell.id for group in self.pending for cell in group}
        self.ready = {cell.id for group in groups for cell in group} - pending_cells
        self.coroutines: list[Iterator[None]] = []  # that have not ended
        self.has_contact_sheet = False
        self.searched_rows: set[StageSpec] = set()  # for copies of test images
        self.started = False

    def _is_pending(self, group: Sequence[Cell]) -> bool:
        """Whether a group has trials to run whose inputs are missing."""
        store = self.state.location.store
        if all(requirement.is_complete(store) for requirement in self.requirements[group[0].id]):
            return False
        cells = {cell.id for cell in group}
        if self.prepare_only or any(self.plan.left[cell] for cell in cells):
            return True
        # A slot may share its trial with a cell that the plan counts it for, where two folders
        # have the same images. The cell that comes first runs the trial.
        return any(not store.has(slot.spec) for slot in self.plan.slots if slot.cell.id in cells)

    def is_ready(self, cell: Cell) -> bool:
        """Whether the inputs of a cell exist, or failed and are not retried in this run."""
        return cell.id in self.ready

    def start(self) -> None:
        """Start to make all missing inputs; `advance` must be called regularly afterwards."""
        if self.started:
            return
        self.started = True
        for cell, requirements in self.requirements.items():
            if cell in self.ready:
                self._start_pictures(requirements)
        if self.pending:
            self.coroutines.append(self._prepare_groups())

    def _prepare_groups(self) -> Iterator[None]:
        """Make the inputs of the groups, in order."""
        from orchestrator.execution._prepare import prepare

        state = self.state
        assert state.allocation is not None
        assert state.progress is not None
        groups = [self._buildable(self.requirements[group[0].id]) for group in self.pending]
        state.allocation.preparing = True
        worker, resources = worker_context(state), state.sweep.resources
        context = PreparationContext(
            worker, resources, state, state.allocation, state.progress.actor
        )
        max_workers = partial(state.allocation.max_tasks, resources.generator)
        for done, wave in waves(groups, worker.store, max_workers):
            for row in prepare(self._buildable(wave), context):
                if row is not None:
                    self._take_complete(max_left=len(groups))
                yield
            self._take_complete(max_left=len(groups) - done)
            # Let trials start before the next pool is opened, which would take their resources.
            yield
        state.allocation.preparing = False

    def _take_complete(self, max_left: int) -> None:
        """Mark groups as ready whose inputs exist; start the pictures of those that also have
        their images without LoRA. Inputs of groups before the last `max_left` have failed."""

        def is_over(groups: Sequence[Sequence[Cell]], with_compared: bool) -> bool:
            return len(groups) > max_left or all(
                requirement.is_complete(self.state.location.store)
                for requirement in self.requirements[groups[0][0].id]
                if with_compared or not requirement.compared_with
            )

        while self.pending and is_over(self.pending, with_compared=False):
            self.ready |= {cell.id for cell in self.pending.popleft()}
            self.state.event_log.append("cells_ready")
        while len(self.unpictured) > len(self.pending) and is_over(self.unpictured, True):
            self._start_pictures(self.requirements[self.unpictured.popleft()[0].id])

    def _buildable(self, requirements: Sequence[Requirement]) -> list[Requirement]:
        """Drop requirements that failed in this run or depend on one that failed."""
        failed = (requirement for requirement, _ in self.state.failed_requirements)
        return independent_of(failed, requirements)

    def advance(self) -> None:
        """Process finished work and start new work, without waiting."""
        self.state.check()
        for coroutine in list(self.coroutines):
            if next(coroutine, self) is self:  # it has ended
                self.coroutines.remove(coroutine)

    def wait(self) -> None:
        """Wait until the next group has its inputs, or some of them failed."""
        state, store, group = self.state, self.state.location.store, self.pending[0]
        missing = {
            str(requirement.key): count
            for requirement in self.requirements[group[0].id]
            if not requirement.compared_with
            and (count := requirement.total() - requirement.have(store))
        }
        state.event_log.append(
            "cells_waiting", cells=[cell.id for cell in group], artifacts=missing
        )
        while self.pending and self.pending[0] is group:
            self._advance_and_sleep()

    def finish(self) -> None:
        """Wait for the contact sheet and the search for copies."""
        while self.coroutines:
            self._advance_and_sleep()

    def _advance_and_sleep(self) -> None:
        began = time.monotonic()
        self.advance()
        time.sleep(POLL_INTERVAL)
        self.state.statistics.add_wall(self.state.stage, time.monotonic() - began)

    def _start_pictures(self, requirements: Sequence[Requirement]) -> None:
        """Start the contact sheet and the search for copies, which no trial needs: one after the
        other, so that one worker imports torch for all of them."""
        work = []
        if not self.has_contact_sheet:
            sheet = _contact_sheet(self.state, requirements)
            if sheet is not None:
                self.has_contact_sheet = True
                work.append(sheet)
        rows = {
            requirement.spec
            for requirement in requirements
            if isinstance(getattr(requirement.spec, "images", None), FolderImages)
            and requirement.is_complete(self.state.location.store)
        } - self.searched_rows
        self.searched_rows |= rows
        if rows:
            work += _searches_for_copies(self.state, self.plan, rows)
        if work:
            self.coroutines.append(chain.from_iterable(work))


def cell_requirements(state: RunState, plan: Plan, cells: Sequence[Cell]) -> list[Requirement]:
    """The inputs of some cells, with those of trials that are repeated in fp32."""
    ids, moved = {cell.id for cell in cells}, fp32_slots(state.event_log)
    earlier = [slot.spec for slot in plan.slots if slot.cell.id in ids and slot.id in moved]
    possible = possible_trials(cells, state.sweep.seeds.assignments(), state.resolver)
    return requirements_of([*possible, *earlier, *state.fp32_trials])


def worker_context(state: RunState) -> WorkerContext:
    gpu = state.sweep.resources.trial.gpu
    batch = state.sweep.resources.encoder.batch
    location = state.location
    device, variables = "cuda" if gpu else "cpu", {name: os.environ[name] for name in PROVENANCE}
    plugins = state.sweep.plugins
    return WorkerContext(location.store, location.data_root, device, batch, variables, plugins)


def _contact_sheet(state: RunState, requirements: Sequence[Requirement]) -> Iterator[None] | None:
    """A coroutine that writes the contact sheet; None if it exists or no row is complete."""
    store = state.location.store
    rows = [
        requirement.spec
        for requirement in requirements
        if isinstance(requirement.spec, SyntheticFeaturesSpec) and requirement.is_complete(store)
    ]
    sheet = state.location.folder / "contact_sheet.png"
    if not rows or sheet.exists():
        return None
    drawn, base = _rows_of_sheet(rows)
    features = next(
        requirement.spec
        for requirement in requirements
        if isinstance(requirement.spec, FeaturesSpec)
    )

    def write() -> Iterator[None]:
        from orchestrator.execution._prepare import draw_contact_sheet, run_beside_trials

        try:
            png, state.statistics.shares = yield from run_beside_trials(
                draw_contact_sheet, drawn, base, features, worker_context(state)
            )
        except Exception as problem:  # a missing sheet does not fail the sweep
            log.warning("no contact sheet: %s", first_line(problem))
        else:
            state.location.write(sheet.name, png)

    return write()


def _searches_for_copies(
    state: RunState, plan: Plan, rows: Collection[StageSpec]
) -> list[Iterator[None]]:
    """Coroutines that report ready images which copy a test image, one for each row and dataset."""
    splits: dict[tuple[SyntheticFeaturesSpec, FeaturesSpec], dict[SplitSettings, None]] = {}
    for trial in possible_trials(plan.cells, state.sweep.seeds.assignments(), state.resolver):
        row = trial.synthetic_features
        if row is not None and row in rows:
            splits.setdefault((row, trial.features), {})[trial.split] = None

    def search(
        row: SyntheticFeaturesSpec, features: FeaturesSpec, of_row: Iterable[SplitSettings]
    ) -> Iterator[None]:
        from orchestrator.execution._prepare import find_copies, run_beside_trials

        folder, dataset = row.images.model.name, features.dataset.name
        try:
            found = yield from run_beside_trials(
                find_copies, row, features, [*of_row], worker_context(state)
            )
        except Exception as problem:  # an unfinished search does not fail the sweep
            log.warning("%s: no search for copies: %s", folder, first_line(problem))
            return
        if found:
            named = ", ".join(f"{file} (test image {i})" for file, i in found[:MAX_COPIES])
            more = ", ..." if len(found) > MAX_COPIES else ""
            state.screen.message(
                f"{folder} has copies of {plural(len(found), 'test image')} of {dataset}, so the "
                f"accuracy is too high: {named}{more}; remove these files and run again"
            )

    return [search(row, features, of_row) for (row, features), of_row in splits.items()]


def _rows_of_sheet(
    rows: Sequence[SyntheticFeaturesSpec],
) -> tuple[SyntheticFeaturesSpec, SyntheticFeaturesSpec | None]:
    """The row on the contact sheet, and the row without LoRA for comparison.

    Rows are in the order in which they are made: the row that trials read comes last.
    """
    tuned = [row for row in rows if getattr(row.images, "lora", None) is not None]
    plain = [row for row in rows if getattr(row.images, "lora", None) is None]
    if tuned:
        return tuned[-1], plain[-1] if plain else None
    return plain[-1], None

"""Prepares the inputs of cells before their trials, then draws the contact sheet and searches ready
images for copies of test images."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

from air_core.settings import SplitSettings
from orchestrator.execution._queue import WorkQueue
from orchestrator.execution._state import RunState
from orchestrator.failures import first_line
from orchestrator.formatting import plural
from orchestrator.planning import Plan, Requirement
from orchestrator.planning.requirements import independent_of, merge
from orchestrator.spec import Cell
from orchestrator.stages import FeaturesSpec, FolderImages, SyntheticFeaturesSpec
from orchestrator.stages.context import WorkerContext
from orchestrator.store.artifacts import PROVENANCE

log = logging.getLogger(__name__)

POLL_INTERVAL = 0.05  # seconds between checks of the cluster while no trials run
CONTACT_SHEET = "contact_sheet.png"
MAX_COPIES = 3  # copies of test images that a message names


@dataclass(eq=False)
class Group:
    """Cells that read the same images, and what they need."""

    cells: Sequence[Cell]
    requirements: Sequence[Requirement]


@dataclass(frozen=True)
class Picture:
    """What a worker makes and no trial waits for. Its failure does not fail the sweep."""

    function: Callable[..., Any]
    arguments: Sequence[Any]  # before the `WorkerContext`
    show: Callable[[Any], None]  # its result
    failed: str  # begins the warning


class Preparation:
    """Makes the inputs of groups of cells, and knows which cells have all their inputs.

    `advance` must be called regularly beside trials; `wait` does it while no trials run.

    Args:
        groups: cells that read the same images together, in the order in which they should run.
        prepare_only: no trial runs, and all missing inputs are made.
    """

    def __init__(
        self, state: RunState, plan: Plan, groups: Sequence[Sequence[Cell]], prepare_only: bool
    ) -> None:
        self.state, self.plan, self.prepare_only = state, plan, prepare_only
        state.location.store.refresh_listings()  # of artifacts that another driver added
        self.groups = [Group(cells, plan.inputs(cells)) for cells in groups]
        self.pending = [group for group in self.groups if self._is_pending(group)]
        self.unready = {cell.id for group in self.pending for cell in group.cells}
        self.queue: WorkQueue | None = None
        self.has_sheet = False
        self.pictures: dict[Any, Picture] = {}  # by the future of their task
        self.searched: set[SyntheticFeaturesSpec] = set()  # for copies of test images

    def _is_pending(self, group: Group) -> bool:
        """Whether a group has trials to run whose inputs are missing."""
        store = self.state.location.store
        if all(requirement.is_complete(store) for requirement in group.requirements):
            return False
        cells = {cell.id for cell in group.cells}
        if self.prepare_only or any(self.plan.left[cell] for cell in cells):
            return True
        # A slot may share its trial with a cell that the plan counts it for, where two folders
        # have the same images. The cell that comes first runs the trial.
        return any(not store.has(slot.spec) for slot in self.plan.slots if slot.cell.id in cells)

    def is_ready(self, cell: Cell) -> bool:
        """Whether the inputs of a cell exist, or failed and are not retried in this run."""
        return cell.id not in self.unready

    def start(self) -> None:
        """Start to make all missing inputs, on the Ray that has started meanwhile."""
        if self.queue is not None:
            return
        from orchestrator.execution._stream import Workers

        state = self.state
        assert state.allocation is not None
        assert state.progress is not None
        workers = Workers(worker_context(state), state.sweep.resources, state.progress.actor)
        needed = merge(chain.from_iterable(group.requirements for group in self.pending))
        needed.sort(key=lambda requirement: bool(requirement.compared_with))
        failed = (requirement for requirement, _ in state.failed_requirements)
        needed = independent_of(failed, needed)
        self.queue = WorkQueue(needed, workers, state.allocation, state)
        self._take_complete()

    def _take_complete(self) -> bool:
        """Mark cells as ready whose inputs exist or have failed, and start the pictures of groups
        that also have the images that only pictures show; returns whether there are such cells."""
        queue = self.queue
        assert queue is not None

        def is_complete(group: Group, for_pictures: bool) -> bool:
            return not any(
                queue.lacks(requirement)
                for requirement in group.requirements
                if for_pictures or not requirement.compared_with
            )

        ready = [group for group in self.pending if is_complete(group, for_pictures=False)]
        for group in ready:
            self.pending.remove(group)
            self.unready -= {cell.id for cell in group.cells}
            self.state.event_log.append("cells_ready")
        pictured = [group for group in self.groups if is_complete(group, for_pictures=True)]
        self.groups = [group for group in self.groups if group not in pictured]
        for group in pictured:
            self._add_pictures(group.requirements)
        return bool(ready)

    def advance(self) -> None:
        """Process finished work and start new work, without waiting."""
        assert self.queue is not None
        self.state.check()
        self._take_pictures()
        if self.queue.take() and self._take_complete():
            return  # trials start before processes that would take their resources
        self.queue.begin()

    def wait(self) -> None:
        """Wait until further cells have their inputs, or some of these failed."""
        state, store, group = self.state, self.state.location.store, self.pending[0]
        missing = {
            str(requirement.key): count
            for requirement in group.requirements
            if not requirement.compared_with
            and (count := requirement.total() - requirement.have(store))
        }
        state.event_log.append(
            "cells_waiting", cells=[cell.id for cell in group.cells], artifacts=missing
        )
        pending = len(self.pending)
        while len(self.pending) == pending:
            self._advance_and_sleep()

    def finish(self) -> None:
        """Wait for what no trial waits for."""
        while self.queue is not None and (self.pictures or not self.queue.is_over):
            self._advance_and_sleep()

    def _advance_and_sleep(self) -> None:
        began = time.monotonic()
        self.advance()
        time.sleep(POLL_INTERVAL)
        self.state.statistics.add_wall(self.state.stage, time.monotonic() - began)

    # ---------------------------------------------------------------- pictures

    def _add_pictures(self, requirements: Sequence[Requirement]) -> None:
        """Start the contact sheet and the search for copies of a group."""
        store, location = self.state.location.store, self.state.location
        rows = [
            requirement.spec
            for requirement in requirements
            if isinstance(requirement.spec, SyntheticFeaturesSpec)
            and requirement.is_complete(store)
        ]
        pictures: list[Picture] = []
        if rows and not self.has_sheet and not (location.folder / CONTACT_SHEET).exists():
            self.has_sheet = True
            specs = (requirement.spec for requirement in requirements)
            features = next(spec for spec in specs if isinstance(spec, FeaturesSpec))
            pictures.append(_contact_sheet(self.state, rows, features))
        ready = {row for row in rows if isinstance(row.images, FolderImages)} - self.searched
        self.searched |= ready
        if ready:
            pictures += _searches_for_copies(self.state, self.plan, ready)
        if pictures:
            from orchestrator.execution._stream import start_task

            worker = worker_context(self.state)
            for picture in pictures:
                task = start_task(picture.function, picture.arguments, worker)
                self.pictures[task] = picture

    def _take_pictures(self) -> None:
        if not self.pictures:
            return
        from orchestrator.execution._stream import ended_tasks

        for task, result in ended_tasks(self.pictures):
            picture = self.pictures.pop(task)
            try:
                picture.show(result())
            except Exception as problem:  # the sweep does not fail
                log.warning("%s: %s", picture.failed, first_line(problem))


def worker_context(state: RunState) -> WorkerContext:
    gpu = state.sweep.resources.trial.gpu
    batch = state.sweep.resources.encoder.batch
    location = state.location
    device, variables = "cuda" if gpu else "cpu", {name: os.environ[name] for name in PROVENANCE}
    plugins = state.sweep.plugins
    return WorkerContext(location.store, location.data_root, device, batch, variables, plugins)


def _contact_sheet(
    state: RunState, rows: Sequence[SyntheticFeaturesSpec], features: FeaturesSpec
) -> Picture:
    """The contact sheet of rows that are in the order in which they are made."""
    from orchestrator.execution._stream import draw_contact_sheet

    tuned = [row for row in rows if getattr(row.images, "lora", None) is not None]
    plain = [row for row in rows if row not in tuned]
    drawn = (tuned or plain)[-1]  # the row that trials read comes last
    base = plain[-1] if tuned and plain else None  # for comparison

    def show(sheet: tuple[bytes, dict[str, float]]) -> None:
        png, state.statistics.shares = sheet
        state.location.write(CONTACT_SHEET, png)

    return Picture(draw_contact_sheet, (drawn, base, features), show, "no contact sheet")


def _searches_for_copies(
    state: RunState, plan: Plan, rows: Collection[SyntheticFeaturesSpec]
) -> Iterator[Picture]:
    """Searches for ready images that copy a test image, one for each row and dataset."""
    from orchestrator.execution._stream import find_copies

    splits: dict[tuple[SyntheticFeaturesSpec, FeaturesSpec], dict[SplitSettings, None]] = {}
    for trial in chain(*plan.trials.values()):
        row = trial.synthetic_features
        if row is not None and row in rows:
            splits.setdefault((row, trial.features), {})[trial.split] = None

    def show(folder: str, dataset: str, found: Sequence[tuple[str, int]]) -> None:
        if found:
            named = ", ".join(f"{file} (test image {i})" for file, i in found[:MAX_COPIES])
            more = ", ..." if len(found) > MAX_COPIES else ""
            state.screen.message(
                f"{folder} has copies of {plural(len(found), 'test image')} of {dataset}, so the "
                f"accuracy is too high: {named}{more}; remove these files and run again"
            )

    for (row, features), of_row in splits.items():
        folder = row.images.model.name
        shown = partial(show, folder, features.dataset.name)
        failed = f"{folder}: no search for copies"
        yield Picture(find_copies, (row, features, [*of_row]), shown, failed)

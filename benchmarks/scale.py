"""Would a sweep keep 64 GPUs busy? A simulation.

Plays `sweeps/paper_main.yaml` on a cluster of equal GPUs under several policies: groups of cells
with their LoRA, their blocks of images and their trials, the driver as a server that does one thing
at a time. Costs are those of `docs/reproduce.md`, which nobody measured; the driver's and actors'
own were measured on sleeping actors (docs/benchmarks.md).

    python benchmarks/scale.py [--gpus 64]

Half a minute. The last line is JSON; `ratio` is hours of the sweep where each group is prepared
before its trials over hours where the next is prepared beside them.
"""

from __future__ import annotations

import heapq
import itertools
import math
import sys
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.harness import options, progress, report

# ---------------------------------------------------------------- what is simulated


@dataclass(frozen=True)
class Job:
    """Trials of one point."""

    gpu: float  # share of a device
    seconds: float


@dataclass(frozen=True)
class Group:
    """Cells that share a row of images, or the cells that read none."""

    tasks: tuple[float, ...]  # seconds of features, labels, LoRA: a device each
    blocks: int
    jobs: tuple[Job, ...]


@dataclass(frozen=True)
class Costs:
    """Of the machinery, in seconds."""

    block: float
    start: float = 0.0  # of an actor, until it draws
    gap: float = 0.0  # of an actor, between two blocks
    driver: float = 0.0  # of the driver, which does one thing at a time, for each block
    job: float = 0.0  # between two jobs of a slot


@dataclass(frozen=True)
class Policy:
    beside: bool  # the next groups are prepared while trials run, and trials start when theirs is
    share: int = 8  # one device of so many stays with them then


@dataclass
class Found:
    """Device-seconds by what they went into; seconds for the rest."""

    end: float = 0.0
    trials: float = 0.0  # shares that trials held
    held: float = 0.0  # by the producer
    barrier: float = 0.0  # idle while no trial could run
    tail: float = 0.0  # idle while trials ran and nothing was left to start
    idle: float = 0.0
    beside: float = 0.0  # seconds with a trial
    events: int = 0


class Simulation:
    """One sweep on a cluster of equal devices."""

    def __init__(self, groups: Sequence[Group], gpus: int, costs: Costs, policy: Policy) -> None:
        self.groups, self.gpus, self.costs, self.policy = groups, gpus, costs, policy
        self.now, self.driver = 0.0, 0.0
        self.queue: list[tuple[float, int, Callable[[], None]]] = []
        self.numbers = itertools.count()
        self.free = [1.0] * gpus  # share of each device that nobody holds
        self.found = Found()
        self.ready = [not group.tasks and not group.blocks for group in groups]
        self.waiting: list[Job] = []  # ready to run
        self.opened = 0  # groups whose jobs are waiting, running or over
        self.tasks: deque[tuple[int, float]] = deque()
        self.tasks_left = Counter({i: len(group.tasks) for i, group in enumerate(groups)})
        self.blocks_left = [group.blocks for group in groups]  # not drawn
        self.asked = list(self.blocks_left)  # not handed out
        self.pool: set[int] = set()  # devices of actors
        self.task_devices: set[int] = set()
        self.generation = 0  # of the pool: what an earlier one had in hand is lost
        self.jobs = 0  # that run
        for i, group in enumerate(groups):
            self.tasks += [(i, seconds) for seconds in group.tasks]

    def run(self) -> Found:
        self._schedule()
        while self.queue:
            at, _, event = heapq.heappop(self.queue)
            self._account(at - self.now)
            self.now = at
            self.found.events += 1
            event()
            self._schedule()
        assert all(self.ready), "it stands still"
        assert not self.waiting
        self.found.end = self.now
        return self.found

    def _later(self, seconds: float, event: Callable[[], None]) -> None:
        heapq.heappush(self.queue, (self.now + seconds, next(self.numbers), event))

    def _account(self, seconds: float) -> None:
        found, idle = self.found, sum(self.free)
        held = len(self.pool) + len(self.task_devices)
        found.held += held * seconds
        found.trials += (self.gpus - idle - held) * seconds
        found.idle += idle * seconds
        if not self.jobs:
            found.barrier += idle * seconds
        else:
            found.beside += seconds
            if not self.waiting:
                found.tail += idle * seconds

    # ------------------------------------------------------------ who gets what

    def _schedule(self) -> None:
        self._open()
        self._prepare()
        self._start_jobs()

    def _open(self) -> None:
        """Hand out the jobs of groups that are ready, in order."""
        while self.opened < len(self.groups) and self.ready[self.opened]:
            if not self.policy.beside and (self.jobs or self.waiting):
                return
            self.waiting += self.groups[self.opened].jobs
            self.opened += 1

    def _allotted(self) -> int:
        """Devices of the producer."""
        if all(self.ready):
            return 0
        if not self.jobs and not self.waiting:
            return self.gpus
        return max(1, self.gpus // self.policy.share) if self.policy.beside else 0

    def _prepare(self) -> None:
        allotted = self._allotted()
        if self.pool and (len(self.pool) > allotted or self._worth_growing(allotted)):
            self._close_pool()
        while self.tasks and len(self.task_devices) < allotted and 1.0 in self.free:
            if not self._in_turn(self.tasks[0][0]):
                break
            group, seconds = self.tasks.popleft()
            device = self.free.index(1.0)
            self.free[device] = 0.0
            self.task_devices.add(device)
            self._later(seconds, lambda g=group, d=device: self._task_over(g, d))
        if not self.pool:
            self._open_pool(self._fitting(allotted))

    def _fitting(self, allotted: int) -> int:
        """Actors that there are devices and blocks for."""
        there = min(allotted - len(self.task_devices), self.free.count(1.0) + len(self.pool))
        return min(there, sum(self.asked[group] for group in self._to_draw()) + len(self.pool))

    def _worth_growing(self, allotted: int) -> bool:
        """Does it save more than starting again takes?"""
        size, more = len(self.pool), self._fitting(allotted)
        left = sum(self.blocks_left[group] for group in self._to_draw()) * self.costs.block
        return more > size and left / size - left / more > self.costs.start + self.costs.block

    def _in_turn(self, group: int) -> bool:
        """Without overlap a group is begun when the trials of the last are over."""
        return self.policy.beside or group == self.opened

    def _to_draw(self) -> list[int]:
        """Groups of which blocks can be handed out."""
        return [
            group
            for group, left in enumerate(self.asked)
            if left and not self.tasks_left[group] and self._in_turn(group)
        ]

    def _open_pool(self, size: int) -> None:
        self.generation += 1
        for _ in range(size):
            device = self.free.index(1.0)
            self.free[device] = 0.0
            self.pool.add(device)
            self._later(self.costs.start, lambda d=device, g=self.generation: self._draw(d, g))

    def _close_pool(self) -> None:
        self.generation += 1
        for device in self.pool:
            self.free[device] = 1.0
        self.asked = list(self.blocks_left)
        self.pool = set()

    def _draw(self, device: int, generation: int) -> None:
        """An actor asks the driver for its next block."""
        if generation != self.generation:
            return
        groups = self._to_draw()
        if not groups:
            self.pool.discard(device)
            self.free[device] = 1.0
            return
        group = groups[0]
        self.asked[group] -= 1
        self.driver = max(self.driver, self.now) + self.costs.driver
        wait = self.driver - self.now + self.costs.gap
        self._later(wait + self.costs.block, lambda: self._block_over(device, generation, group))

    def _block_over(self, device: int, generation: int, group: int) -> None:
        if generation != self.generation:
            return
        self.blocks_left[group] -= 1
        self._settle(group)
        self._draw(device, generation)

    def _task_over(self, group: int, device: int) -> None:
        self.task_devices.discard(device)
        self.free[device] = 1.0
        self.tasks_left[group] -= 1
        self._settle(group)

    def _settle(self, group: int) -> None:
        self.ready[group] = not self.tasks_left[group] and not self.blocks_left[group]

    def _start_jobs(self) -> None:
        reserved = max(0, self._allotted() - len(self.pool) - len(self.task_devices))
        while self.waiting:
            job = self.waiting[0]
            device = self._device(job.gpu, reserved)
            if device is None:
                return
            self.waiting.pop(0)
            self.jobs += 1
            self.free[device] -= job.gpu
            took = self.costs.job + job.seconds
            self._later(took, lambda d=device, j=job: self._job_over(d, j))

    def _device(self, share: float, reserved: int) -> int | None:
        """As Ray packs: the fullest device with room, and none that the producer waits for."""
        fits = [i for i, free in enumerate(self.free) if free >= share - 1e-9]
        if not fits:
            return None
        best = min(fits, key=lambda i: self.free[i])
        if self.free[best] == 1.0 and self.free.count(1.0) <= reserved:
            return None
        return best

    def _job_over(self, device: int, job: Job) -> None:
        self.jobs -= 1
        self.free[device] += job.gpu


# ---------------------------------------------------------------- the paper's grid

TEXT_SHARE = 0.25  # of a device: text steps are too small for it, four trials slow each other not
IMAGES, BLOCK = 120, 8  # a class
IMAGE = 0.9  # seconds of a device: 36 TFLOP at 40 TFLOP/s
LORA = 825.0  # seconds of a device: 33 PFLOP at 40 TFLOP/s
FEATURES = 120.0  # seconds a dataset and level: opening files
LOOK = 5.0  # seconds of a trial without training
LOAD = 30.0  # seconds until an actor has the pipeline
# Seconds of the machinery: actor and driver for each block, and a trial beyond its work.
GAP, DRIVER, JOB = 0.045, 0.002, 0.16
# Hours of a dataset's trials, text and visual, in docs/reproduce.md.
HOURS = {
    "flowers102": (0.9, 24),
    "resisc45": (2.3, 64),
    "dtd": (1.4, 37),
    "cub": (2.4, 66),
    "eurosat": (7.6, 202),
}


def paper(share_visual: float = 0.25, split: bool = False, points: int = 1) -> list[Group]:
    """Groups of the paper's main table: `docs/reproduce.md` has where the figures come from.

    Args:
        share_visual: of a device, that a visual trial holds.
        split: a job for each seed, and not one for all seeds of a point.
        points: of each cell that trains, as a search would have.
    """
    from orchestrator.spec import cells_of, find_sweep, load_sweep

    asked = load_sweep(find_sweep("paper_main"))
    cells, seeds = cells_of(asked), len(asked.seeds.assignments())
    steps = {cell.id: _steps(cell.flat) for cell in cells}
    every: Counter[tuple[str, bool]] = Counter()  # steps of all trials of a dataset
    for cell in cells:
        every[cell.flat["dataset"], _visual(cell)] += seeds * steps[cell.id]
    jobs: dict[tuple[str, ...], list[Job]] = {}
    for cell in cells:
        dataset, visual = cell.flat["dataset"], _visual(cell)
        row = (dataset, cell.flat["paradigm"]) if cell.flat["images_per_class"] else ()
        one = 3600 * HOURS[dataset][visual] * steps[cell.id] / every[dataset, visual]
        share = share_visual if visual else TEXT_SHARE
        one = LOOK + (one / share if visual else one)
        each = seeds if steps[cell.id] else 1
        new = [Job(share, one)] * each if split else [Job(share, one * each)]
        jobs.setdefault(row, []).extend(new * (points if steps[cell.id] else 1))
    found = [Group((FEATURES,) * 2 * len(HOURS), 0, tuple(jobs.pop(())))]
    for (dataset, paradigm), of_row in jobs.items():
        classes = _classes(dataset, paradigm)
        found.append(Group((LORA,), classes * math.ceil(IMAGES / BLOCK), tuple(of_row)))
    return found


def _visual(cell: Any) -> bool:
    return bool(cell.flat["modality"] == "visual")


def _classes(dataset: str, paradigm: str) -> int:
    from air_core.datasets.published import PUBLISHED

    every = PUBLISHED[dataset].classes
    return every - round(0.62 * every) if paradigm == "trzsl" else every


def _steps(flat: dict[str, Any]) -> int:
    """Upper bound, as `docs/method.md` counts them."""
    from air_core.datasets.published import PUBLISHED

    size = PUBLISHED[flat["dataset"]]
    pool = sum(count for part, count in size.parts.items() if part != "test")
    classes = _classes(flat["dataset"], flat["paradigm"])
    pool = pool * classes // size.classes
    if not flat["iterations"]:
        return 0
    if flat["supervision"] == "labelled":
        chosen = [2 * size.classes]
    elif flat["pseudo_labels.growth"] == "fixed":
        chosen = [min(16 * classes, pool)] * flat["iterations"]
    else:
        chosen = [pool * (t + 1) // flat["iterations"] for t in range(flat["iterations"])]
    return sum(flat["train.epochs"] * max(1, m // flat["train.batch"]) for m in chosen)


# ---------------------------------------------------------------- what is said


def played(groups: Sequence[Group], gpus: int, costs: Costs, policy: Policy) -> dict[str, float]:
    found = Simulation(groups, gpus, costs, policy).run()
    drawn = sum(sum(group.tasks) + group.blocks * costs.block for group in groups)
    all_day = gpus * found.end
    while_trials = gpus * found.beside
    return {
        "hours": found.end / 3600,
        "busy": (drawn + found.trials) / all_day,
        "producer_busy": drawn / (found.held + found.barrier),
        "busy_beside_trials": 1 - (found.idle - found.barrier) / while_trials,
        "barrier_gpu_hours": found.barrier / 3600,
        "tail_gpu_hours": found.tail / 3600,
        "events_per_s": found.events / found.end,
    }


POLICIES = {
    "prepare, then trials": Policy(beside=False),
    "one stream of trials": Policy(beside=True),
    "a single GPU prepares": Policy(beside=True, share=10**6),
}
JOBS: dict[str, tuple[float, bool, int]] = {
    "a quarter, seeds together": (0.25, False, 1),
    "a whole GPU, a job a seed": (1.0, True, 1),
    "the same, 12 points a cell": (1.0, True, 12),
}


def main() -> None:
    asked = options(__doc__, gpus=64)
    costs = Costs(block=BLOCK * IMAGE, start=LOAD, gap=GAP, driver=DRIVER, job=JOB)
    found: dict[str, dict[str, float]] = {}
    for jobs, of in JOBS.items():
        first, *others = paper(*of)
        by_blocks = [first, *sorted(others, key=lambda group: group.blocks)]
        for name, policy in POLICIES.items():
            groups = by_blocks if policy.beside else [first, *others]
            one = found[f"{jobs}: {name}"] = played(groups, asked.gpus, costs, policy)
            progress(f"{jobs}: {name}", *(f"{key} {value:.3g}" for key, value in one.items()))
    jobs = "a whole GPU, a job a seed"
    report(
        "scale",
        found[f"{jobs}: prepare, then trials"]["hours"]
        / found[f"{jobs}: one stream of trials"]["hours"],
        f"each group prepared before its trials, {asked.gpus} GPUs, simulated",
        gpus=asked.gpus,
        simulated=found,
    )


if __name__ == "__main__":
    main()

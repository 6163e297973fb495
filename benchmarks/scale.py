"""Simulated utilization of 64 GPUs by a sweep.

Simulates the sweep `paper_main` on a cluster of equal GPUs under several policies. A group of
cells has a LoRA, blocks of images and trials; the driver is a server that handles one event at a
time. The costs of LoRA, images and trials are the unmeasured estimates of `docs/experiments.md`.
The costs of the driver and of actors were measured with actors that sleep (benchmarks/README.md).

    python benchmarks/scale.py [--gpus 64]

It takes half a minute. The last line is JSON: `ratio` is the duration of the sweep if each group is
prepared before its trials, divided by its duration if the next group is prepared while the trials
run.
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

# ---------------------------------------------------------------- simulation


@dataclass(frozen=True)
class Job:
    """Trials of one point."""

    gpu: float  # share of a device
    seconds: float


@dataclass(frozen=True)
class Group:
    """Cells that share a row of images, or the cells without images."""

    tasks: tuple[float, ...]  # seconds of features, labels, LoRA; each takes one device
    blocks: int
    jobs: tuple[Job, ...]


@dataclass(frozen=True)
class Costs:
    """Duration of a block and of overheads, in seconds."""

    block: float
    start: float = 0.0  # from the start of an actor to its first block
    gap: float = 0.0  # of an actor between two blocks
    driver: float = 0.0  # of the driver for each block; it handles one at a time
    job: float = 0.0  # between two jobs of a slot


@dataclass(frozen=True)
class Policy:
    beside: bool  # prepare the next groups while trials run
    share: int = 8  # of the devices, 1 / share prepares while trials run


@dataclass
class DeviceUse:
    """Device-seconds by use, and durations in seconds."""

    end: float = 0.0
    trials: float = 0.0  # held by trials
    held: float = 0.0  # held by preparation
    barrier: float = 0.0  # idle while no trial ran
    tail: float = 0.0  # idle while trials ran and no trial was left to start
    idle: float = 0.0
    beside: float = 0.0  # seconds during which trials ran
    events: int = 0


class Simulation:
    """One sweep on a cluster of equal devices."""

    def __init__(self, groups: Sequence[Group], gpus: int, costs: Costs, policy: Policy) -> None:
        self.groups, self.gpus, self.costs, self.policy = groups, gpus, costs, policy
        self.now, self.driver = 0.0, 0.0
        self.queue: list[tuple[float, int, Callable[[], None]]] = []
        self.numbers = itertools.count()
        self.free = [1.0] * gpus  # free fraction of each device
        self.use = DeviceUse()
        self.ready = [not group.tasks and not group.blocks for group in groups]
        self.waiting: list[Job] = []  # ready to run
        self.opened = 0  # number of groups whose jobs have been queued
        self.tasks: deque[tuple[int, float]] = deque()
        self.tasks_left = Counter({i: len(group.tasks) for i, group in enumerate(groups)})
        self.blocks_left = [group.blocks for group in groups]  # not drawn yet
        self.unassigned_blocks = list(self.blocks_left)
        self.pool: set[int] = set()  # devices of actors
        self.task_devices: set[int] = set()
        self.generation = 0  # of the pool; blocks of an earlier pool are lost
        self.jobs = 0  # running
        for i, group in enumerate(groups):
            self.tasks += [(i, seconds) for seconds in group.tasks]

    def run(self) -> DeviceUse:
        self._schedule()
        while self.queue:
            at, _, event = heapq.heappop(self.queue)
            self._account(at - self.now)
            self.now = at
            self.use.events += 1
            event()
            self._schedule()
        assert all(self.ready), "the simulation has no event left, but work remains"
        assert not self.waiting
        self.use.end = self.now
        return self.use

    def _later(self, seconds: float, event: Callable[[], None]) -> None:
        heapq.heappush(self.queue, (self.now + seconds, next(self.numbers), event))

    def _account(self, seconds: float) -> None:
        found, idle = self.use, sum(self.free)
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

    # ------------------------------------------------------------ scheduling

    def _schedule(self) -> None:
        self._open()
        self._prepare()
        self._start_jobs()

    def _open(self) -> None:
        """Queue the jobs of groups that are ready, in order."""
        while self.opened < len(self.groups) and self.ready[self.opened]:
            if not self.policy.beside and (self.jobs or self.waiting):
                return
            self.waiting += self.groups[self.opened].jobs
            self.opened += 1

    def _allotted(self) -> int:
        """Number of devices for preparation."""
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
        """Number of actors for which devices and blocks exist."""
        limit = min(allotted - len(self.task_devices), self.free.count(1.0) + len(self.pool))
        unassigned = sum(self.unassigned_blocks[group] for group in self._to_draw())
        return min(limit, unassigned + len(self.pool))

    def _worth_growing(self, allotted: int) -> bool:
        """Whether a larger pool saves more time than its restart costs."""
        size, more = len(self.pool), self._fitting(allotted)
        left = sum(self.blocks_left[group] for group in self._to_draw()) * self.costs.block
        return more > size and left / size - left / more > self.costs.start + self.costs.block

    def _in_turn(self, group: int) -> bool:
        """Whether the policy allows a group to be prepared now."""
        return self.policy.beside or group == self.opened

    def _to_draw(self) -> list[int]:
        """Groups with blocks that can be assigned."""
        return [
            group
            for group, left in enumerate(self.unassigned_blocks)
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
        self.unassigned_blocks = list(self.blocks_left)
        self.pool = set()

    def _draw(self, device: int, generation: int) -> None:
        """Assign the next block to an actor, after a request to the driver."""
        if generation != self.generation:
            return
        groups = self._to_draw()
        if not groups:
            self.pool.discard(device)
            self.free[device] = 1.0
            return
        group = groups[0]
        self.unassigned_blocks[group] -= 1
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
        """The fullest device that fits, as Ray packs, unless it is reserved for preparation."""
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

TEXT_SHARE = 0.25  # of a device: text steps are small, so four trials do not slow each other
IMAGES, BLOCK = 120, 8  # images per class, and images per block
IMAGE = 0.9  # seconds of a device: 36 TFLOP at 40 TFLOP/s
LORA = 825.0  # seconds of a device: 33 PFLOP at 40 TFLOP/s
FEATURES = 120.0  # seconds for each dataset and level, mostly reading files
LOOK = 5.0  # seconds of a trial without training
LOAD = 30.0  # seconds until an actor has loaded the pipeline
# Overhead in seconds: of actor and driver for each block, and of a trial.
GAP, DRIVER, JOB = 0.045, 0.002, 0.16
# Hours of a dataset's trials, text and visual, in docs/tables/paper_cost.csv.
HOURS = {
    "flowers102": (0.9, 24),
    "resisc45": (2.3, 64),
    "dtd": (1.4, 37),
    "cub": (2.4, 66),
    "eurosat": (7.6, 202),
}


def paper(share_visual: float = 0.25, split: bool = False, points: int = 1) -> list[Group]:
    """Groups of the paper's main table; `docs/experiments.md` explains the figures.

    Args:
        share_visual: fraction of a device that a visual trial holds.
        split: whether each seed is a separate job, instead of all seeds of a point.
        points: number of points of each cell that trains, as in a search.
    """
    from orchestrator.spec import cells_of, find_sweep, load_sweep

    sweep = load_sweep(find_sweep("paper_main"))
    cells, seeds = cells_of(sweep), len(sweep.seeds.assignments())
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
    from air_core.datasets import DATASETS

    every = len(DATASETS[dataset].classnames)
    return every - round(0.62 * every) if paradigm == "trzsl" else every


def _steps(flat: dict[str, Any]) -> int:
    """Upper bound of the training steps, as counted in `docs/method.md`."""
    from air_core.datasets import DATASETS

    size = DATASETS[flat["dataset"]]
    assert size.published is not None
    pool = sum(count for part, count in size.published.parts.items() if part != "test")
    classes = _classes(flat["dataset"], flat["paradigm"])
    pool = pool * classes // len(size.classnames)
    if not flat["iterations"]:
        return 0
    if flat["supervision"] == "labelled":
        chosen = [2 * len(size.classnames)]
    elif flat["pseudo_labels.growth"] == "fixed":
        chosen = [min(16 * classes, pool)] * flat["iterations"]
    else:
        chosen = [pool * (t + 1) // flat["iterations"] for t in range(flat["iterations"])]
    return sum(flat["train.epochs"] * max(1, m // flat["train.batch"]) for m in chosen)


# ---------------------------------------------------------------- report


def simulate(groups: Sequence[Group], gpus: int, costs: Costs, policy: Policy) -> dict[str, float]:
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
    args = options(__doc__, gpus=64)
    costs = Costs(block=BLOCK * IMAGE, start=LOAD, gap=GAP, driver=DRIVER, job=JOB)
    found: dict[str, dict[str, float]] = {}
    for jobs, of in JOBS.items():
        first, *others = paper(*of)
        by_blocks = [first, *sorted(others, key=lambda group: group.blocks)]
        for name, policy in POLICIES.items():
            groups = by_blocks if policy.beside else [first, *others]
            one = found[f"{jobs}: {name}"] = simulate(groups, args.gpus, costs, policy)
            progress(f"{jobs}: {name}", *(f"{key} {value:.3g}" for key, value in one.items()))
    jobs = "a whole GPU, a job a seed"
    report(
        "scale",
        found[f"{jobs}: prepare, then trials"]["hours"]
        / found[f"{jobs}: one stream of trials"]["hours"],
        f"each group prepared before its trials, {args.gpus} GPUs, simulated",
        gpus=args.gpus,
        simulated=found,
    )


if __name__ == "__main__":
    main()

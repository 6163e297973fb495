"""Would a sweep keep 64 GPUs busy? A simulation, held against runs of the real thing.

Real runs first: blocks of the tiny generator on 1 and 2 actors, and actors that sleep for as long
as a block took, 1 to 16 of them, all through `orchestrator.generation.draw` on Ray Data. What one
sleeping actor and blocks of no length cost calibrates the simulation; it must then foretell all
other runs. After that it plays `sweeps/paper_main.yaml` on 64 GPUs, with the costs of
`docs/reproduce.md`, which nobody measured, under several policies.

    python benchmarks/scale.py [--gpus 64] [--simulate-only]

Six minutes on two cores. The last line is JSON; `ratio` is hours of the sweep where each group is
prepared before its trials over hours where the next is prepared beside them.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

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
    starts: tuple[float, ...] = ()  # the same of each of the first pool, where they differ
    gap: float = 0.0  # of an actor, between two blocks
    driver: float = 0.0  # of the driver, which does one thing at a time, for each block
    job: float = 0.0  # between two jobs of a slot


@dataclass(frozen=True)
class Policy:
    overlap: bool = True  # the next groups are prepared while trials run
    share: int = 8  # one device of so many stays with them then
    stream: bool = True  # trials of a ready group start before the last of an earlier one ended
    longest: bool = False  # jobs by their length, the longest first
    fit: bool = False  # reserve: as much as has to be prepared, of all that is left to do


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
    starts: int = 0
    first: float = math.inf  # end of the first trial
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
            if not self.policy.stream and (self.jobs or self.waiting):
                return
            self.waiting += self.groups[self.opened].jobs
            if self.policy.longest:
                self.waiting.sort(key=lambda job: -job.seconds)
            self.opened += 1

    def _allotted(self) -> int:
        """Devices of the producer."""
        if all(self.ready):
            return 0
        if not self.jobs and not self.waiting:
            return self.gpus
        if not self.policy.overlap:
            return 0
        if not self.policy.fit:
            return max(1, self.gpus // self.policy.share)
        left = sum(seconds for _, seconds in self.tasks)
        left += sum(self.blocks_left) * self.costs.block
        later = [job for group in self.groups[self.opened :] for job in group.jobs]
        every = left + sum(job.gpu * job.seconds for job in (*self.waiting, *later))
        return max(1, min(self.gpus - 1, round(self.gpus * left / every)))

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
        return self.policy.overlap or group == self.opened

    def _to_draw(self) -> list[int]:
        """Groups of which blocks can be handed out."""
        return [
            group
            for group, left in enumerate(self.asked)
            if left and not self.tasks_left[group] and self._in_turn(group)
        ]

    def _open_pool(self, size: int) -> None:
        self.generation += 1
        self.found.starts += size > 0
        for place in range(size):
            device = self.free.index(1.0)
            self.free[device] = 0.0
            self.pool.add(device)
            after = self.costs.starts[place] if self.costs.starts else self.costs.start
            self._later(after, lambda d=device, g=self.generation: self._draw(d, g))

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
        self.found.first = min(self.found.first, self.now)


# ---------------------------------------------------------------- the paper's grid

TEXT_SHARE = 0.25  # of a device: text steps are too small for it, four trials slow each other not
IMAGES, BLOCK = 120, 8  # a class
IMAGE = 0.9  # seconds of a device: 36 TFLOP at 40 TFLOP/s
LORA = 825.0  # seconds of a device: 33 PFLOP at 40 TFLOP/s
FEATURES = 120.0  # seconds a dataset and level: opening files
LOOK = 5.0  # seconds of a trial without training
LOAD = 30.0  # seconds until an actor has the pipeline
JOB = 0.16  # seconds that a trial takes beyond its work: benchmarks/overhead.py
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
    from orchestrator.sweep import cells_of
    from orchestrator.sweep_file import find_sweep, load_sweep

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


# ---------------------------------------------------------------- the real thing


@dataclass
class Watch:
    """Notes when each block was told, and by whom."""

    told: list[tuple[float, dict[str, Any]]] = field(default_factory=list)

    def prepared(self, need: Any, seconds: float, facts: dict[str, Any]) -> None:
        self.told.append((time.time(), facts))

    def drew(self, pool: Any) -> None:
        pass

    def progress(self, name: str, done: int, total: int) -> None:
        pass

    def waiting(self, name: str, holder: str, seconds: float) -> None:
        pass


class Sleeping:
    """In the place of `generation.Generate`: takes as long as a block and draws nothing."""

    seconds = 0.0

    def __init__(self, rows: Sequence[Any], shop: Any, board: Any) -> None:
        pass

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        began = time.time()
        time.sleep(self.seconds)
        facts = {name: [int(batch[name][0])] for name in ("row", "class", "block")}
        facts |= {name: [0] for name in ("drawn", "redrawn", "holes", "on_device")}
        facts |= {"began": [began], "pid": [os.getpid()], "seconds": [time.time() - began]}
        return {**facts, "error": [""], "failure_class": [""]}


def noting() -> type:
    """`generation.Generate`, which also says when it began and who it is."""
    from orchestrator.generation import Generate

    class Noting(Generate):
        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            began = time.time()
            return {**super().__call__(batch), "began": [began], "pid": [os.getpid()]}

    return Noting


@dataclass(frozen=True)
class Run:
    """What drawing some blocks took."""

    blocks: int
    block: float  # mean seconds of one
    starts: tuple[float, ...]  # of each actor, until it first began
    whole: float

    @property
    def gap(self) -> float:
        """Seconds of an actor between two blocks, where there is one actor."""
        return max(0.0, (self.whole - self.starts[0]) / self.blocks - self.block)


def real(folder: Path, actors: int, blocks: int, seconds: float | None) -> Run:
    """Draw, by sleeping (seconds) or by the tiny generator (None)."""
    from orchestrator import generation, presets
    from orchestrator.plan import Need
    from orchestrator.resolve import Resolver
    from orchestrator.session import Cluster
    from orchestrator.shares import Shares
    from orchestrator.store import ArtifactStore
    from orchestrator.sweep import GeneratorResources, Resources
    from orchestrator.workshop import Workshop

    own, watch = generation.Generate, Watch()
    # A class of its own for each run: workers are sent it by value.
    put: Any = noting() if seconds is None else type("Sleeping", (Sleeping,), {"seconds": seconds})
    flat = {"dataset": "digits", "backbone": "tiny", "generator": "tiny", "lora": None}
    world = presets.WORLDS["generator", "tiny"].items()
    flat |= {key: value for key, value in world if not key.startswith("lora.")}
    row = Resolver(folder / "digests.json", None).trial(flat).synthetic_features
    assert row is not None
    need = Need(row, math.ceil(blocks / 10) * row.images.block_size, tuple(range(10)))
    store = ArtifactStore(Path(tempfile.mkdtemp(dir=folder)))
    resources = Resources(generator=GeneratorResources(actors=actors, cpu=0.1))
    started = time.time()
    generation.Generate = put  # type: ignore[misc]
    try:
        generation.draw([need], Workshop(store), resources, watch, Shares(resources, Cluster()))
    finally:
        generation.Generate = own  # type: ignore[misc]
    began: dict[int, float] = {}
    for _, facts in watch.told:
        began[facts["pid"]] = min(facts["began"], began.get(facts["pid"], math.inf))
    assert len(watch.told) == len(need.shards()), "a block was not drawn"
    return Run(
        len(watch.told),
        statistics.mean(facts["seconds"] for _, facts in watch.told),
        tuple(sorted(at - started for at in began.values())),
        watch.told[-1][0] - started,
    )


def foretold(run: Run, costs: Costs) -> float:
    """Seconds that the simulation says of a run, told how long a block takes and when each actor
    was up."""
    told = replace(costs, block=run.block, starts=run.starts)
    return Simulation([Group((), run.blocks, ())], len(run.starts), told, Policy()).run().end


def measured(folder: Path, say: Callable[[str], None]) -> tuple[Costs, dict[str, Any]]:
    """Costs of this machine's machinery, and how well they foretell other runs."""
    from orchestrator.session import ray_session

    found: dict[str, dict[str, float]] = {}

    def hold(name: str, run: Run, costs: Costs) -> None:
        said, ideal = foretold(run, costs), foretold(run, Costs(0.0))
        found[name] = {
            "actors": len(run.starts),
            "blocks": run.blocks,
            "block_s": run.block,
            "last_start_s": run.starts[-1],
            "said_s": said,
            "took_s": run.whole,
            "ratio": said / run.whole,
            "ratio_once_up": (said - run.starts[-1]) / (run.whole - run.starts[-1]),
            "busy": run.blocks * run.block / sum(run.whole - start for start in run.starts),
            "overhead_ms": 1000 * (run.whole - ideal) * len(run.starts) / run.blocks,
        }
        say(f"{name}: {json.dumps(_rounded(found[name]))}")

    with ray_session():
        one = real(folder, 1, 40, SLEEP)
        many = real(folder, 16, 480, 0.0)
        driver = (many.whole - many.starts[-1]) / many.blocks
        costs = Costs(0.0, gap=max(0.0, one.gap - driver), driver=driver)
        say(f"calibrated: {costs}, an actor is up after {one.starts[0]:.1f} s")
        for actors in (2, 4, 8, 16):
            hold(f"{actors} sleep", real(folder, actors, 20 * actors, SLEEP), costs)
        for actors in (1, 2):
            hold(f"{actors} draw", real(folder, actors, 40 * actors, None), costs)
    facts = {
        "driver_s": driver,
        "gap_s": one.gap,
        "start_s": one.starts[0],
        "load": os.getloadavg(),
    }
    return costs, {**facts, "runs": found}


SLEEP = 1.0  # seconds: what a block of the tiny generator takes on a busy core

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
        "first_trial_min": found.first / 60,
        "pools": found.starts,
        "events_per_s": found.events / found.end,
    }


POLICIES = {
    "prepare, then trials": Policy(overlap=False, stream=False),
    "the next beside": Policy(stream=False),
    "one stream of trials": Policy(),
    "a single GPU prepares": Policy(share=10**6),
    "as many as is left to do": Policy(fit=True),
    "longest first": Policy(longest=True),
}

COLUMNS = {
    "hours": ("hours", ".1f"),
    "busy": ("busy", ".0%"),
    "producer_busy": ("those that prepare", ".0%"),
    "busy_beside_trials": ("while trials run", ".0%"),
    "barrier_gpu_hours": ("idle, no trial can run", ".1f"),
    "tail_gpu_hours": ("idle, none is left", ".0f"),
    "first_trial_min": ("first trial, min", ".0f"),
}


def simulated(gpus: int, costs: Costs, say: Callable[[str], None]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    say("| jobs | policy | " + " | ".join(title for title, _ in COLUMNS.values()) + " |")
    say("| --- " * 2 + "| ---: " * len(COLUMNS) + "|")
    for jobs, of in JOBS.items():
        groups = paper(*of)
        first, *others = groups
        by_blocks = [first, *sorted(others, key=lambda group: group.blocks)]
        for name, policy in POLICIES.items():
            one = played(by_blocks if policy.stream else groups, gpus, costs, policy)
            found[f"{jobs}: {name}"] = one
            cells = [format(one[key], form) for key, (_, form) in COLUMNS.items()]
            say(f"| {jobs} | {name} | {' | '.join(cells)} |")
    work = sum(
        sum(group.tasks)
        + group.blocks * costs.block
        + sum(job.gpu * job.seconds for job in group.jobs)
        for group in paper()
    )
    say(f"work: {work / 3600:.0f} GPU-hours, {work / 3600 / gpus:.1f} h on {gpus} GPUs")
    return found


JOBS: dict[str, tuple[float, bool, int]] = {
    "a quarter, seeds together": (0.25, False, 1),
    "a quarter, a job a seed": (0.25, True, 1),
    "a whole GPU, a job a seed": (1.0, True, 1),
    "the same, 12 points a cell": (1.0, True, 12),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpus", type=int, default=64)
    parser.add_argument("--simulate-only", action="store_true")
    asked = parser.parse_args()

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    machinery, facts = Costs(0.0, gap=0.05, driver=0.02, job=0.16), {}
    if not asked.simulate_only:
        with tempfile.TemporaryDirectory() as folder:
            machinery, facts = measured(Path(folder), say)
    costs = replace(machinery, block=BLOCK * IMAGE, start=LOAD, job=JOB)
    found = simulated(asked.gpus, costs, say)
    jobs = "a whole GPU, a job a seed"
    before, after = (
        found[f"{jobs}: {name}"] for name in ("prepare, then trials", "one stream of trials")
    )
    result = {
        "name": "scale",
        "ratio": before["hours"] / after["hours"],
        "baseline": f"each group prepared before its trials, {asked.gpus} GPUs, simulated",
        "gpus": asked.gpus,
        "machinery": facts,
        "simulated": found,
    }
    print(json.dumps(_rounded(result)))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()

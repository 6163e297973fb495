"""Artifacts and shards are made in order, each once, by simulated processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from air_core.settings import Ref
from orchestrator.execution import _allocation, _queue
from orchestrator.execution._allocation import Allocation
from orchestrator.execution._queue import Made, Row, WorkQueue
from orchestrator.failures import Failure
from orchestrator.planning import Requirement, requirements_of
from orchestrator.planning.requirements import independent_of, merge
from orchestrator.spec import Resources
from orchestrator.spec.resources import GeneratorResources
from orchestrator.store import ArtifactStore
from tests.helpers.trivial import Stream, Workers

START, SHARD, LORA = 10.0, 6.0, 30.0  # seconds of a start, of a shard or artifact, of a LoRA
STEP = 0.5  # between two turns of the driver
Seconds = float


class Simulated(Workers):
    """Streams on a virtual clock.

    Args:
        killed: numbers of the rows that end their stream.
        broken: stages and shards that raise an exception.
        lost: numbers of the rows that never return, since their machine is lost.
    """

    def __init__(
        self,
        store: ArtifactStore,
        killed: Collection[int] = (),
        broken: Collection[tuple[str, int, int]] = (),
        lost: Collection[int] = (),
    ) -> None:
        super().__init__(SimpleNamespace(store=store))
        self.now = 0.0
        self.killed, self.broken, self.lost = killed, broken, lost
        self.free: dict[int, list[Seconds]] = {}  # when each living actor is free
        self.begun: list[tuple[str, Any]] = []  # stage and shards
        self.owned: Counter[Any] = Counter()
        self.starts, self.most = 0, 0  # actors, and how many lived at a time

    def stream(self, kind: str, size: int, specs: Any) -> SimulatedStream:
        self.starts += size
        self.free[self.starts] = [self.now + START] * size
        self.most = max(self.most, self.living())
        return SimulatedStream(self, specs, self.starts)

    def living(self) -> int:
        return sum(map(len, self.free.values()))


class SimulatedStream(Stream):
    def __init__(self, workers: Simulated, specs: Any, number: int) -> None:
        super().__init__(workers.worker.store, specs)
        self.workers, self.number = workers, number
        self.running: list[tuple[Seconds, int, Row]] = []  # with their end and their number

    def release(self, row: Row, thrift: int) -> None:
        workers, spec = self.workers, self.specs[row.key]
        assert not any(workers.owned[each] for each in self.owned(row)), "another makes this shard"
        workers.owned.update(self.owned(row))
        workers.begun.append((spec.maker.stage, [(index, row.block) for index in row.indices]))
        free = workers.free[self.number]
        first = free.index(min(free))
        seconds = LORA if spec.stage == "lora" else SHARD
        free[first] = max(free[first], workers.now) + seconds * len(row.indices)
        self.running.append((free[first], len(workers.begun), row))

    def owned(self, row: Row) -> list[Any]:
        return [(self.specs[row.key].maker, index, row.block) for index in row.indices]

    def returned(self) -> list[tuple[Row, list[Made]]]:
        workers, found = self.workers, []
        for each in [*self.running]:
            ends, number, row = each
            if ends > workers.now or number in workers.lost:
                continue
            if number in workers.killed:
                self.problem = RuntimeError("the process died")
                break
            self.running.remove(each)
            workers.owned.subtract(self.owned(row))
            found.append((row, self.made(row)))
        return found

    def made(self, row: Row) -> list[Made]:
        spec, seconds = self.specs[row.key], SHARD
        if (spec.maker.stage, row.indices[0], row.block) in self.workers.broken:
            return [Made(0.0, {}, Failure("user", "ValueError: no"))]
        super().release(row, 0)
        [(_, made)] = super().returned()
        facts = {"on_device": seconds, "startup": 0.0, "drawn": int(bool(spec.rows))}
        return [Made(seconds, facts) for _ in made]

    def end(self) -> None:
        for _, _, row in self.running:
            self.workers.owned.subtract(self.owned(row))
        del self.workers.free[self.number]

    def is_alive(self) -> bool:
        return True  # as on a lost machine


class Listener:
    """Records the arguments of each call by the name of the method."""

    def __init__(self) -> None:
        self.events: dict[str, list[Any]] = {}

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self.events.setdefault(name, []).append(arguments)


class World:
    """A queue on a cluster of `cores` cores, with one generator on each."""

    def __init__(self, requirements: Any, workers: Simulated, cores: int) -> None:
        self.workers, self.cores, self.listener = workers, cores, Listener()
        resources = Resources(generator=GeneratorResources(reserve=1))
        self.allocation = Allocation(resources, lambda: [{"CPU": float(self.cores)}])
        self.queue = WorkQueue(requirements, workers, self.allocation, self.listener)

    def run(self, until: Any = lambda: False) -> World:
        while not (self.queue.is_over or until()):
            self.queue.take()
            self.queue.begin()
            self.workers.now += STEP
            assert self.workers.now < 2_000, self.queue.parts
        return self

    def stages(self) -> list[str]:
        return [stage for stage, _ in self.workers.begun]

    def prepared(self) -> int:
        return len(self.listener.events.get("on_prepared", []))


@pytest.fixture
def world(tmp_path, monkeypatch):
    def make(requirements: list[Requirement], cores: int = 2, **faults: Any) -> World:
        workers = Simulated(ArtifactStore(tmp_path), **faults)
        clock = SimpleNamespace(monotonic=lambda: workers.now)
        monkeypatch.setattr(_queue, "time", clock)
        monkeypatch.setattr(_allocation, "time", clock)
        return World(requirements, workers, cores)

    return make


@pytest.fixture
def rows(trial):
    """The row of images of each of some splits, without what comes before."""

    def make(splits: int = 1, **settings: Any) -> list[Requirement]:
        found = [requirements_of([trial("air", split_seed=i, **settings)]) for i in range(splits)]
        return [each for group in found for each in group if each.rows and not each.compared_with]

    return make


def test_loras_of_several_groups_train_side_by_side_and_pictures_come_last(trial, world):
    groups = [requirements_of([trial("air", split_seed=seed)]) for seed in range(3)]
    needed = merge(each for group in groups for each in group)
    needed.sort(key=lambda requirement: bool(requirement.compared_with))
    done = world(needed).run()
    stages = done.stages()
    assert stages[:6] == ["features", "labels", "lora", "labels", "lora", "images"]
    assert stages.count("lora") == 3
    assert stages.index("images") < len(stages) - 1 - stages[::-1].index("lora")
    made = [requirement for requirement, *_ in done.listener.events["on_prepared"]]
    *awaited, _, last = dict.fromkeys(made)
    assert last.compared_with
    assert not any(requirement.compared_with for requirement in awaited)
    assert done.prepared() == sum(requirement.total() for requirement in needed)


def test_without_gpus_the_process_that_encodes_makes_all_else(trial, world):
    done = world(requirements_of([trial("air")]), cores=1).run()
    assert {"features", "labels", "lora", "images"} <= {*done.stages()}
    assert done.workers.starts == 1


def test_rows_of_one_process_have_no_pause_between_them(rows, world):
    needed = rows(2)
    done = world(needed, cores=4).run()
    [(pool,)] = done.listener.events["on_pool_closed"]
    assert (pool.actors, pool.images) == (4, sum(each.total() for each in needed))
    assert pool.busy / pool.held > 0.85
    assert done.workers.now < START + SHARD * pool.images / 4 + 4 * SHARD


@pytest.mark.parametrize(("max_wait", "left"), [(0.0, 1), (1e6, 4)])
def test_a_pool_with_much_left_shrinks_when_trials_start_and_makes_no_shard_twice(
    rows, world, monkeypatch, max_wait, left
):
    monkeypatch.setattr(_queue, "MAX_POOL_WAIT", max_wait)
    running = world(rows(), cores=4)
    running.run(lambda: running.prepared() > 8)
    running.allocation.trials_running = True
    assert running.allocation.max_trials() == 0
    at = running.workers.now
    running.run(lambda: running.workers.now > at + 2 * SHARD)
    assert (running.workers.living(), running.workers.starts) == (left, 4)  # none began anew
    assert running.allocation.max_trials() == (3 if left == 1 else 0)
    running.run()
    assert running.prepared() == len(running.workers.begun)


@pytest.mark.parametrize(("start", "most"), [(10.0, 4), (1e9, 1)])
def test_a_pool_grows_when_trials_end_if_its_work_takes_longer_than_a_start(
    rows, world, monkeypatch, start, most
):
    monkeypatch.setattr(_queue, "PROCESS_START", start)
    running = world(rows(), cores=4)
    running.allocation.trials_running = True
    running.run(lambda: running.prepared() > 2)
    assert running.workers.most == 1
    running.allocation.trials_running = False
    assert running.run().workers.most == most
    assert running.prepared() == len(running.workers.begun)
    assert len(running.listener.events["on_pool_closed"]) == 1


def test_images_do_not_wait_for_a_process_that_trains_a_lora(trial, rows, world, monkeypatch):
    monkeypatch.setattr(_queue, "PROCESS_START", 100.0)  # longer than the images take
    spec = trial("air", split_seed=1, lora__steps=2000)
    lora = [each for each in requirements_of([spec]) if not each.rows]
    running = world([*lora, *rows(images_per_class=8)])
    running.run(lambda: "lora" in running.stages())
    before = running.stages().count("images")
    running.run(lambda: not running.queue.lacks(lora[-1]))
    assert running.stages().count("images") > before + 1


def test_without_a_reserve_images_wait_for_the_end_of_trials_and_a_lora_does_not(
    trial, world, monkeypatch
):
    monkeypatch.setattr(_queue, "MAX_POOL_WAIT", 0.0)
    needed = requirements_of([trial("air")])
    running = world(needed, cores=1)
    running.allocation.trials_running = True
    running.run(lambda: running.workers.now > 500)
    assert running.stages() == ["features", "labels", "lora"]
    running.allocation.trials_running = False
    assert not running.run().queue.parts


def test_shards_of_a_process_that_died_are_made_by_another(rows, world):
    needed = rows()
    done = world(needed, killed=(3, 7)).run()
    assert len(done.listener.events["on_retried"]) == 2
    assert "on_failed" not in done.listener.events
    assert done.prepared() == needed[0].total()
    assert needed[0].is_complete(done.queue.store)
    assert done.workers.starts > 2


def test_shards_on_a_lost_machine_are_made_by_the_others(rows, world):
    done = world(rows(), lost=[2])
    done.run(lambda: done.workers.now > START)
    assert done.workers.living() == 2
    done.cores = 1
    done.run()
    assert "on_failed" not in done.listener.events
    assert done.prepared() == len(done.workers.begun) - 1
    assert done.workers.most == 2


def test_a_row_fails_if_each_process_dies_at_its_first_shard(rows, world):
    done = world(rows(), killed=range(100)).run()
    ((_, failure),) = done.listener.events["on_failed"]
    assert (failure.failure_class, failure.message) == ("infra", "RuntimeError: the process died")
    assert len(done.listener.events["on_retried"]) == 2


def test_a_shard_that_cannot_be_made_is_named_and_the_others_are_made(trial, world):
    needed = [each for each in requirements_of([trial("air")]) if each.rows]
    done = world(needed, broken=[("images", 3, 0)]).run()
    failures = {each.stage: failure for each, failure in done.listener.events["on_failed"]}
    assert failures["images"].failure_class == "user"
    assert failures["images"].message.startswith("1 block is missing; digit three, block 0: Value")
    assert needed[0].missing(done.queue.store) == [(3, 0)]
    assert done.prepared() == needed[0].total() - 1  # no picture of a row that failed


def test_a_failed_artifact_stops_only_artifacts_that_need_it(trial, world):
    many = Ref(name="many", digest="many", images=10_000)
    large = requirements_of([replace(trial("air"), dataset=many)])
    others = requirements_of([trial("air")])
    done = world(merge([*large, *others]), broken=[("encoded", 0, 9)]).run()
    ((failed, failure),) = done.listener.events["on_failed"]
    assert (failed.stage, failure.failure_class) == ("encoded", "user")
    assert "on_retried" not in done.listener.events
    assert failure.message.startswith("1 block is missing; many, block 9: ValueError")
    assert [each for each in others if not each.is_complete(done.queue.store)] == []
    assert {each.stage for each in large if each.is_complete(done.queue.store)} == {"images"}
    # Images without LoRA are drawn only to compare them with those of a LoRA.
    alone = requirements_of([trial("air")])
    assert independent_of([alone[0]], alone) == []
    assert independent_of([alone[-1]], alone) == alone[:-1]


def test_draws_of_a_block_that_need_each_other_are_made_by_one_process(trial, world):
    settings = {"evidence__draws": 3, "evidence__block": 300}
    for pruned, size in ((1, 3), (None, 1)):
        spec = trial("cpl_evidence", evidence__prune_after=pruned, **settings)
        (errors,) = (each for each in requirements_of([spec]) if each.stage == "evidence")
        made = [shards for _, shards in world([errors]).run().workers.begun]
        assert [len(shards) for shards in made] == [size] * (12 // size)
        assert all(len({block for _, block in shards}) == 1 for shards in made)


def test_images_of_two_rows_of_features_are_drawn_once(trial, world):
    spec = trial("air", modality="visual")
    needed = [each for each in requirements_of([spec]) if each.rows and not each.compared_with]
    assert [each.spec.level for each in needed] == ["features", "tokens"]
    done = world(needed, cores=8).run()
    made = [requirement for requirement, *_ in done.listener.events["on_prepared"]]
    assert made == [*[needed[0]] * needed[0].total(), *[needed[1]] * needed[1].total()]

"""Who has which part of the cluster: decided here, over machines as Ray counts them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import pytest

from orchestrator.fit import Machine, room
from orchestrator.shares import Shares
from orchestrator.sweep import EncoderResources, GeneratorResources, Resources, TrialResources

GPU = Resources(trial=TrialResources(gpu=0.25), generator=GeneratorResources(gpu=1))
BIG = {"CPU": 32.0, "GPU": 8.0}


class Machines:
    """Some machines, and what is held of them."""

    def __init__(self, *machines: Machine) -> None:
        self.found: Sequence[Machine] = machines
        self.held: list[int] = []

    def machines(self) -> Sequence[Machine]:
        return self.found

    def hold(self, want: GeneratorResources, count: int) -> Any:
        self.held.append(count)
        return count

    def release(self, held: Any) -> None:
        self.held.remove(held)

    def ask_for(self, wants: Any) -> None: ...


def drawn_by(shares: Shares) -> tuple[int, Any]:
    with shares.drawing() as part:
        return part.count, part.held


@pytest.mark.parametrize(
    ("resources", "machines", "generators", "reserve", "beside", "alone"),
    [
        (GPU, [BIG], 8, 1, 28, 32),
        (GPU, [BIG, BIG], 16, 2, 56, 64),
        (GPU, [{"CPU": 8.0, "GPU": 1.0}], 1, 0, 4, 4),  # too small for both
        (Resources(), [{"CPU": 2.0}], 2, 1, 1, 2),
        (Resources(), [{"CPU": 1.0}], 1, 0, 1, 1),
        (Resources(generator=GeneratorResources(reserve=3)), [{"CPU": 8.0}], 8, 3, 5, 8),
        (Resources(generator=GeneratorResources(reserve=8)), [{"CPU": 8.0}], 8, 7, 1, 8),
        (Resources(generator=GeneratorResources(reserve=0)), [{"CPU": 8.0}], 8, 0, 8, 8),
        (Resources(generator=GeneratorResources(actors=2)), [{"CPU": 8.0}], 2, 1, 7, 8),
    ],
)
def test_a_reserve_is_kept_from_trials_while_something_is_left_to_prepare(
    resources, machines, generators, reserve, beside, alone
):
    shares = Shares(resources, Machines(*machines))
    assert (shares.generators(), shares.reserve()) == (generators, reserve)
    shares.preparing = True
    assert shares.trials() == beside
    shares.preparing = False
    assert shares.trials() == alone


HALF = Resources(trial=GPU.trial, generator=GeneratorResources(gpu=1, reserve=4))


def test_generators_have_everything_until_trials_run_and_a_held_reserve_then():
    cluster = Machines(BIG)
    shares = Shares(HALF, cluster)
    shares.preparing = True
    assert drawn_by(shares) == (8, None)
    with shares.tuning():
        assert drawn_by(shares) == (4, 4)
        assert cluster.held == [4]  # so that no trial takes it between two rows
        with shares.beside() as place:
            assert place == 4
    assert cluster.held == []
    assert drawn_by(shares) == (8, None)


def test_a_pool_hears_when_trials_come_and_when_they_go():
    shares = Shares(HALF, Machines(BIG))
    with shares.drawing() as wide:
        assert shares.moved(wide) is None
        with shares.tuning():
            assert shares.moved(wide) == 4
        assert shares.moved(wide) is None
    with shares.tuning(), shares.drawing() as narrow:
        assert (narrow.count, shares.moved(narrow)) == (4, None)
    assert shares.moved(narrow) == 8


def test_trials_begin_when_generators_have_given_room():
    shares = Shares(HALF, Machines(BIG))
    shares.preparing = True
    with ExitStack() as pool:
        pool.enter_context(shares.drawing())
        with shares.tuning():
            assert shares.trials() == 0
            pool.close()
            assert shares.trials() == 16


def test_whoever_made_something_ready_waits_a_moment_for_trials_to_begin():
    shares, order = Shares(HALF, Machines(BIG)), []

    def prepare() -> None:
        shares.give_way()
        order.append("next pool")

    thread = threading.Thread(target=prepare, daemon=True)
    thread.start()
    order.append("trials")
    with shares.tuning():
        thread.join(10)
    assert order == ["trials", "next pool"]


def test_on_a_small_cluster_a_pool_waits_until_the_trials_are_over():
    shares = Shares(GPU, Machines({"CPU": 8.0, "GPU": 1.0}))
    found = []
    with shares.tuning():
        thread = threading.Thread(target=lambda: found.append(drawn_by(shares)), daemon=True)
        thread.start()
        thread.join(0.2)
        assert found == []
        with shares.beside() as place:
            assert place is None  # a LoRA takes a device where one is free
    thread.join(10)
    assert found == [(1, None)]


@pytest.mark.parametrize("lost", [True, False])
def test_trials_get_the_reserve_when_it_is_the_last_place_or_nobody_works_in_it(monkeypatch, lost):
    monkeypatch.setattr("orchestrator.shares.LOOK_EVERY", 0.0)
    core: Machine = {"CPU": 1.0}
    cluster = Machines(core, core)
    shares = Shares(Resources(), cluster)
    shares.preparing = True
    with shares.tuning():
        with shares.drawing() as part:
            assert part.reserved
            if lost:
                cluster.found = (core,)
            assert cluster.held == [1]  # somebody works in it
        assert cluster.held == ([] if lost else [1])  # else the next draw in it
        shares.preparing = False
        assert cluster.held == []
        assert shares.trials() == len(cluster.found)


def test_a_machine_that_comes_is_used(monkeypatch):
    monkeypatch.setattr("orchestrator.shares.LOOK_EVERY", 0.0)
    cluster = Machines(BIG)
    shares = Shares(GPU, cluster)
    cluster.found = [BIG, BIG]
    assert (shares.generators(), shares.trials()) == (16, 64)


def test_encoders_share_devices_and_ask_for_what_a_trial_does_unless_told():
    assert GPU.want("features") == GPU.trial
    half = Resources(trial=GPU.trial, encoder=EncoderResources(gpu=0.5))
    assert (half.want("labels").gpu, half.want("labels").cpu) == (0.5, 1.0)
    assert half.want("lora") == half.generator == half.want("images")
    shares = Shares(HALF, Machines(BIG))
    assert shares.places(GPU.want("features")) == 32
    with shares.tuning():
        assert shares.places(GPU.want("features")) == 4  # one core each, in the reserve
        assert shares.places(GPU.want("lora")) == 4


def test_what_machines_have_beside_cores_and_devices_counts():
    tagged = Resources(generator=GeneratorResources(custom={"sd": 1}))
    machines = [{"CPU": 8.0}, {"CPU": 8.0, "sd": 2.0}]
    assert room(tagged.generator, machines) == 2
    shares = Shares(tagged, Machines(*machines))
    shares.preparing = True
    assert shares.trials() == 15

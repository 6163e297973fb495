"""How many generators and trials may run, over machines as Ray counts them."""

from __future__ import annotations

import pytest

from orchestrator.execution._allocation import Allocation
from orchestrator.planning import Machine
from orchestrator.planning.resources import room
from orchestrator.spec import Resources
from orchestrator.spec.sweep import EncoderResources, GeneratorResources, TrialResources

GPU = Resources(trial=TrialResources(gpu=0.25), generator=GeneratorResources(gpu=1))
HALF = Resources(trial=GPU.trial, generator=GeneratorResources(gpu=1, reserve=4))
BIG: Machine = {"CPU": 32.0, "GPU": 8.0}


def allocation(resources: Resources, *machines: Machine) -> Allocation:
    return Allocation(resources, lambda: machines)


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
    found = allocation(resources, *machines)
    assert (found.generators(), found.reserve()) == (generators, reserve)
    assert found.pool() == generators
    found.tuning = True
    assert found.pool() == reserve
    found.preparing = True
    assert found.trials() == beside
    found.preparing = False
    assert found.trials() == alone


def test_trials_begin_when_generators_have_given_room(monkeypatch):
    found = allocation(HALF, BIG)
    found.preparing = found.wide = found.tuning = True
    assert found.trials() == 0
    found.wide = False
    assert found.trials() == 16
    found.wide = True
    monkeypatch.setattr(
        "orchestrator.execution._allocation.NARROWING", 0.0
    )  # a block that takes too long
    assert found.trials() == 16


def test_a_machine_that_comes_is_used(monkeypatch):
    monkeypatch.setattr("orchestrator.execution._allocation.LOOK_EVERY", 0.0)
    machines = [BIG]
    found = Allocation(GPU, lambda: machines)
    assert (found.generators(), found.trials()) == (8, 32)
    machines.append(BIG)
    assert (found.generators(), found.trials()) == (16, 64)


def test_encoders_share_devices_and_ask_for_what_a_trial_does_unless_told():
    assert GPU.want("features") == GPU.trial
    half = Resources(trial=GPU.trial, encoder=EncoderResources(gpu=0.5))
    assert (half.want("labels").gpu, half.want("labels").cpu) == (0.5, 1.0)
    assert half.want("lora") == half.generator == half.want("images")
    found = allocation(HALF, BIG)
    assert found.tasks(GPU.want("features")) == 32
    found.tuning = True
    assert found.tasks(GPU.want("features")) == 4  # one core each, in the reserve
    assert found.tasks(GPU.want("lora")) == 4


def test_on_a_small_cluster_a_lora_takes_a_device_where_one_is_free():
    found = allocation(GPU, {"CPU": 8.0, "GPU": 1.0})
    found.tuning = True
    assert (found.pool(), found.tasks(GPU.want("lora"))) == (0, 1)


def test_what_machines_have_beside_cores_and_devices_counts():
    tagged = Resources(generator=GeneratorResources(custom={"sd": 1}))
    machines = [{"CPU": 8.0}, {"CPU": 8.0, "sd": 2.0}]
    assert room(tagged.generator, machines) == 2
    found = allocation(tagged, *machines)
    found.preparing = True
    assert found.trials() == 15

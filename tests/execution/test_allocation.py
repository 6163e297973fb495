"""Limits on generators and trials, for machines as Ray counts them."""

from __future__ import annotations

import pytest

from orchestrator.execution._allocation import Allocation
from orchestrator.planning import Machine
from orchestrator.spec import Resources
from orchestrator.spec.resources import EncoderResources, GeneratorResources, TrialResources

GPU = Resources(trial=TrialResources(gpu=0.25), generator=GeneratorResources(gpu=1))
HALF = Resources(trial=GPU.trial, generator=GeneratorResources(gpu=1, reserve=4))
TAGGED = Resources(generator=GeneratorResources(custom={"sd": 1}))
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
        (TAGGED, [{"CPU": 8.0}, {"CPU": 8.0, "sd": 2.0}], 2, 1, 15, 16),
    ],
)
def test_trials_leave_a_reserve_free_while_artifacts_are_missing(
    resources, machines, generators, reserve, beside, alone
):
    limits = allocation(resources, *machines)
    assert (limits.capacity("generator"), limits.reserve()) == (generators, reserve)
    limits.trials_running = True
    assert limits.capacity("generator") == reserve
    limits.preparing = True
    assert limits.max_trials() == beside
    limits.preparing = False
    assert limits.max_trials() == alone


def test_trials_wait_for_a_pool_that_shrinks_to_its_reserve(monkeypatch):
    limits = allocation(HALF, BIG)
    limits.preparing = limits.trials_running = True
    trials = []
    for generators in (8, 6, 4, 1):
        limits.pools["generator"] = generators
        trials.append(limits.max_trials())
    assert trials == [0, 8, 16, 16]
    limits.pools["generator"] = 8
    # A block takes too long.
    monkeypatch.setattr("orchestrator.execution._allocation.MAX_POOL_WAIT", 0.0)
    assert limits.max_trials() == 16


def test_encoders_have_the_resources_of_a_trial_by_default_and_run_inside_the_reserve():
    assert GPU.process_resources("encoder") == GPU.trial
    half = Resources(trial=GPU.trial, encoder=EncoderResources(gpu=0.5))
    encoder = half.process_resources("encoder")
    assert (encoder.gpu, encoder.cpu) == (0.5, 1.0)
    assert half.process_resources("generator") == half.generator
    assert half.pool_of("encoder") == "encoder"
    assert Resources().pool_of("encoder") == "generator"  # equal resources, without GPUs
    assert Resources(generator=GeneratorResources(actors=1)).pool_of("encoder") == "encoder"
    limits = allocation(HALF, BIG)
    assert (limits.room("encoder"), limits.room("generator")) == (32, 8)
    limits.pools["generator"] = 6
    assert (limits.room("encoder"), limits.room("generator")) == (8, 2)
    limits.pools["generator"] = 1
    limits.trials_running = True
    assert (limits.room("encoder"), limits.room("generator")) == (3, 3)  # one core each


def test_on_a_small_cluster_one_task_takes_a_free_device():
    limits = allocation(GPU, {"CPU": 8.0, "GPU": 1.0})
    limits.trials_running = True
    assert (limits.room("generator"), limits.room("encoder")) == (0, 0)
    assert limits.room("generator", is_task=True) == 1
    limits.pools["generator"] = 1
    assert limits.room("generator", is_task=True) == 0

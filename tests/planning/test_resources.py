"""Resources: a sweep that fits no machine is refused before it starts."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.planning.resources import (
    CONTEXT,
    memory_fraction,
    process_capacity,
    resource_shortage,
)
from orchestrator.spec import Resources
from orchestrator.spec.sweep import GeneratorResources, TrialResources

SMALL = {"CPU": 4.0}
GPUS = {"CPU": 8.0, "GPU": 2.0, "memory": 1e9}


def resources_of(trial: tuple[float, float], generator: tuple[float, float] = (1, 0)) -> Resources:
    return Resources(
        trial=TrialResources(cpu=trial[0], gpu=trial[1]),
        generator=GeneratorResources(cpu=generator[0], gpu=generator[1]),
    )


@pytest.mark.parametrize(
    ("resources", "machines", "message"),
    [
        (resources_of((4, 0)), [SMALL], None),
        (resources_of((5, 0)), [SMALL, SMALL], "a trial requires 5 CPU and 0 GPU"),  # 8 in all
        (resources_of((1, 0.5), (8, 2)), [SMALL, GPUS], None),
        (
            resources_of((1, 0), (9, 1)),
            [{"CPU": 64.0}, GPUS],
            "a generator requires 9 CPU and 1 GPU",
        ),
        (resources_of((1, 1)), [SMALL], "--set resources.trial.gpu=0"),
        (resources_of((1, 0), (1, 1)), [SMALL], "--set resources.generator.gpu=0"),
    ],
)
def test_a_process_must_fit_on_one_machine(resources, machines, message):
    found = resource_shortage(resources, machines, prepares=True)
    assert found is None if message is None else message in str(found)


def test_without_preparation_generators_need_not_fit():
    assert resource_shortage(resources_of((1, 0), (99, 0)), [SMALL], prepares=False) is None


@pytest.mark.parametrize(
    ("want", "expected"),
    [({"cpu": 3}, 1 + 2), ({"cpu": 1, "gpu": 0.5}, 4), ({"cpu": 0, "gpu": 0}, 4 + 8)],
)
def test_parallel_processes_are_counted_machine_by_machine(want: dict[str, Any], expected):
    assert process_capacity(TrialResources(**want), [SMALL, GPUS]) == expected


@pytest.mark.parametrize("gpu", [0.5, 0.33, 0.25, 0.1])
def test_trials_that_share_a_gpu_do_not_exceed_its_memory(gpu):
    total = 16 * 2**30
    fraction = memory_fraction(gpu, total)
    assert 0 < fraction < gpu
    assert int(1 / gpu) * (fraction * total + CONTEXT) <= total

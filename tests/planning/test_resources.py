"""Resources: a sweep that fits no machine is refused before it starts."""

from __future__ import annotations

from typing import Any

import pytest

from air_core.methods import EMBEDDED, METHODS
from air_core.settings.flat import to_flat
from orchestrator.planning.resources import (
    process_capacity,
    resource_shortage,
    this_machine,
    trial_memory,
)
from orchestrator.spec import Resources
from orchestrator.spec.resources import GeneratorResources, TrialResources
from orchestrator.stages import trial_of
from orchestrator.stages.context import CONTEXT, memory_fraction

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


GIB = 2**30
LARGE = Resources(trial=TrialResources(memory=12 * GIB))


def test_a_trial_that_reserves_memory_needs_a_machine_with_as_much():
    small, large = {"CPU": 64.0, "memory": 16.0 * GIB}, {"CPU": 64.0, "memory": 40.0 * GIB}
    assert process_capacity(LARGE.trial, [small, large]) == 1 + 3
    assert resource_shortage(LARGE, [small], prepares=True) is None
    assert resource_shortage(LARGE, [{"CPU": 64.0, "memory": 8.0 * GIB}] * 2, prepares=True) == (
        "a trial requires 1 CPU and 0 GPU and 12.0 GiB memory, and no machine has all; the largest "
        "amounts on one machine are 64 CPU, 0 GPU, 8.0 GiB memory: use a machine with more memory, "
        "run with `seeds: [1]`, set pool_size, or, if you know that less suffices, "
        "resources.trial.memory"
    )
    assert this_machine()["memory"] > GIB / 2


@pytest.mark.parametrize(
    ("classes", "pool", "together"),
    # Of 200 classes, one pass on a CPU has the texts of one seed, on a GPU those of three.
    [(1000, 128_000, {"cpu": 1, "cuda": 1}), (200, 1_000_000, {"cpu": 1, "cuda": 3})],
)
def test_a_trial_of_a_large_pool_reserves_the_memory_of_its_arrays(classes, pool, together):
    trial = METHODS["cpl"].trial()
    refs = {name: getattr(trial, name) for name in EMBEDDED}
    spec = trial_of(to_flat(trial), refs, tuple(map(str, range(classes))))
    for device, count in together.items():
        arrays = 4 * pool * classes * 4 * count
        assert trial_memory(spec, pool, 3, device) == arrays + GIB
    assert trial_memory(spec, 1797, 3, "cpu") == 0

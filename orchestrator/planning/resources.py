"""Resources: whether the processes of a sweep fit the machines, checked before it starts.

Without this check Ray would wait indefinitely for a machine that is large enough. This module does
not use Ray: a machine is a mapping from resource to amount.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

from orchestrator.formatting import format_bytes
from orchestrator.spec import ProcessResources, Resources
from orchestrator.stages import TrialSpec
from orchestrator.stages.trial import side_by_side

# Amounts of "CPU", "GPU", "memory" (bytes) and custom resources, as Ray counts them.
Machine = Mapping[str, float]


def this_machine() -> Machine:
    """CPUs and GPUs of this machine as Ray will count them. Imports no torch.

    Its memory is an upper bound: Ray counts what is free when it starts.
    """
    gpus, visible = len(glob.glob("/dev/nvidia[0-9]*")), os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        gpus = min(gpus, len(visible.split(",")) if visible not in ("", "NoDevFiles") else 0)
    memory = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return {"CPU": float(os.cpu_count() or 1), "GPU": float(gpus), "memory": memory}


def ray_resources(want: ProcessResources) -> dict[str, float]:
    """The resources that a process requires, by Ray's names."""
    memory = getattr(want, "memory", None)  # a generator has none
    reserved = {"memory": float(memory)} if memory else {}
    return {"CPU": want.cpu, "GPU": want.gpu, **reserved, **want.custom}


def format_amount(kind: str, amount: float) -> str:
    """An amount of a resource in a message, without its kind.

    >>> format_amount("CPU", 2.0), format_amount("memory", 2.0**31)
    ('2', '2.0 GiB')
    """
    return format_bytes(amount) if kind == "memory" else f"{amount:g}"


def resource_shortage(
    resources: Resources, machines: Sequence[Machine], prepares: bool
) -> str | None:
    """Explain which process fits on no machine; None if every process fits on one.

    A process runs on one machine, so the sum over machines does not count.

    Args:
        prepares: whether artifacts are left to prepare before trials can run.
    """
    required: dict[str, ProcessResources] = {"trial": resources.trial}
    if prepares:
        required |= {"generator": resources.generator, "encoder": resources.encoder_resources}
    for name, want in required.items():
        if not process_capacity(want, machines):
            return _shortage(name, want, machines)
    return None


def _shortage(name: str, want: ProcessResources, machines: Sequence[Machine]) -> str:
    required = ray_resources(want)
    most = {
        kind: max((machine.get(kind, 0.0) for machine in machines), default=0.0)
        for kind in required
    }
    advice = f"lower resources.{name}.cpu or .gpu"
    if want.gpu and not most["GPU"]:
        advice = f"without a GPU, use --set resources.{name}.gpu=0"
    elif most.get("memory", 0.0) < required.get("memory", 0.0):
        advice = (
            "use a machine with more memory, run with `seeds: [1]`, set pool_size, or, if you know "
            "that less suffices, resources.trial.memory"
        )
    wanted, found = (
        [f"{format_amount(kind, amount)} {kind}" for kind, amount in amounts.items()]
        for amounts in (required, most)
    )
    return (
        f"a{'n' if name == 'encoder' else ''} {name} requires {' and '.join(wanted)}, and no "
        f"machine has {'all' if len(wanted) > 2 else 'both'}; the largest amounts on one machine "
        f"are {', '.join(found)}: {advice}"
    )


def process_capacity(want: ProcessResources, machines: Sequence[Machine]) -> int:
    """Number of processes that the machines can run in parallel."""
    return sum(_capacity_of(machine, want) for machine in machines)


def _capacity_of(machine: Machine, want: ProcessResources) -> int:
    limits = [
        int(machine.get(kind, 0) // amount)
        for kind, amount in ray_resources(want).items()
        if amount
    ]
    return min(limits, default=int(machine.get("CPU", 1)))


def remaining_resources(
    machines: Sequence[Machine], want: ProcessResources, count: int
) -> list[Machine]:
    """The resources that remain free beside `count` processes, or as many of them as fit.

    >>> from orchestrator.spec.resources import GeneratorResources
    >>> machines = [{"CPU": 8, "GPU": 2}, {"CPU": 8, "GPU": 1}]
    >>> remaining_resources(machines, GeneratorResources(gpu=1), 2)
    [{'CPU': 6.0, 'GPU': 0}, {'CPU': 8, 'GPU': 1}]
    """
    remaining: list[Machine] = []
    for machine in machines:
        placed = min(count, _capacity_of(machine, want))
        count -= placed
        used = {kind: amount * placed for kind, amount in ray_resources(want).items() if placed}
        remaining.append({kind: total - used.get(kind, 0) for kind, total in machine.items()})
    return remaining


# Float arrays of pool images x classes that a trial holds: cached logits, scores, targets, a copy.
ARRAYS = 4
PROCESS = 2**30  # bytes that a process takes beside them
LARGE = 2**30  # bytes of arrays; for less, no memory is reserved


def trial_memory(spec: TrialSpec, pool: int, seeds: int, device: str) -> int:
    """Bytes of memory that a job takes which runs a trial with several seeds; 0 if it is small.

    Args:
        pool: number of pool images.
    """
    groups = side_by_side([replace(spec, seed=seed) for seed in range(seeds)], device)
    arrays = ARRAYS * 4 * pool * len(spec.classnames) * max(map(len, groups))
    return arrays + PROCESS if arrays >= LARGE else 0

"""Resources: whether the processes of a sweep fit the machines, checked before it starts.

Without this check Ray would wait indefinitely for a machine that is large enough. This module does
not use Ray: a machine is a mapping from resource to amount.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping, Sequence

from air_core.specs import TrialSpec
from air_core.specs.conditions import has_context
from orchestrator.spec import ProcessResources, Resources

Machine = Mapping[str, float]  # amounts of "CPU", "GPU" and custom resources, as Ray counts them


def this_machine() -> Machine:
    """CPUs and GPUs of this machine as Ray will count them. Imports no torch."""
    gpus, visible = len(glob.glob("/dev/nvidia[0-9]*")), os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        gpus = min(gpus, len(visible.split(",")) if visible not in ("", "NoDevFiles") else 0)
    return {"CPU": float(os.cpu_count() or 1), "GPU": float(gpus)}


def ray_resources(want: ProcessResources) -> dict[str, float]:
    """The resources that a process requires, by Ray's names."""
    return {"CPU": want.cpu, "GPU": want.gpu, **want.custom}


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
    most = {
        kind: max((machine.get(kind, 0.0) for machine in machines), default=0.0)
        for kind in ray_resources(want)
    }
    missing = [kind for kind in want.custom if not most[kind]]
    advice = f"lower resources.{name}.cpu or .gpu"
    if missing:
        advice = (
            f"start nodes that have {missing[0]} with `ray start --resources`, or remove "
            f"{missing[0]} from resources.{name}.custom"
        )
    elif want.gpu and not most["GPU"]:
        advice = f"without a GPU, use --set resources.{name}.gpu=0"
    more = "".join(f" and {amount:g} {kind}" for kind, amount in want.custom.items())
    return (
        f"a{'n' if name == 'encoder' else ''} {name} requires {want.cpu:g} CPU and {want.gpu:g} "
        f"GPU{more}, and no machine has {'all' if more else 'both'}; the largest amounts on one "
        f"machine are {', '.join(f'{amount:g} {kind}' for kind, amount in most.items())}: {advice}"
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

    >>> from orchestrator.spec.sweep import GeneratorResources
    >>> machines = [{"CPU": 8, "GPU": 2}, {"CPU": 8, "GPU": 1}]
    >>> remaining_resources(machines, GeneratorResources(gpu=1), 2)
    [{'CPU': 6.0, 'GPU': 0.0}, {'CPU': 8, 'GPU': 1}]
    """
    remaining: list[Machine] = []
    for machine in machines:
        placed = min(count, _capacity_of(machine, want))
        count -= placed
        used = {kind: amount * placed for kind, amount in ray_resources(want).items() if placed}
        remaining.append({kind: total - used.get(kind, 0) for kind, total in machine.items()})
    return remaining


CONTEXT = 2**29  # bytes of GPU memory that the CUDA context of each process takes


def memory_fraction(gpu: float, total: float) -> float | None:
    """Fraction of a GPU's memory that a process may allocate; None if it does not share the GPU.

    The CUDA context of the process is not part of the fraction.

    Args:
        gpu: fraction of a GPU that a trial reserves.
        total: bytes of memory of the GPU.

    >>> memory_fraction(0.25, 80 * 2**30)
    0.24375
    >>> memory_fraction(1, 80 * 2**30)
    """
    if not 0 < gpu < 1:
        return None
    return max(gpu / 2, gpu - CONTEXT / total)


# Class texts in one pass. Each keeps 1 to 2 MB for the gradient with ViT-B/32, and beyond these
# numbers the time depends on the arithmetic, so that more bring nothing.
MAX_TEXTS = {"cpu": 256, "cuda": 1024}


def side_by_side(
    specs: Sequence[TrialSpec], device: str, share: float = 1.0
) -> list[list[TrialSpec]]:
    """Groups of trials whose prompts stand before the same class names in the same text tower.

    Other trials are alone: other learners have no such pass to share, and a transfer trial trains
    nothing itself.

    Args:
        share: of the usual number of class texts in a group, for a device short of memory.
    """
    groups: dict[object, list[TrialSpec]] = {}
    for spec in specs:
        alone = not has_context(spec) or spec.test_dataset is not None
        shared = (spec.dataset, spec.backbone, spec.precision, spec.prompt.length)
        groups.setdefault(spec if alone else shared, []).append(spec)
    parts = []
    for group in groups.values():
        texts = MAX_TEXTS["cpu" if device == "cpu" else "cuda"]
        size = max(1, int(texts * share) // max(1, len(group[0].classnames)))
        parts += [group[start : start + size] for start in range(0, len(group), size)]
    return parts

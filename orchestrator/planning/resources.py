"""Resources and disk space: whether a sweep fits the machines, checked before it starts.

Without this check Ray would wait indefinitely for a machine that is large enough. This module does
not use Ray: a machine is a mapping from resource to amount.
"""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from air_core.specs import TrialSpec
from air_core.specs.conditions import has_context
from orchestrator.formatting import format_bytes
from orchestrator.spec import ProcessResources, Resources
from orchestrator.store import ArtifactStore

if TYPE_CHECKING:
    from orchestrator.planning.plan import Plan

Machine = Mapping[str, float]  # amounts of "CPU", "GPU" and custom resources, as Ray counts them


def this_machine() -> Machine:
    """CPUs and GPUs of this machine as Ray will count them. Imports no torch."""
    return {"CPU": float(os.cpu_count() or 1), "GPU": float(len(glob.glob("/dev/nvidia[0-9]*")))}


def ray_resources(want: ProcessResources) -> dict[str, float]:
    """The resources that a process requires, by Ray's names."""
    return {"CPU": want.cpu, "GPU": want.gpu, **want.custom}


def unschedulable_reason(
    plan: Plan, store: ArtifactStore, machines: Sequence[Machine] | None = None
) -> str | None:
    """Explain why work of a plan could never be scheduled; None if all of it can.

    Args:
        machines: the machines of the cluster; None: this machine. If RAY_ADDRESS is set and the
            machines are not given, the result is None, since the cluster is not known yet.
    """
    if machines is None:
        if os.environ.get("RAY_ADDRESS"):
            return None
        machines = [this_machine()]
    prepares = any(not requirement.is_complete(store) for requirement in plan.requirements)
    if not (plan.to_run or prepares):
        return None
    return resource_shortage(plan.sweep.resources, machines, prepares)


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


# ---------------------------------------------------------------- disk space


def bytes_left(plan: Plan, store: ArtifactStore) -> int:
    """Estimate the bytes of everything that is left to compute.

    Each artifact counts as the mean of the stored artifacts of its stage, and as 0 if the store has
    none. So the result is a lower bound until the store has some of each stage.
    """
    expected = 0.0
    for requirement in plan.requirements:
        have, total = requirement.have(store), requirement.total()
        if have and have < total:
            expected += requirement.bytes(store) / have * (total - have)
        elif not have and not requirement.rows:
            expected += _mean_bytes(store.artifacts / requirement.stage)
    missing = sum(not store.has(slot.spec) for slot in plan.slots) + plan.total - len(plan.slots)
    return round(expected + _mean_bytes(store.artifacts / "trials") * missing)


def _mean_bytes(stage: Path) -> float:
    """Mean bytes of the artifacts of a stage; 0 if there are none."""
    sizes = [sum(file.stat().st_size for file in folder.glob("*")) for folder in stage.glob("*/*")]
    return fmean(sizes) if sizes else 0.0


def full_disk_message(plan: Plan, store: ArtifactStore, problem: str) -> str:
    """Describe a full disk: free and needed space, and how to free some.

    Args:
        problem: the error message, or the name of the file that could not be written.
    """
    disk = shutil.disk_usage(store.root)
    left = bytes_left(plan, store)
    needed = f"; the sweep needs at least {format_bytes(left)} more" if left else ""
    gc = f"airsweep cache gc --store {store.root}"
    return (
        f"no space left on the disk of the store {store.root} ({problem}): "
        f"{format_bytes(disk.free)} of {format_bytes(disk.total)} are free after the removal of "
        f"unfinished files{needed}; `{gc}` lists what no sweep "
        "needs; free some space, then run the same command again to resume"
    )

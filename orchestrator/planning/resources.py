"""Does a sweep fit the machines? Said before anything starts: Ray would wait without a word.

Knows no Ray: machines arrive as what each has.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from orchestrator.spec import ProcessResources, Resources
from orchestrator.store import ArtifactStore

if TYPE_CHECKING:
    from orchestrator.planning.plan import Plan

Machine = Mapping[str, float]  # "CPU", "GPU" and custom ones, as Ray counts them


def this_machine() -> Machine:
    """What Ray will find here. Imports no torch."""
    return {"CPU": float(os.cpu_count() or 1), "GPU": float(len(glob.glob("/dev/nvidia[0-9]*")))}


def ray_resources(want: ProcessResources) -> dict[str, float]:
    """By Ray's name, what a process asks for."""
    return {"CPU": want.cpu, "GPU": want.gpu, **want.custom}


def resource_shortage(
    resources: Resources, machines: Sequence[Machine], prepares: bool
) -> str | None:
    """Why work could never start; None: it can.

    A trial or a generator runs on one machine, so the sum over machines helps nobody.

    Args:
        prepares: is anything left to make before trials can run?
    """
    asked: dict[str, ProcessResources] = {"trial": resources.trial}
    if prepares:
        asked |= {"generator": resources.generator, "encoder": resources.encoding}
    for name, want in asked.items():
        if not room(want, machines):
            return _no_room(name, want, machines)
    return None


def _no_room(name: str, want: ProcessResources, machines: Sequence[Machine]) -> str:
    most = {
        kind: max((machine.get(kind, 0.0) for machine in machines), default=0.0)
        for kind in ray_resources(want)
    }
    missing = [kind for kind in want.custom if not most[kind]]
    advice = f"lower resources.{name}.cpu or .gpu"
    if missing:
        advice = (
            f"start the nodes that have it with `ray start --resources`, or leave {missing[0]} "
            f"out of resources.{name}.custom"
        )
    elif want.gpu and not most["GPU"]:
        advice = f"without a GPU, give --set resources.{name}.gpu=0"
    more = "".join(f" and {amount:g} {kind}" for kind, amount in want.custom.items())
    return (
        f"a{'n' if name == 'encoder' else ''} {name} asks for {want.cpu:g} CPU and {want.gpu:g} "
        f"GPU{more}, and no machine has {'all' if more else 'both'}; the largest have "
        f"{', '.join(f'{amount:g} {kind}' for kind, amount in most.items())}: {advice}"
    )


def room(want: ProcessResources, machines: Sequence[Machine]) -> int:
    """How many of them run at a time."""
    return sum(_room(want, machine) for machine in machines)


def without(machines: Sequence[Machine], want: ProcessResources, count: int) -> list[Machine]:
    """What is left where so many run; as many as there is room for.

    >>> from orchestrator.spec.sweep import GeneratorResources
    >>> without([{"CPU": 8, "GPU": 2}, {"CPU": 8, "GPU": 1}], GeneratorResources(gpu=1), 2)
    [{'CPU': 6.0, 'GPU': 0.0}, {'CPU': 8, 'GPU': 1}]
    """
    left: list[Machine] = []
    for machine in machines:
        here = min(count, _room(want, machine))
        count -= here
        taken = {kind: each * here for kind, each in ray_resources(want).items() if here}
        left.append({kind: has - taken.get(kind, 0) for kind, has in machine.items()})
    return left


CONTEXT = 2**29  # bytes of a device that each process takes beside its tensors


def memory_fraction(gpu: float, total: float) -> float | None:
    """Of a device's memory, what a process may allocate that shares it; None: it shares none.

    What CUDA itself takes of each process is no part of what it may allocate.

    Args:
        gpu: share of a device that a trial asks for.
        total: bytes of the device.

    >>> memory_fraction(0.25, 80 * 2**30)
    0.24375
    >>> memory_fraction(1, 80 * 2**30)
    """
    if not 0 < gpu < 1:
        return None
    return max(gpu / 2, gpu - CONTEXT / total)


def _room(want: ProcessResources, machine: Machine) -> int:
    limits = [
        int(machine.get(kind, 0) // each) for kind, each in ray_resources(want).items() if each
    ]
    return min(limits, default=int(machine.get("CPU", 1)))


def unschedulable_reason(
    plan: Plan, store: ArtifactStore, machines: Sequence[Machine] | None = None
) -> str | None:
    """What would wait for ever; None: nothing, or this is told only once the cluster is joined."""
    if machines is None:
        if os.environ.get("RAY_ADDRESS"):
            return None
        machines = [this_machine()]
    prepares = any(
        requirement.have(store) < requirement.total() for requirement in plan.requirements
    )
    return resource_shortage(plan.sweep.resources, machines, prepares)

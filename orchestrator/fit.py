"""Does a sweep fit the machines? Said before anything starts: Ray would wait without a word.

Knows no Ray: machines arrive as what each has.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping, Sequence

from orchestrator.sweep import GeneratorResources, Resources, TrialResources

Machine = Mapping[str, float]  # "CPU", "GPU", as Ray counts them


def this_machine() -> Machine:
    """What Ray will find here. Imports no torch."""
    return {"CPU": float(os.cpu_count() or 1), "GPU": float(len(glob.glob("/dev/nvidia[0-9]*")))}


def misfit(resources: Resources, machines: Sequence[Machine], prepares: bool) -> str | None:
    """Why work could never start; None: it can.

    A trial or a generator runs on one machine, so the sum over machines helps nobody.

    Args:
        prepares: is anything left to make before trials can run?
    """
    asked: dict[str, TrialResources | GeneratorResources] = {"trial": resources.trial}
    if prepares:
        asked["generator"] = resources.generator
    for name, want in asked.items():
        if not room(want, machines):
            largest = ", ".join(
                f"{max((machine.get(kind, 0.0) for machine in machines), default=0):g} {kind}"
                for kind in ("CPU", "GPU")
            )
            advice = f"lower resources.{name}.cpu or .gpu"
            if want.gpu and not any(machine.get("GPU") for machine in machines):
                advice = f"without a GPU, give --set resources.{name}.gpu=0"
            return (
                f"a {name} asks for {want.cpu:g} CPU and {want.gpu:g} GPU, and no machine has "
                f"both; the largest have {largest}: {advice}"
            )
    return None


def room(want: TrialResources | GeneratorResources, machines: Sequence[Machine]) -> int:
    """How many of them run at a time."""
    return sum(_room(want, machine) for machine in machines)


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


def _room(want: TrialResources | GeneratorResources, machine: Machine) -> int:
    asked = {"CPU": want.cpu, "GPU": want.gpu}
    limits = [int(machine.get(kind, 0) // each) for kind, each in asked.items() if each]
    return min(limits, default=int(machine.get("CPU", 1)))

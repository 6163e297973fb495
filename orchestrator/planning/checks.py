"""Whether the work of a plan fits the machines and the disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from orchestrator.formatting import format_bytes
from orchestrator.planning.plan import Plan
from orchestrator.planning.resources import Machine, resource_shortage, this_machine
from orchestrator.store import ArtifactStore


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

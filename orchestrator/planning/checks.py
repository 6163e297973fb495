"""Whether the work of a plan fits the machines and the disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence

from air_core.methods import EMBEDDED
from orchestrator.formatting import format_bytes, plural
from orchestrator.keys import RowSpec
from orchestrator.planning.plan import Plan
from orchestrator.planning.requirements import Requirement
from orchestrator.planning.resources import Machine, resource_shortage, this_machine
from orchestrator.spec.resources import gpu_lines
from orchestrator.store import ArtifactStore


def unschedulable_reason(
    plan: Plan, store: ArtifactStore, machines: Sequence[Machine] | None = None
) -> str | None:
    """Explain why work of a plan could never be scheduled; None if all of it can.

    Args:
        machines: the machines of the cluster; None: this machine. If RAY_ADDRESS is set and the
            machines are not given, the result is None, since the cluster is not known yet.
    """
    machines = _known_machines() if machines is None else machines
    prepares = any(not requirement.is_complete(store) for requirement in plan.requirements)
    if machines is None or not (plan.to_run or prepares):
        return None
    return resource_shortage(plan.sweep.resources, machines, prepares)


def _known_machines() -> Sequence[Machine] | None:
    """This machine, for a run without a cluster; None: RAY_ADDRESS names a cluster."""
    return None if os.environ.get("RAY_ADDRESS") else [this_machine()]


def unused_gpus_reason(
    plan: Plan, store: ArtifactStore, machines: Sequence[Machine] | None = None
) -> str | None:
    """Explain that real models would run on CPUs although the machines have GPUs; None otherwise.

    A process whose `gpu` the sweep file or an option sets, even to 0, needs no explanation.

    Args:
        machines: as for `unschedulable_reason`.
    """
    machines = _known_machines() if machines is None else machines
    gpus = int(sum(machine.get("GPU", 0.0) for machine in machines or ()))
    used = [("trial", str(cell.flat["backbone"])) for cell in plan.cells if plan.left[cell.id]]
    for requirement in plan.requirements if plan.to_run else ():
        if not requirement.is_complete(store):
            used += [("generator", name) for name in _drawing_models(requirement)]
    real = [
        (process, name)
        for process, name in used
        if not plan.sweep.sets_gpu(process)
        and name not in EMBEDDED.values()
        and not name.startswith("folder:")
    ]
    if not gpus or not real:
        return None
    unset, names = ([*dict.fromkeys(words)] for words in zip(*real, strict=True))
    return (
        f"the machines have {plural(gpus, 'GPU')}, but {' and '.join(names)} would run on CPUs, "
        f"because the sweep does not set the GPUs of a {' and a '.join(unset)}; write "
        f"`{gpu_lines(unset)}` into the sweep file, or `gpu: 0` there to compute on CPUs"
    )


def _drawing_models(requirement: Requirement) -> Iterator[str]:
    """Names of the models with which a generator makes an artifact."""
    for spec in requirement.rows or (requirement.spec,):
        if spec.maker.process == "generator" or isinstance(spec, RowSpec):
            refs = (getattr(spec, role, None) for role in ("model", "backbone"))
            yield from (ref.name for ref in refs if ref is not None)


def full_disk_message(store: ArtifactStore, problem: str) -> str:
    """Describe a full disk, and how to free some space.

    Args:
        problem: the error message, or the name of the file that could not be written.
    """
    disk = shutil.disk_usage(store.root)
    return (
        f"no space left on the disk of the store {store.root} ({problem}): "
        f"{format_bytes(disk.free)} of {format_bytes(disk.total)} are free after the removal of "
        f"unfinished files; `airsweep cache gc --store {store.root}` lists what no sweep needs; "
        "free some space, then run the same command again to resume"
    )

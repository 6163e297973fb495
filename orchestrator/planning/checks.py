"""Whether the work of a plan fits the machines and the disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence

from air_core.methods import EMBEDDED
from orchestrator.formatting import format_bytes, plural
from orchestrator.keys import RowSpec, StageSpec
from orchestrator.planning.plan import Plan
from orchestrator.planning.resources import (
    Machine,
    gpu_capability,
    resource_shortage,
    this_machine,
)
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
    is_local = machines is None
    machines = _known_machines() if machines is None else machines
    prepares = any(not requirement.is_complete(store) for requirement in plan.requirements)
    if machines is None or not (plan.to_run or prepares):
        return None
    resources = plan.sweep.resources
    # The GPUs of other machines are known once these are asked, see `cluster.node_checks`.
    uses_gpus = is_local and (resources.generator.gpu or resources.trial.gpu)
    return resource_shortage(resources, machines, prepares) or unfit_gpu(
        bf16_settings(plan, store), gpu_capability() if uses_gpus else None
    )


# Settings of the precision of the work of a stage.
PRECISIONS = {
    "features": "precision",
    "lora": "lora.precision",
    "images": "generation.precision",
    "evidence": "evidence.precision",
}
HAS_BF16 = 8.0  # computing capability from which on a GPU has instructions for bf16


def bf16_settings(plan: Plan, store: ArtifactStore) -> tuple[str, ...]:
    """Settings with which missing work on GPUs requires bf16."""
    found: dict[str, None] = {}
    for spec in _missing_specs(plan, store):
        parts = (spec, *vars(spec).values())
        is_bf16 = any(getattr(part, "precision", "") == "bf16" for part in parts)
        uses_gpu = plan.sweep.resources.process_resources(spec.process).gpu
        if spec.stage in PRECISIONS and is_bf16 and uses_gpu:
            found[PRECISIONS[spec.stage]] = None
    return tuple(found)


def _missing_specs(plan: Plan, store: ArtifactStore) -> Iterator[StageSpec]:
    """Specs of the artifacts that a run will make."""
    for requirement in plan.requirements if plan.to_run else ():
        if not requirement.is_complete(store):
            yield from requirement.rows or (requirement.spec,)


def unfit_gpu(bf16: Sequence[str], capability: float | None) -> str | None:
    """Explain that a GPU has no bf16, which settings require; None: it has, or is unknown."""
    if capability is None or capability >= HAS_BF16 or not bf16:
        return None
    return (
        f"GPUs of computing capability {capability:g} have no bf16, which needs "
        f"{HAS_BF16:g}: set {' and '.join(bf16)} to fp32"
    )


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
    used = {
        "trial": [str(cell.flat["backbone"]) for cell in plan.cells if plan.left[cell.id]],
        "generator": [
            ref.name
            for spec in _missing_specs(plan, store)
            if spec.maker.process == "generator" or isinstance(spec, RowSpec)
            for role in ("model", "backbone")
            if (ref := getattr(spec, role, None)) is not None
        ],
    }
    names = {
        process: [
            name
            for name in dict.fromkeys(each)
            if name not in EMBEDDED.values() and not name.startswith("folder:")
        ]
        for process, each in used.items()
        if not plan.sweep.sets_gpu(process)
    }
    unset = [process for process in names if names[process]]
    if not gpus or not unset:
        return None
    real = dict.fromkeys(name for process in unset for name in names[process])
    return (
        f"the machines have {plural(gpus, 'GPU')}, but {' and '.join(real)} would run on CPUs, "
        f"because the sweep does not set the GPUs of a {' and a '.join(unset)}; write "
        f"`{gpu_lines(unset)}` into the sweep file, or `gpu: 0` there to compute on CPUs"
    )


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

"""Whether the work of a plan fits the machines and the disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

from air_core.methods import EMBEDDED
from air_core.models.weights import generator_folder, parameter_count
from orchestrator.formatting import format_bytes, plural
from orchestrator.keys import RowSpec, StageSpec
from orchestrator.planning.plan import Plan
from orchestrator.planning.resources import (
    Gpu,
    Machine,
    gpu_share,
    host_share,
    resource_shortage,
    smallest_gpu,
    this_machine,
)
from orchestrator.spec.resources import gpu_lines
from orchestrator.stages import GeneratedImages
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
    gpu = smallest_gpu() if is_local and (resources.generator.gpu or resources.trial.gpu) else None
    return (
        resource_shortage(resources, machines, prepares)
        or unfit_gpu(gpu_needs(plan, store), gpu)
        or _too_large_model(plan, store, machines)
    )


class GpuNeeds(NamedTuple):
    """What missing work requires of each GPU that it may run on."""

    bf16: tuple[str, ...] = ()  # settings that require bf16
    share: float = 0.0  # GPUs of a generator
    model: str = ""  # the largest one that a generator loads
    size: int = 0  # bytes of its weights


# Settings of the precision of the work of a stage.
PRECISIONS = {
    "features": "precision",
    "lora": "lora.precision",
    "images": "generation.precision",
    "evidence": "evidence.precision",
}
HAS_BF16 = 8.0  # computing capability from which on a GPU has instructions for bf16
BYTES = {"fp32": 4, "bf16": 2}  # of a parameter


def gpu_needs(plan: Plan, store: ArtifactStore) -> GpuNeeds:
    resources = plan.sweep.resources
    bf16 = dict.fromkeys(
        PRECISIONS[spec.stage]
        for spec in _missing_specs(plan, store)
        if spec.stage in PRECISIONS and resources.process_resources(spec.process).gpu
        if any(getattr(part, "precision", "") == "bf16" for part in (spec, *vars(spec).values()))
    )
    share = resources.generator.gpu
    return GpuNeeds(tuple(bf16), share, *(_largest_model(plan, store) if share else ("", 0)))


def _missing_specs(plan: Plan, store: ArtifactStore) -> Iterator[StageSpec]:
    """Specs of the artifacts that a run will make."""
    for requirement in plan.requirements if plan.to_run else ():
        if not requirement.is_complete(store):
            yield from requirement.rows or (requirement.spec,)


def _largest_model(plan: Plan, store: ArtifactStore) -> tuple[str, int]:
    """The generator with the most bytes of weights that is left to run, as the start of a message,
    and its bytes, or 0. It is loaded in the precision of generation."""
    found = [("", 0)]
    for spec in _missing_specs(plan, store):
        if isinstance(spec, GeneratedImages):
            with suppress(ValueError):  # of a plugin
                precision, name = spec.settings.precision, spec.model.name
                size = BYTES[precision] * parameter_count(generator_folder(name))
                found.append((f"{name} has {format_bytes(size)} of weights in {precision}", size))
    return max(found, key=lambda model: model[1])


def unfit_gpu(needs: GpuNeeds, gpu: Gpu | None) -> str | None:
    """Explain what a GPU lacks; None: it suffices, or is unknown."""
    if gpu is None:
        return None
    if needs.bf16 and gpu.capability < HAS_BF16:
        return (
            f"GPUs of computing capability {gpu.capability:g} have no bf16, which needs "
            f"{HAS_BF16:g}: set {' and '.join(needs.bf16)} to fp32"
        )
    if not needs.size or needs.size <= (room := gpu_share(needs.share, gpu.memory)):
        return None
    fits = needs.size <= gpu.memory
    return (
        f"{needs.model}, but a generator with {needs.share:g} GPU has {format_bytes(room)} of a "
        f"GPU with {format_bytes(gpu.memory)}: "
        f"{'raise resources.generator.gpu' if fits else 'use a larger GPU'}, or use a smaller model"
    )


def _too_large_model(plan: Plan, store: ArtifactStore, machines: Sequence[Machine]) -> str | None:
    """Explain that the weights of a generator on CPUs do not fit the memory of an actor; None: they
    do."""
    want = plan.sweep.resources.generator
    model, size = _largest_model(plan, store)
    room = host_share(want, machines, want.actors)
    if want.gpu or room is None or size <= room:
        return None
    memory = min(machine["memory"] for machine in machines if "memory" in machine)
    count = int(memory // size)
    remedy = f"set resources.generator.actors to {count}" if count else "use a larger machine"
    return (
        f"{model}, but a generator without a GPU has {format_bytes(room)} of a machine with "
        f"{format_bytes(memory)}: {remedy}, or use a smaller model"
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

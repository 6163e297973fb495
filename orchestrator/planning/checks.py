"""Whether the work of a plan fits the machines and the disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import Any

from air_core.methods import EMBEDDED
from air_core.models.weights import generator_folder, parameter_count
from air_core.specs import EvidenceSpec, FeaturesSpec, GeneratedImages, LoraSpec, StageSpec
from orchestrator.formatting import format_bytes, plural
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
from orchestrator.spec.sweep import gpu_lines
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
    if machines is None and (machines := _known_machines()) is None:
        return None
    prepares = any(not requirement.is_complete(store) for requirement in plan.requirements)
    if not (plan.to_run or prepares):
        return None
    resources = plan.sweep.resources
    # The GPUs of other machines are known once these are asked, see `cluster.node_checks`.
    gpu = smallest_gpu() if is_local and (resources.generator.gpu or resources.trial.gpu) else None
    return (
        resource_shortage(resources, machines, prepares)
        or (unfit_gpu(*gpu_requirements(plan, store), gpu) if gpu else None)
        or _too_large_model(plan, store, machines)
    )


# The largest model that generators run on GPUs: its weights in words, GPUs of an actor, bytes.
Model = tuple[str, float, int]


def gpu_requirements(plan: Plan, store: ArtifactStore) -> tuple[tuple[str, ...], Model | None]:
    """What the missing work requires of GPUs: settings with bf16, and the largest model."""
    resources = plan.sweep.resources
    specs = [
        part
        for requirement in (plan.requirements if plan.to_run else ())
        if not requirement.is_complete(store)
        for part in requirement.rows or (requirement.spec,)
        if resources.process_resources(requirement.stage).gpu
    ]
    bf16 = [
        setting
        for kind, setting, precision in PRECISIONS
        for spec in specs
        if isinstance(spec, kind) and precision(spec) == "bf16"
    ]
    found = largest_model(plan, store) if resources.generator.gpu else None
    model = (found[0], resources.generator.gpu, found[1]) if found else None
    return tuple(dict.fromkeys(bf16)), model


# Settings of the precision of the work of a stage.
PRECISIONS: tuple[tuple[type[StageSpec], str, Callable[[Any], str]], ...] = (
    (FeaturesSpec, "precision", lambda spec: spec.precision),
    (LoraSpec, "lora.precision", lambda spec: spec.training.precision),
    (GeneratedImages, "generation.precision", lambda spec: spec.settings.precision),
    (EvidenceSpec, "evidence.precision", lambda spec: spec.scoring.precision),
)
HAS_BF16 = 8.0  # computing capability from which on a GPU has instructions for bf16


def unfit_gpu(bf16: Sequence[str], model: Model | None, gpu: Gpu) -> str | None:
    """Explain that a GPU lacks what `gpu_requirements` names; None: it suffices."""
    if bf16 and gpu.capability < HAS_BF16:
        return (
            f"GPUs of computing capability {gpu.capability:g} have no bf16, which needs "
            f"{HAS_BF16:g}: set {' and '.join(bf16)} to fp32"
        )
    return too_small_gpu(*model, gpu.memory) if model else None


def _too_large_model(plan: Plan, store: ArtifactStore, machines: Sequence[Machine]) -> str | None:
    """Explain that the weights of a generator on CPUs do not fit the memory of an actor; None: they
    do."""
    want = plan.sweep.resources.generator
    found = largest_model(plan, store)
    if found is None or want.gpu:
        return None
    weights, size = found
    room = host_share(want, machines, want.actors)
    if room is None or size <= room:
        return None
    memory = min(machine["memory"] for machine in machines if "memory" in machine)
    count = int(memory // size)
    remedy = f"set resources.generator.actors to {count}" if count else "use a larger machine"
    return (
        f"{weights}, but a generator without a GPU has {format_bytes(room)} of a machine with "
        f"{format_bytes(memory)}: {remedy}, or use a smaller model"
    )


def too_small_gpu(weights: str, gpu: float, size: int, total: int) -> str | None:
    """Explain that weights of `size` bytes do not fit a share of a GPU; None: they do.

    Args:
        weights: what the model has, as the start of the message.
        total: bytes of memory of the GPU.
    """
    room = gpu_share(gpu, total)
    if size <= room:
        return None
    remedy = "raise resources.generator.gpu" if size <= total else "use a larger GPU"
    return (
        f"{weights}, but a generator with {gpu:g} GPU has {format_bytes(room)} of a GPU with "
        f"{format_bytes(total)}: {remedy}, or use a smaller model"
    )


BYTES = {"fp32": 4, "bf16": 2}  # of a parameter


def largest_model(plan: Plan, store: ArtifactStore) -> tuple[str, int] | None:
    """The generator with the most bytes of weights that is left to run, as the start of a message,
    and its bytes; None: none is left. It is loaded in the precision of generation."""
    found = []
    for requirement in plan.requirements if plan.to_run else ():
        for part in requirement.rows:
            if isinstance(part, GeneratedImages) and not requirement.is_complete(store):
                with suppress(ValueError):  # of a plugin
                    count = parameter_count(generator_folder(part.model.name))
                    precision = part.settings.precision
                    found.append((BYTES[precision] * count, precision, part.model.name))
    if not found:
        return None
    size, precision, name = max(found)
    return f"{name} has {format_bytes(size)} of weights in {precision}", size


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
    models = {
        process: names
        for process, names in _real_models(plan, store).items()
        if not plan.sweep.sets_gpu(process)
    }
    if not gpus or not any(models.values()):
        return None
    unset = [process for process, names in models.items() if names]
    names = dict.fromkeys(name for process in unset for name in models[process])
    return (
        f"the machines have {plural(gpus, 'GPU')}, but {' and '.join(names)} would run on CPUs, "
        f"because the sweep does not set the GPUs of a {' and a '.join(unset)}; write "
        f"`{gpu_lines(unset)}` into the sweep file, or `gpu: 0` there to compute on CPUs"
    )


def _real_models(plan: Plan, store: ArtifactStore) -> dict[str, list[str]]:
    """The models, without embedded ones, that are left to run in each process."""
    used: dict[str, list[str]] = {
        "trial": [str(cell.flat["backbone"]) for cell in plan.cells if plan.left[cell.id]],
        "generator": [],
    }
    for requirement in plan.requirements if plan.to_run else ():
        spec = requirement.spec
        if (requirement.rows or spec.process == "generator") and not requirement.is_complete(store):
            for part in requirement.rows or (spec,):
                refs = (getattr(part, role, None) for role in ("model", "backbone"))
                used["generator"] += [ref.name for ref in refs if ref is not None]
    return {
        process: [
            name
            for name in dict.fromkeys(names)
            if name not in EMBEDDED.values() and not name.startswith("folder:")
        ]
        for process, names in used.items()
    }


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

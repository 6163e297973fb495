"""The part `resources` of a sweep file: what a run uses on the cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from orchestrator.keys import Process
from orchestrator.spec.schema import NULL, Schema, setting

# A process has a part of one GPU, or whole GPUs.
PARTS: Schema = {"type": "number", "minimum": 0, "maximum": 1}
GPUS: Schema = {"anyOf": [PARTS, {"type": "integer", "minimum": 2}]}
# Amounts of Ray's custom resources, by name.
CUSTOM: Schema = {
    "type": "object",
    "propertyNames": {
        "title": "the name is empty or one of Ray's own; set `cpu` and `gpu` outside `custom`",
        "not": {"enum": ["", "CPU", "GPU", "cpu", "gpu", "memory", "object_store_memory"]},
    },
    "additionalProperties": {"type": "number", "exclusiveMinimum": 0},
}


ENCODER_BATCH = 256
CUSTOM_HELP = "amounts of custom resources, named as in `ray start --resources`"


@dataclass(frozen=True, kw_only=True)
class TrialResources:
    """Resources of one trial."""

    cpu: float = setting(1.0, "CPU cores of one trial", minimum=0)
    gpu: float = setting(0.0, "GPUs of one trial, or a share of one GPU", GPUS)
    memory: int | None = setting(  # bytes
        None,
        "GiB of memory of the machine for the seeds of a point; 0: none is reserved; null: "
        "computed from pool and classes, none for small ones",
        {"anyOf": [{"type": "number", "minimum": 0}, NULL]},
        lambda gib: gib and int(gib * 2**30),
    )
    custom: dict[str, float] = setting(dict, CUSTOM_HELP, CUSTOM)


@dataclass(frozen=True, kw_only=True)
class GeneratorResources:
    """Resources of a process that trains a LoRA or generates images, and their number."""

    cpu: float = setting(
        1.0, "CPU cores of a process that trains a LoRA or generates images", minimum=0
    )
    gpu: float = setting(0.0, "GPUs of that process, or a share of one GPU", GPUS)
    custom: dict[str, float] = setting(dict, CUSTOM_HELP, CUSTOM)
    actors: int | None = setting(None, "such processes at most; null: as many as fit", minimum=1)
    reserve: int | None = setting(
        None,
        "those that generate images of later cells while trials run; null: one in eight",
        minimum=0,
    )


ProcessResources = TrialResources | GeneratorResources  # of one worker process


@dataclass(frozen=True, kw_only=True)
class EncoderResources:
    """Resources of an encoder: it computes CLIP features and the initial pseudo-labels."""

    cpu: float | None = setting(
        None,
        "CPU cores of one encoder, and threads that open its images; null: as for a trial",
        minimum=0,
    )
    gpu: float | None = setting(
        None, "GPUs, or a share of one GPU; null: as for a trial", {"anyOf": [*GPUS["anyOf"], NULL]}
    )
    batch: int = setting(ENCODER_BATCH, "images per CLIP batch", minimum=1)


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Resources of a run on the cluster. They are not part of any artifact key."""

    trial: TrialResources = setting(TrialResources(), TrialResources.__doc__ or "")
    generator: GeneratorResources = setting(GeneratorResources(), GeneratorResources.__doc__ or "")
    encoder: EncoderResources = setting(EncoderResources(), EncoderResources.__doc__ or "")
    wait: float | None = setting(
        None,
        "seconds to wait for an autoscaler to add nodes; null: do not wait",
        exclusiveMinimum=0,
    )

    @property
    def encoder_resources(self) -> TrialResources:
        """Resources of an encoder."""
        cpu, gpu = self.encoder.cpu, self.encoder.gpu
        return replace(
            self.trial,
            cpu=self.trial.cpu if cpu is None else cpu,
            gpu=self.trial.gpu if gpu is None else gpu,
            memory=None,
        )

    def process_resources(self, process: Process) -> ProcessResources:
        """Resources of a process that works on a stage."""
        if process == "generator":
            return self.generator
        return self.trial if process == "trial" else self.encoder_resources

    def pool_of(self, process: Process) -> Process:
        """The kind of processes that do the work of an encoder or a generator. If both have equal
        resources, as without GPUs, generators do both, since a process takes seconds to start."""
        encoder, one = self.encoder_resources, self.generator
        equal = (encoder.cpu, encoder.gpu, encoder.custom) == (one.cpu, one.gpu, one.custom)
        return "generator" if equal and one.actors is None else process


# GPUs of a process that runs a real model: in the file of `airsweep init` and in messages.
USUAL_GPUS = {"trial": 0.25, "generator": 1}


def gpu_lines(processes: Sequence[str] = tuple(USUAL_GPUS)) -> str:
    """The lines of a sweep file that give GPUs to processes.

    >>> gpu_lines()
    'resources: {trial: {gpu: 0.25}, generator: {gpu: 1}}'
    """
    parts = (f"{process}: {{gpu: {USUAL_GPUS[process]:g}}}" for process in processes)
    return f"resources: {{{', '.join(parts)}}}"

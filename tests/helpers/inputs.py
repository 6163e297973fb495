"""Makes what trials read, in this process."""

from __future__ import annotations

from functools import partial

from orchestrator.planning import requirements_of
from orchestrator.stages import TrialSpec, stage_module
from orchestrator.stages.context import WorkerContext


def build_inputs(trial: TrialSpec, worker: WorkerContext) -> None:
    """Make what a trial reads, in this process."""
    requirements = requirements_of([trial])
    for requirement in sorted(
        requirements, key=lambda each: getattr(each.spec, "level", "") == "tokens"
    ):
        spec, make = requirement.spec, stage_module(requirement.spec)
        if not requirement.rows:
            make.build(spec, worker)
            continue
        generator = partial(spec.images.open, worker)
        for class_index, block in requirement.missing(worker.store):
            make.build(spec, class_index, block, worker, generator)

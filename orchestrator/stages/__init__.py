"""Work inside one worker process: artifacts, blocks of images, trials.

A module named after a stage makes its artifacts. `build(spec, worker, report)` makes one; of a row,
`open_model(spec, worker)` loads what makes its shards, `build(spec, index, block, worker,
model)` makes one shard, and `stored_counts(spec, index, block, store)` counts its content. The
modules import torch, so nothing is imported here.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from air_core.specs import StageSpec


def stage_module(spec: StageSpec) -> ModuleType:
    """The module that makes the artifact of a spec."""
    return import_module(f"orchestrator.stages.{spec.maker.stage}")


def ignore(done: int, total: int) -> None:
    """The default of `report`: discard the progress."""

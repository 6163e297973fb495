"""Stages, and the work of one worker process.

A module named after a stage has its spec and makes its artifacts. `build(spec, worker, report)`
makes one; of a row, `open_model(spec, worker)` loads what makes its shards, and
`build(spec, index, block, worker, model)` makes one shard. Makers import torch inside functions, so
a plan imports the specs alone.
"""

from __future__ import annotations

import sys
from types import ModuleType

from orchestrator.keys import StageSpec
from orchestrator.stages.encoded import EncodedSpec
from orchestrator.stages.evidence import EvidenceSpec
from orchestrator.stages.features import FeaturesSpec
from orchestrator.stages.images import FolderImages, GeneratedImages, ImagesSpec
from orchestrator.stages.labels import LabelsSpec
from orchestrator.stages.lora import LoraSpec
from orchestrator.stages.synthetic import SyntheticFeaturesSpec
from orchestrator.stages.trial import TrialSpec, trial_of

# In the order in which a trial without images of its own needs them.
STAGES: dict[str, type[StageSpec]] = {
    spec.stage: spec
    for spec in (
        EncodedSpec,
        FeaturesSpec,
        LabelsSpec,
        LoraSpec,
        ImagesSpec,
        SyntheticFeaturesSpec,
        EvidenceSpec,
        TrialSpec,
    )
}


def stage_module(spec: StageSpec) -> ModuleType:
    """The module that makes the artifact of a spec."""
    return sys.modules[type(spec).__module__]

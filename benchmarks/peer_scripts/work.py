"""Shared parts of the scripts in this folder: list trials, prepare inputs, run one trial.

The method comes from `air_core`, and the stages that build inputs come from `orchestrator`, so all
scripts do the same work as airsweep.
"""

from __future__ import annotations

import os
import time
from functools import cache
from pathlib import Path

from joblib import Parallel, delayed

from orchestrator.planning import resolver_of

WORKERS = 2


@cache
def trials(spec: str, sets: tuple[str, ...]) -> dict[str, object]:
    """The trials of the grid by name, such as `air/1`."""
    from orchestrator.planning.requests import location_for, read_request
    from orchestrator.spec import cells_of

    request = read_request(spec, sets)
    resolver = resolver_of(location_for(request, Path(os.environ["PEER_FOLDER"]) / "inputs", None))
    return {
        f"{cell.method}/{seeds['seed']}": resolver.trial({**cell.flat, **seeds})
        for cell in cells_of(request.spec)
        for seeds in request.spec.seeds.assignments()
    }


def store():
    from orchestrator.store import ArtifactStore

    return ArtifactStore(Path(os.environ["PEER_FOLDER"]) / "inputs")


def prepare(specs: list) -> None:
    """Build the features, labels, LoRA and images that the trials read, each once."""
    from orchestrator.planning import requirements_of
    from orchestrator.stages import stage_module
    from orchestrator.stages.context import WorkerContext

    worker = WorkerContext(store())
    for requirement in requirements_of(specs):
        if not requirement.rows:
            stage_module(requirement.spec).build(requirement.spec, worker)
            continue
        left = requirement.missing(worker.store)
        parts = [left[start::WORKERS] for start in range(WORKERS)]
        Parallel(n_jobs=WORKERS)(delayed(draw)(requirement.spec, part) for part in parts if part)


def draw(row, blocks) -> None:
    import torch

    from orchestrator.stages.context import WorkerContext
    from orchestrator.stages.synthetic import build as build_image_block

    torch.set_num_threads(1)
    worker = WorkerContext(store())
    generator = cache(lambda: row.images.open(worker))
    for class_index, block in blocks:
        build_image_block(row, class_index, block, worker, generator)


def one_trial(name: str, spec) -> dict[str, float]:
    """Run a trial and add a line to `log.txt` when it is done."""
    import torch

    from air_core.datasets import get_dataset
    from air_core.method import TrialData, learn
    from orchestrator.stages.context import WorkerContext
    from orchestrator.stages.features import read_target
    from orchestrator.stages.synthetic import read_synthetic

    torch.set_num_threads(1)
    target = read_target(spec.features, spec.split, store())
    split, dataset = target.split, get_dataset(spec.dataset.name)
    row = spec.synthetic_features
    data = TrialData(
        backbone=WorkerContext(store()).backbone(spec.backbone, spec.precision),
        classnames=dataset.classnames,
        template=dataset.template,
        pool=target.batch(split.pool),
        labelled=None,
        unseen=None,
        validation=target.labelled(split.validation) if len(split.validation) else None,
        test=target.labelled(split.test),
        synthetic=read_synthetic(row, spec.images_per_class, store()) if row else None,
    )
    found = learn(spec, data)
    with open(Path(os.environ["PEER_FOLDER"]) / "log.txt", "a") as log:
        log.write(f"{name} {time.time():.2f}\n")
    return {"test/accuracy": found.test.accuracy, **found.objectives}

"""Trials side by side: prompts that can share a pass of the text tower are trained together.

The time of a training step of a text prompt depends on the number of calls more than on the
arithmetic, above all on a GPU, so all seeds of a point together cost little more than one. Each
trial keeps its own data, random numbers, record and failure.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

from air_core.specs import TrialSpec
from air_core.specs.normal import normalised
from orchestrator.keys import artifact_key
from orchestrator.spec.sweep import ENCODER_BATCH
from orchestrator.stages.trial import (
    WHOLE_TRIAL,
    Segments,
    TrialRun,
    is_finished,
    open_trial,
    run_trial,
)
from orchestrator.store import ArtifactStore, TrialRecord, read_trial
from orchestrator.store.checkpoints import training_spec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from air_core.method import Trial

# Class texts in one pass. Each keeps 1 to 2 MB for the gradient with ViT-B/32, and beyond these
# numbers the time depends on the arithmetic, so that more bring nothing.
MAX_TEXTS = {"cpu": 256, "cuda": 1024}


def run_trials(
    specs: Sequence[TrialSpec],
    store: ArtifactStore,
    device: str = "cpu",
    report: Callable[[int, float], None] = lambda index, share: None,
    batch: int = ENCODER_BATCH,
    segments: Segments = WHOLE_TRIAL,
) -> list[TrialRecord | Exception | None]:
    """Run the trials that have no record yet; returns the record or the exception of each.

    A record is published as soon as its trial is finished.

    Args:
        report: called with the index of a trial in `specs` and the share of its training that is
            done.
        batch: images in one pass of a tower; fewer images also mean fewer trials side by side.
        segments: where trials stop, if they do. The result of a stopped trial is None.
    """
    specs = [
        normalised(spec) if segments.stop_after is None else training_spec(spec) for spec in specs
    ]
    missing = [
        spec for spec in dict.fromkeys(specs) if not is_finished(spec, store, segments.stop_after)
    ]
    reports = {spec: partial(report, specs.index(spec)) for spec in missing}
    failed: dict[TrialSpec, Exception] = {}
    # All processes take locks in the same order, or two could wait for each other.
    missing.sort(key=lambda spec: artifact_key(spec).digest)
    for group in side_by_side(missing, device, batch / ENCODER_BATCH):
        problems = _run_group(group, store, device, reports, batch, segments)
        counts = Counter(map(id, problems.values()))
        # An exception that several trials share is no trial's own, such as a lack of memory.
        shared = [spec for spec, problem in problems.items() if counts[id(problem)] > 1]
        failed |= {spec: problem for spec, problem in problems.items() if spec not in shared}
        del problems  # their tracebacks hold the tensors
        for spec in shared:
            failed |= _run_group([spec], store, device, reports, batch, segments)
    if segments.stop_after is not None:
        return [failed.get(spec) for spec in specs]
    return [failed.get(spec) or read_trial(spec, store) for spec in specs]


def side_by_side(
    specs: Sequence[TrialSpec], device: str, share: float = 1.0
) -> list[list[TrialSpec]]:
    """Groups of trials whose prompts stand before the same class names in the same text tower.

    Other trials are alone: a visual prompt needs a pass with its own images, and a transfer trial
    trains nothing itself.

    Args:
        share: of the usual number of class texts in a group, for a device short of memory.
    """
    groups: dict[object, list[TrialSpec]] = {}
    for spec in specs:
        alone = spec.modality == "visual" or spec.iterations == 0 or spec.test_dataset is not None
        shared = (spec.dataset, spec.backbone, spec.precision, spec.prompt.length)
        groups.setdefault(spec if alone else shared, []).append(spec)
    parts = []
    for group in groups.values():
        texts = MAX_TEXTS["cpu" if device == "cpu" else "cuda"]
        size = max(1, int(texts * share) // max(1, len(group[0].classnames)))
        parts += [group[start : start + size] for start in range(0, len(group), size)]
    return parts


def _run_group(
    group: Sequence[TrialSpec],
    store: ArtifactStore,
    device: str,
    reports: Mapping[TrialSpec, Callable[[float], None]],
    batch: int,
    segments: Segments,
) -> dict[TrialSpec, Exception]:
    """Run and record trials side by side; the exception of each trial that fails."""
    # torch is needed here only: a point that has its records must not cost its import.
    from air_core.side_by_side import learn_side_by_side

    problems: dict[TrialSpec, Exception] = {}
    runs: list[tuple[TrialSpec, ExitStack, TrialRun]] = []
    trials: list[Trial] = []
    with ExitStack() as group_stack:
        for spec in group:
            stack = group_stack.enter_context(ExitStack())
            try:
                if spec.test_dataset is not None:
                    run_trial(spec, store, device, reports[spec])
                    continue
                opened = stack.enter_context(
                    open_trial(spec, store, device, reports[spec], len(group), batch, segments)
                )
            except Exception as problem:
                problems[spec] = problem
            else:
                if opened is not None:
                    runs.append((spec, stack, opened[0]))
                    trials.append(opened[1])
        for index, outcome in learn_side_by_side(trials):
            spec, stack, run = runs[index]
            try:
                with stack:  # publishes the record and releases the lock
                    run.end(outcome)
            except Exception as problem:
                problems[spec] = problem
    return problems

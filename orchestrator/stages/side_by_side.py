"""Trials side by side: prompts that can share a pass of the text tower are trained together.

The time of a training step of a text prompt depends on the number of calls more than on the
arithmetic, above all on a GPU, so all seeds of a point together cost little more than one. Each
trial keeps its own data, random numbers, record and failure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

from air_core.specs.conditions import has_context
from orchestrator.keys import artifact_key
from orchestrator.spec.resources import ENCODER_BATCH
from orchestrator.stages.context import WorkerContext
from orchestrator.store import TrialRecord, read_trial
from orchestrator.store.checkpoints import Curves

if TYPE_CHECKING:
    from air_core.method import Trial
    from orchestrator.stages.trial import TrialSpec
    from orchestrator.stages.trial_run import TrialRun

# Class texts in one pass. Each keeps 1 to 2 MB for the gradient with ViT-B/32, and beyond these
# numbers the time depends on the arithmetic, so that more bring nothing.
MAX_TEXTS = {"cpu": 256, "cuda": 1024}


def side_by_side(
    specs: Sequence[TrialSpec], device: str, share: float = 1.0
) -> list[list[TrialSpec]]:
    """Groups of trials whose prompts stand before the same class names in the same text tower.

    Other trials are alone: other learners have no such pass to share, and a transfer trial trains
    nothing itself.

    Args:
        share: of the usual number of class texts in a group, for a device short of memory.
    """
    groups: dict[object, list[TrialSpec]] = {}
    for spec in specs:
        alone = not has_context(spec) or spec.test_dataset is not None
        shared = (spec.dataset, spec.backbone, spec.precision, spec.prompt.length)
        groups.setdefault(spec if alone else shared, []).append(spec)
    parts = []
    for group in groups.values():
        texts = MAX_TEXTS["cpu" if device == "cpu" else "cuda"]
        size = max(1, int(texts * share) // max(1, len(group[0].classnames)))
        parts += [group[start : start + size] for start in range(0, len(group), size)]
    return parts


def run_trials(
    specs: Sequence[TrialSpec],
    worker: WorkerContext,
    report: Callable[[int, int, int], None] = lambda index, done, total: None,
    report_curves: Callable[[int, Curves], None] = lambda index, curves: None,
) -> list[TrialRecord | Exception]:
    """Run the trials that have no record yet; returns the record or the exception of each.

    A record is published as soon as its trial is finished.

    Args:
        worker: a smaller batch also means fewer trials side by side.
        report: called with the index of a trial in `specs`, and its finished and all steps.
        report_curves: called after each round with the index of a trial and its curves so far.
    """
    store = worker.store
    missing = [spec for spec in dict.fromkeys(specs) if not store.has(spec)]
    reports = {
        spec: (partial(report, specs.index(spec)), partial(report_curves, specs.index(spec)))
        for spec in missing
    }
    failed: dict[TrialSpec, Exception] = {}
    # All processes take locks in the same order, or two could wait for each other.
    missing.sort(key=lambda spec: artifact_key(spec).digest)
    for group in side_by_side(missing, worker.device, worker.batch / ENCODER_BATCH):
        problems = _run_group(group, worker, reports)
        counts = Counter(map(id, problems.values()))
        # An exception that several trials share is no trial's own, such as a lack of memory.
        shared = [spec for spec, problem in problems.items() if counts[id(problem)] > 1]
        failed |= {spec: problem for spec, problem in problems.items() if spec not in shared}
        del problems  # their tracebacks hold the tensors
        for spec in shared:
            failed |= _run_group([spec], worker, reports)
    return [failed.get(spec) or read_trial(spec, store) for spec in specs]


def _run_group(
    group: Sequence[TrialSpec],
    worker: WorkerContext,
    reports: Mapping[TrialSpec, tuple[Callable[[int, int], None], Callable[[Curves], None]]],
) -> dict[TrialSpec, Exception]:
    """Run and record trials side by side; the exception of each trial that fails."""
    from air_core.side_by_side import learn_side_by_side
    from orchestrator.stages.trial_run import open_trial, run_trial

    problems: dict[TrialSpec, Exception] = {}
    runs: list[tuple[TrialSpec, ExitStack, TrialRun]] = []
    trials: list[Trial] = []
    with ExitStack() as group_stack:
        for spec in group:
            report, report_curves = reports[spec]
            stack = group_stack.enter_context(ExitStack())
            try:
                if spec.test_dataset is not None:
                    run_trial(spec, worker.store, worker.device, report)
                    continue
                opened = stack.enter_context(open_trial(spec, worker, report, len(group)))
            except Exception as problem:
                problems[spec] = problem
            else:
                if opened is not None:
                    opened[0].report_curves = report_curves
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

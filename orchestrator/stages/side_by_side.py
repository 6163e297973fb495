"""Trials side by side: prompts that can share a pass of the text tower are trained in one.

A training step of a text prompt is bound by the number of calls rather than by arithmetic, above
all on a GPU, so the seeds of a point together cost little more than one. Each trial keeps its own
data, random numbers, record and failure.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

from air_core.normal import normalised
from air_core.specs import TrialSpec
from orchestrator.keys import artifact_key
from orchestrator.spec.sweep import ENCODER_BATCH
from orchestrator.stages.trial import WHOLE, Segments, TrialRun, is_over, open_trial, run_trial
from orchestrator.store import ArtifactStore, TrialRecord, read_trial
from orchestrator.store.checkpoints import learned_by

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from air_core.method import Trial

# Class texts in one pass. What is kept of each for the gradient is 1 to 2 MB with ViT-B/32, and
# where so many are under way arithmetic decides.
AT_ONCE = {"cpu": 256, "cuda": 1024}


def run_trials(
    specs: Sequence[TrialSpec],
    store: ArtifactStore,
    device: str = "cpu",
    share_done: Callable[[int, float], None] = lambda place, share: None,
    batch: int = ENCODER_BATCH,
    segments: Segments = WHOLE,
) -> list[TrialRecord | Exception | None]:
    """The record of each trial, run first where it is missing; or what went wrong.

    A record is published as soon as its trial is over.

    Args:
        share_done: told of each trial, by its place in `specs`, how much of the training is done.
        batch: images at a time through a tower; where they are fewer, so are trials side by side.
        legs: where trials stop, if they do: None stands in place of a record then.
    """
    specs = [normalised(spec) if segments.until is None else learned_by(spec) for spec in specs]
    missing = [spec for spec in dict.fromkeys(specs) if not is_over(spec, store, segments.until)]
    told = {spec: partial(share_done, specs.index(spec)) for spec in missing}
    failed: dict[TrialSpec, Exception] = {}
    # Locks are taken in one order, or two processes could wait for each other.
    missing.sort(key=lambda spec: artifact_key(spec).digest)
    for group in side_by_side(missing, device, batch / ENCODER_BATCH):
        problems = _problems(group, store, device, told, batch, segments)
        times = Counter(map(id, problems.values()))
        # The same for several: nobody's in particular, such as too many for the memory.
        again = [spec for spec, problem in problems.items() if times[id(problem)] > 1]
        failed |= {spec: problem for spec, problem in problems.items() if spec not in again}
        del problems  # their tracebacks hold the tensors
        for spec in again:
            failed |= _problems([spec], store, device, told, batch, segments)
    if segments.until is not None:
        return [failed.get(spec) for spec in specs]
    return [failed.get(spec) or read_trial(spec, store) for spec in specs]


def side_by_side(
    specs: Sequence[TrialSpec], device: str, share: float = 1.0
) -> list[list[TrialSpec]]:
    """Groups of trials that send prompts before the same names through one text tower.

    Others are alone: a visual prompt goes with its images, and a transfer trains nothing itself.

    Args:
        share: of the class texts that usually go together, for a device short of memory.
    """
    groups: dict[object, list[TrialSpec]] = {}
    for spec in specs:
        alone = spec.modality == "visual" or spec.iterations == 0 or spec.test_dataset is not None
        shared = (spec.dataset, spec.backbone, spec.precision, spec.prompt.length)
        groups.setdefault(spec if alone else shared, []).append(spec)
    found = []
    for group in groups.values():
        texts = AT_ONCE["cpu" if device == "cpu" else "cuda"]
        most = max(1, int(texts * share) // max(1, len(group[0].classnames)))
        found += [group[at : at + most] for at in range(0, len(group), most)]
    return found


def _problems(
    group: Sequence[TrialSpec],
    store: ArtifactStore,
    device: str,
    told: Mapping[TrialSpec, Callable[[float], None]],
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
                    run_trial(spec, store, device, told[spec])
                    continue
                opened = stack.enter_context(
                    open_trial(spec, store, device, told[spec], len(group), batch, segments)
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

"""Several trials side by side: each round trains all their prompts in one computation.

A training step of a text prompt is bound by the number of calls, so prompts that share one pass of
the text tower cost little more than one. The steps of a trial are those of `air_core.method`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from air_core.method import Trial
from air_core.training import Training, fit
from air_core.types import TrialResult


def learn_side_by_side(trials: Sequence[Trial]) -> Iterator[tuple[int, TrialResult | Exception]]:
    """Learn trials, which may differ in any setting, in the number of rounds and in steps.

    Yields:
        The index of a trial and its result, or the exception that ended it, as soon as it is
        finished. A trial that fails ends alone.
    """
    losses: dict[int, float | Exception | None] = dict.fromkeys(range(len(trials)))
    while losses:
        trainings: dict[int, Training] = {}
        for index, loss in losses.items():
            step: Training | TrialResult | Exception
            try:
                step = _next_step(trials[index], loss)
            except Exception as problem:
                step = problem
            if isinstance(step, Training):
                trainings[index] = step
            else:
                yield index, step
        losses = dict(zip(trainings, _fit(list(trainings.values())), strict=True))


def _next_step(trial: Trial, loss: float | Exception | None) -> Training | TrialResult:
    """Finish the round that has this loss; then prepare the next round or, after the last, test."""
    if loss is not None:
        trial.finish_round(trial.rounds_done, loss)
    t = trial.rounds_done
    if t == trial.spec.iterations:
        return trial.evaluate()
    trial.update_auxiliary(t)
    trial.update_labels(t)
    return trial.training(t)


def _fit(trainings: Sequence[Training]) -> Sequence[float | Exception]:
    try:
        return fit(trainings) if trainings else []
    except Exception as problem:  # no fault of a single trial, such as too little memory
        return [problem] * len(trainings)

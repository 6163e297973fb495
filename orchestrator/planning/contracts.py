"""Contracts of the components of a search, beside those of `air_core.contracts`."""

from __future__ import annotations

import optuna

from air_core.contracts import CONTRACTS, check_contract, need
from orchestrator.components import SAMPLERS
from orchestrator.spec import Dimension
from orchestrator.spec.sweep import Search

__all__ = ["check_contract"]

SPACE = (Dimension(key="fusion_weight", min=0.0, max=1.0),)


def _sampler(name: str) -> None:
    search = Search(sampler=name, points=8, space=SPACE)

    def suggested(seed: int) -> list[float]:
        study = optuna.create_study(direction="maximize")
        points = []
        for number in range(8):
            study.sampler = SAMPLERS.load(name)(search, seed + number)
            trial = study.ask()
            points.append(trial.suggest_float("fusion_weight", 0.0, 1.0))
            study.tell(trial, points[-1])
        return points

    need(suggested(1) == suggested(1), "an equal seed must give equal points")


CONTRACTS |= {SAMPLERS.key: _sampler}

"""Registries of a search: its samplers and its pruning rules. Imports no Optuna."""

from __future__ import annotations

from air_core.components import Registry

# (search, seed) -> optuna.samplers.BaseSampler, which suggests one point; `search` is an
# orchestrator.spec.sweep.Search.
SAMPLERS = Registry("search.sampler", "search, seed", group="", of_trials=False)
SAMPLERS.declare("tpe", "orchestrator.planning.search:tpe", "Optuna's TPE", modules=())
SAMPLERS.declare("random", "orchestrator.planning.search:at_random", "random values", modules=())
SAMPLERS.declare(
    "grid", "orchestrator.planning.search:at_random", "every combination of values", modules=()
)

# (pruning, values, earlier) -> numbers of the points of a round that continue after a rung.
# `values` has the objectives of the round by number, `earlier` those of earlier rounds.
PRUNING_RULES = Registry(
    "search.pruning.rule", "pruning, values, earlier", group="", of_trials=False
)
PRUNING_RULES.declare(
    "halving", "orchestrator.planning.pruning:halving", "the best of a round", modules=()
)
PRUNING_RULES.declare(
    "median",
    "orchestrator.planning.pruning:not_below_median",
    "those at or above the median of all points so far",
    modules=(),
)

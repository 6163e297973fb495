"""The registry of samplers of a search. Imports no Optuna."""

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

"""The registry of samplers of a search. Imports no Optuna."""

from __future__ import annotations

from air_core.settings.components import Registry, decorated

# (search, seed) -> optuna.samplers.BaseSampler, which suggests one point; `search` is an
# orchestrator.spec.sweep.Search.
SAMPLERS = Registry(
    "search.sampler",
    "search, seed",
    decorated("SAMPLERS", "orchestrator.planning.search"),
    group="",
    of_trials=False,
)

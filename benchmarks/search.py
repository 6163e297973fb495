"""Quality of samplers: test accuracy of the setting that a short search selects.

The benchmark replays a full grid of AiR on the digits, so searches need no training. Every sampler
searches the grid in the rounds of real sweeps (`planning.search.CellSearch`): `--points` points in
rounds of four, the default first, with `--seeds` seeds. The objective is the mean over three
splits, and the search selects the point with the best objective. The test regret is the difference
between the best test accuracy in the grid and that of the selected point, in points of accuracy.
Baseline: random points.

    python benchmarks/search.py [--grid benchmarks/search_grid.json] [--seeds 50] [--points 12]

If the file of `--grid` does not exist, airsweep runs the grid first in the store `--store` and the
benchmark writes the file: three LoRA and 288 trials, half an hour on two slow cores. The replay
takes minutes. It prints two tables: for the default objective, which reads no labels, and for
validation accuracy. The last line is JSON: `ratio` is the mean regret of random points divided by
that of the best other sampler, for the default objective.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import optuna
from optuna.samplers import BaseSampler, GPSampler, TPESampler

from benchmarks.harness import airsweep, options, progress, report
from orchestrator import components
from orchestrator.planning import Resolver
from orchestrator.planning.plan import plan_sweep
from orchestrator.planning.search import STARTUP_POINTS, CellSearch
from orchestrator.planning.studies import Searches
from orchestrator.reporting._ranking import ranking
from orchestrator.spec import SweepSpec, cells_of, load_sweep
from orchestrator.spec.sweep import Search
from orchestrator.store import ArtifactStore, EventLog, read_trial

SWEEP = """version: 1
name: search_grid
fixed: {method: air_fpl, generator: tiny}
search:
  sampler: grid
  points: 96
  width: 96
  space:
    images_per_class: {values: [16, 64]}
    fusion_weight: {values: [0.1, 0.35, 0.65, 0.9]}
    auxiliary.kind: {values: [lda, prototype]}
    synthetic_weight: {values: [0.0, 0.3, 1.0]}
    train.learning_rate: {values: [0.05, 0.2]}
seeds: {vary: [seed, split_seed], values: [[1, 301], [2, 302], [3, 303]]}
"""
OBJECTIVES = ("mutual_information", "validation_accuracy")  # the default of a sweep file first
BASELINE, DEFAULT = "random", "tpe"

Make = Callable[[Search, int], BaseSampler]  # from a search and the seed of one point


SAMPLERS: dict[str, Make] = {
    "random": components.SAMPLERS.load("random"),
    "tpe": components.SAMPLERS.load("tpe"),
    # Other samplers of Optuna for mixed spaces that need no further package.
    "tpe, univariate": lambda search, seed: TPESampler(
        seed=seed, n_startup_trials=STARTUP_POINTS, multivariate=False
    ),
    "gp": lambda search, seed: GPSampler(seed=seed, n_startup_trials=STARTUP_POINTS),
}


# ---------------------------------------------------------------- the grid


def sweep_in(folder: Path) -> tuple[Path, SweepSpec]:
    file = folder / "search_grid.yaml"
    file.write_text(SWEEP)
    return file, load_sweep(file)


def run_grid(store: Path) -> list[dict[str, Any]]:
    """Run the missing points of the grid, and list all with objectives and test accuracy."""
    with tempfile.TemporaryDirectory() as folder:
        file, sweep = sweep_in(Path(folder))
        airsweep("run", file, "--store", store)
        event_log = EventLog(store / "sweeps" / "default" / sweep.name)
        resolver = Resolver(store / "digests.json", None)
        plan = plan_sweep(sweep, ArtifactStore(store), resolver, event_log)
    records: dict[int, list[Any]] = {}
    params = {slot.point: dict(slot.params) for slot in plan.slots}
    for slot in plan.slots:
        records.setdefault(slot.point, []).append(read_trial(slot.spec, ArtifactStore(store)))
    return [
        {
            "params": params[point],
            **{name: mean(r.objectives[name] for r in of) for name in OBJECTIVES},
            "test": mean(r.headline for r in of),
        }
        for point, of in sorted(records.items())
    ]


def mean(values: Iterable[float]) -> float:
    return round(float(np.mean(list(values))), 6)


# ---------------------------------------------------------------- the replay


def regrets(
    make: Make, grid: Sequence[dict[str, Any]], objective: str, points: int, seeds: int
) -> np.ndarray:
    """(S,) test regret of the point that each search selects, in points of accuracy."""
    with tempfile.TemporaryDirectory() as folder:
        _, sweep = sweep_in(Path(folder))
    (cell,) = cells_of(sweep)
    value = {_word(row["params"]): row[objective] for row in grid}
    test = {_word(row["params"]): row["test"] for row in grid}
    found = []
    for seed in range(seeds):
        search = replace(sweep.search, sampler="random", seed=seed, points=points, width=4)
        searching = CellSearch(cell, search, Searches(), sampler=make)
        seen: dict[str, float] = {}
        while suggested := searching.next_round():
            objectives = {point.number: value[_word(point.params)] for point in suggested}
            seen |= {_word(point.params): objectives[point.number] for point in suggested}
            searching.record_round(objectives)
        taken = max(seen, key=lambda word: seen[word])
        found.append(100 * (max(test.values()) - test[taken]))
    return np.array(found)


def _word(params: Mapping[str, Any]) -> str:
    return json.dumps(dict(params), sort_keys=True)


def interval(values: np.ndarray) -> list[float]:
    """Mean over searches and its 95 % bootstrap interval."""
    drawn = np.random.default_rng(0).choice(values, (4000, len(values))).mean(axis=1)
    return [float(values.mean()), *map(float, np.quantile(drawn, [0.025, 0.975]))]


def compare(
    grid: Sequence[dict[str, Any]], objective: str, points: int, seeds: int
) -> dict[str, Any]:
    """Regret of all samplers, and its difference to that of the default sampler."""
    test = np.array([row["test"] for row in grid])
    ranks = ranking([(np.array([row[objective] for row in grid]), test)])
    progress(f"{objective}: rank correlation with test accuracy {ranks}")
    each = {name: regrets(make, grid, objective, points, seeds) for name, make in SAMPLERS.items()}
    figures = {}
    for name, regret in each.items():
        figures[name] = {"regret": interval(regret), "less": interval(regret - each[DEFAULT])}
        mean, low, high = figures[name]["regret"]
        less, less_low, less_high = figures[name]["less"]
        progress(
            f"{name:<16} {mean:.2f} [{low:.2f}, {high:.2f}], "
            f"minus {DEFAULT} {less:+.2f} [{less_low:+.2f}, {less_high:+.2f}]"
        )
    return figures


def main() -> None:
    here = Path(__file__).with_name("search_grid.json")
    args = options(__doc__, grid=here, store=Path("runs"), seeds=50, points=12)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if not args.grid.exists():
        rows = run_grid(args.store)
        args.grid.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    grid = json.loads(args.grid.read_text())
    test = [100 * row["test"] for row in grid]
    progress(
        f"{len(grid)} points, test accuracy {min(test):.1f} to {max(test):.1f} %, median "
        f"{np.median(test):.1f} %; {args.seeds} searches of {args.points} points"
    )
    tables = {name: compare(grid, name, args.points, args.seeds) for name in OBJECTIVES}
    figures = tables[OBJECTIVES[0]]
    winner = min(set(figures) - {BASELINE}, key=lambda name: figures[name]["regret"][0])
    report(
        "search",
        figures[BASELINE]["regret"][0] / max(figures[winner]["regret"][0], 1e-9),
        BASELINE,
        winner=winner,
        points=args.points,
        seeds=args.seeds,
        regret=tables,
    )


if __name__ == "__main__":
    main()

"""Overhead of airsweep per trial.

A hundred trials without training (`zero_shot_aux` on ready images) run through all parts of
`airsweep run`: planner, driver, Ray Tune with reused actors, event log, records and MLflow. There
are two baselines. Ray Tune with its defaults starts one process per trial, which calls the same
`run_trial` (`--ray-trials` of them). An Optuna loop calls `run_trial` in this process, without a
cluster, an event log or a tracker. Each has a separate store with the same prepared inputs.

    python benchmarks/overhead.py [--trials 100] [--ray-trials 6]

It takes some minutes on two cores. The last line is JSON: `ratio` is the wall time per trial of Ray
Tune divided by that of airsweep, from the start of the first trial, so without the start of Ray.
The time of airsweep ends with its process: it has the records, the event log, the end of Ray, and
MLflow's export of all trials, which falls into the trials or after them. That of Ray Tune ends with
its last trial, since the end of Ray would be divided by few trials. `ours_overhead_s` is the time
per trial on a running actor beyond the trial's work: from its submission to its result, as measured
by the driver, minus the duration of the work.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.harness import airsweep, options, report
from orchestrator.planning import resolver_of

SWEEP = """
version: 1
name: overhead
fixed:
  method: zero_shot_aux
  generator: "folder:{folder}"
  images_per_class: 16
search:
  sampler: random
  points: {trials}
  width: {trials}
  space:
    fusion_weight: {{min: 0.1, max: 0.9}}
seeds: [1]
"""


def draw(folder: Path) -> None:
    """Write sixteen images of noise per class."""
    import numpy as np
    from PIL import Image

    from air_core.datasets.digits import CLASSNAMES

    rng = np.random.default_rng(0)
    for name in CLASSNAMES:
        (folder / name).mkdir(parents=True)
        for i in range(16):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:02}.png")


def ours(spec: Path, store: Path, trials: int) -> dict[str, float]:
    started = time.perf_counter()
    airsweep("run", spec, "--store", store)
    whole, exited = time.perf_counter() - started, time.time()
    folder = store / "sweeps" / "default" / "overhead"
    run = json.loads((folder / "outcome.json").read_text())["run"]
    assert run["states"] == {"done": trials}, run["states"]
    events = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    began = next(event["time"] for event in events if event["event"] == "trials_started")
    return {
        "whole_s": whole,
        "trial_s": (exited - began) / trials,
        "overhead_s": run["overheads"][0],
    }


def specs(spec: Path, store: Path, trials: int) -> list[Any]:
    from orchestrator.planning.requests import location_for, read_request
    from orchestrator.spec import cells_of

    request = read_request(spec)
    resolver = resolver_of(location_for(request, store, None))
    (cell,) = cells_of(request.spec)
    weights = [0.1 + 0.8 * i / trials for i in range(trials)]
    return [resolver.trial({**cell.flat, "fusion_weight": weight, "seed": 1}) for weight in weights]


def optuna_loop(chosen: list[Any], store: Path) -> float:
    """Seconds per trial of an Optuna loop in this process."""
    import optuna

    from orchestrator.stages.trial_run import run_trial
    from orchestrator.store import ArtifactStore

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    there = ArtifactStore(store)
    run_trial(chosen[0], there)  # warm-up: loads torch and CLIP
    started = time.perf_counter()

    def objective(trial: optuna.Trial) -> float:
        trial.suggest_float("fusion_weight", 0.1, 0.9)
        return run_trial(chosen[1 + trial.number], there).objectives["mutual_information"]

    optuna.create_study(direction="maximize").optimize(objective, n_trials=len(chosen) - 1)
    return (time.perf_counter() - started) / (len(chosen) - 1)


def ray_tune(chosen: list[Any], store: Path, folder: Path) -> float:
    """Seconds per trial of Ray Tune with its defaults, one process per trial."""
    from orchestrator.cluster import ray_session

    with ray_session() as machines:
        from ray import tune

        def trainable(config: dict[str, Any]) -> dict[str, float]:
            from orchestrator.stages.trial_run import run_trial
            from orchestrator.store import ArtifactStore

            started = time.time()
            record = run_trial(chosen[config["place"]], ArtifactStore(store))
            return {"objective": record.objectives["mutual_information"], "started": started}

        results = tune.Tuner(
            trainable,
            param_space={"place": tune.grid_search(list(range(len(chosen))))},
            run_config=tune.RunConfig(storage_path=str(folder / "tune"), verbose=0),
        ).fit()
        assert not results.errors, results.errors
        assert machines
        started = min(result.metrics["started"] for result in results)
        return (time.time() - started) / len(chosen)


def main() -> None:
    args = options(__doc__, trials=100, ray_trials=6)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw(folder / "images")
        spec = folder / "overhead.yaml"
        spec.write_text(SWEEP.format(folder=folder / "images", trials=args.trials))
        stores = {kind: folder / kind for kind in ("ours", "optuna", "ray")}
        for store in stores.values():
            airsweep("run", spec, "--prepare", "--store", store)
        found = ours(spec, stores["ours"], args.trials)
        loop = optuna_loop(specs(spec, stores["optuna"], args.trials), stores["optuna"])
        tuned = ray_tune(specs(spec, stores["ray"], args.ray_trials), stores["ray"], folder)
    report(
        "overhead",
        tuned / found["trial_s"],
        f"Ray Tune, one process per trial, {args.ray_trials} trials",
        trials=args.trials,
        baseline_trial_s=tuned,
        optuna_loop_trial_s=loop,
        **{f"ours_{name}": value for name, value in found.items()},
    )


if __name__ == "__main__":
    main()

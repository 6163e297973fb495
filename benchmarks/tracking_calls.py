"""HTTP requests to MLflow per trial, compared with Ray's MLflowLoggerCallback.

Both send the same trials to one `mlflow server` on loopback: the curves of ten iterations, single
metrics and two params. Baseline: a Ray Tune run with Ray's callback, whose trials report these
metrics; the callback sends each metric in a separate request and adds the metrics of Tune. *ours*
is the tracker of `airsweep run`, from the start to the end of a sweep. It also sends the resolved
spec and a picture of each trial, and a run for each setting over its seeds, which the callback does
not send. Requests are counted at `requests.Session.send` in this process.

    python benchmarks/tracking_calls.py [--trials 21] [--seeds 3] [--ray-trials 3] [--iterations 10]

It takes about a minute on two cores. The last line is JSON: `ratio` is the number of requests per
trial of the baseline divided by that of *ours*.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.harness import ROOT, options, progress, report
from orchestrator.tracking import make_tracker
from orchestrator.tracking.types import ChildRun, Numbers, SweepRun
from tests.helpers.servers import MlflowServer

CURVES = ("train/loss", "test/accuracy", "pseudo/accuracy", "pseudo/coverage")
SINGLES = ("pool/accuracy_fused", "test/accuracy_text", "test/accuracy_fused", "time/train_s")


def numbers(trial: int, iteration: int) -> dict[str, float]:
    return {name: (trial + 1) / (iteration + len(name)) for name in CURVES}


class Counter:
    """Counts the HTTP requests of this process."""

    def __init__(self) -> None:
        import requests

        self.count = 0
        send = requests.Session.send

        def counted(session: Any, request: Any, **options: Any) -> Any:
            self.count += 1
            return send(session, request, **options)

        requests.Session.send = counted  # type: ignore[method-assign]


def setting(number: int, seeds: int, iterations: int) -> ChildRun:
    """The run of one setting over its seeds."""
    curves = {name: [0.5] * iterations for name in CURVES}
    spread = dict.fromkeys(("test/accuracy_std", "test/accuracy_low", "test/accuracy_high"), 0.1)
    metrics = {**dict.fromkeys((*SINGLES, *CURVES), 0.5), **spread, "n": float(seeds)}
    return ChildRun(
        kind="point",
        id=f"cell/{number}",
        name=f"setting-{number}",
        content=f"{number}",
        tags={"air.method": "air"},
        params={"lr": "0.1", "images_per_class": str(number)},
        note=f"Mean over {seeds} of {seeds} runs.",
        numbers=lambda: Numbers(metrics=metrics, curves=curves, interval="95 %"),
        started=1_700_000_000_000,
        ended=1_700_000_009_000,
    )


def trial(number: int, seeds: int, iterations: int) -> ChildRun:
    rounds = [numbers(number, iteration) for iteration in range(iterations)]
    found = Numbers(
        metrics=dict.fromkeys(SINGLES, 0.5),
        curves={name: [values[name] for values in rounds] for name in CURVES},
    )
    return ChildRun(
        kind="trial",
        id=f"cell/{number // seeds}/seed={number % seeds}",
        name=f"trial-{number}",
        content=f"key-{number}",
        tags={"air.state": "done", "air.method": "air"},
        params={"lr": "0.1", "images_per_class": str(number)},
        numbers=lambda: found,
        started=1_700_000_000_000,
        ended=1_700_000_009_000,
        files=dict.fromkeys(("spec.json", "confusion_matrix.png"), lambda: b"{}" * 2000),
    )


def ours(url: str, folder: Path, trials: int, iterations: int, seeds: int) -> None:
    about = {"user": "ada", "commit": "0123abc", "source": "benchmark", "spec_hash": "5f3a9c"}
    sweep = SweepRun(sweep="calls", project="ours", note="", **about)
    tracker = make_tracker(url, store=folder, project="ours").open(sweep)
    for number in range(trials):
        tracker.send(trial(number, seeds, iterations))
        if number % seeds == seeds - 1:
            tracker.send(setting(number // seeds, seeds, iterations))
    tracker.finish("FINISHED", "", {})


def report_numbers(config: dict[str, Any]) -> None:
    from ray import tune

    for iteration in range(config["iterations"]):
        last = dict.fromkeys(SINGLES, 0.5) if iteration == config["iterations"] - 1 else {}
        tune.report(numbers(config["images_per_class"], iteration) | last)


def rays(url: str, folder: Path, trials: int, iterations: int) -> None:
    import logging

    import ray
    from ray import tune
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
    )
    callback = MLflowLoggerCallback(tracking_uri=url, experiment_name="rays")
    space = {"images_per_class": tune.grid_search(list(range(trials))), "iterations": iterations}
    tuner = tune.Tuner(
        report_numbers,
        param_space=space,
        run_config=tune.RunConfig(
            storage_path=str(folder / "tune"), verbose=0, callbacks=[callback]
        ),
    )
    assert not tuner.fit().errors
    ray.shutdown()


def main() -> None:
    args = options(__doc__, trials=21, seeds=3, ray_trials=3, iterations=10)
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folder = Path(scratch)
        server = MlflowServer(folder, folder / "log")
        stack.callback(server.stop)
        server.start()
        counter, requests = Counter(), {}
        tell_ours = partial(ours, seeds=args.seeds)
        ways = {"ours": (tell_ours, args.trials), "baseline": (rays, args.ray_trials)}
        for name, (tell, trials) in ways.items():
            counter.count = 0
            tell(server.url, folder, trials, args.iterations)
            requests[name] = counter.count / trials
            progress(name, requests[name])
    report(
        "tracking_calls",
        requests["baseline"] / requests["ours"],
        "Ray's MLflowLoggerCallback in a Tune run, one mlflow server on loopback",
        trials=args.trials,
        seeds=args.seeds,
        iterations=args.iterations,
        baseline_trials=args.ray_trials,
        **{f"{name}_requests_a_trial": count for name, count in requests.items()},
    )


if __name__ == "__main__":
    main()

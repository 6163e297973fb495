"""Does MLflow stay usable with 2,000 trials in one sweep?

Tells a fresh sqlite file of a small sweep and of a large one, through the tracker of `airsweep
run` (children with twelve metrics, four of them curves of ten iterations, and a run for each
setting over three seeds), starts the server of `airsweep ui` over it and measures: the request of
the run table (`runs/search`, 100 a page), in four orders; and, in headless chromium with an empty
cache, the time from an address to the rows of the table. Baseline: the same of an experiment that
holds the small sweep alone.

    python benchmarks/browsing.py [--trials 2000] [--few 21] [--store FOLDER]

Some minutes on two cores, most of them for writing; `--store` keeps what was written and uses it
again. Without chromium (Debian's package) the pages are left out. The last line is JSON; `ratio` is
the page of all settings, of the large sweep over the small one, or the same of the request.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from orchestrator.tracking import (
    DATABASE,
    Numbers,
    PointRun,
    SweepRun,
    TrialRun,
    link,
    make_tracker,
)
from tests.browser import CHROMIUM, MISSING, Browser
from tests.servers import MlflowServer

CURVES = ("train/loss", "test/accuracy", "pseudo/accuracy", "pseudo/coverage")
SINGLES = (
    *(
        "pool/accuracy_fused",
        "test/accuracy_text",
        "test/accuracy_auxiliary",
        "test/accuracy_fused",
    ),
    *("objective/mutual_information", "objective/validation_accuracy", "synthetic/images"),
    "time/train_s",
)
SEEDS = 3
SECOND = 1000  # ms
BEGAN = 1_700_000_000_000
ORDERS = {
    "newest": "attributes.start_time DESC",
    "best": "metrics.`test/accuracy` DESC",
    "by param": "params.`images_per_class` ASC",
    "by method": "tags.`air.method` ASC",
}


def tell(store: Path, project: str, trials: int) -> float:
    """Write a sweep; return the seconds."""
    rng = random.Random(0)
    began = time.monotonic()
    tracker = make_tracker(None, store=store, project=project)
    about = {"user": "ada", "commit": "0123abc", "source": "benchmark", "spec_hash": "5f3a9c"}
    tracker.start(SweepRun(sweep=project, project=project, note="How many?", **about))
    for number in range(trials):
        setting, seed = divmod(number, SEEDS)
        told = trial(setting, seed, rng)
        tracker.trial(told)
        if seed == SEEDS - 1 or number == trials - 1:
            tracker.point(point(told, setting, seed + 1))
    tracker.finish("FINISHED", "Enough.", {})
    return time.monotonic() - began


def trial(setting: int, seed: int, rng: random.Random) -> TrialRun:
    method = ("fpl", "cpl", "air", "cpl_real")[setting % 4]
    started = BEGAN + (setting * SEEDS + seed) * SECOND
    return TrialRun(
        slot=f"digits-ul-text-{method}/{setting}/seed={seed}",
        name=f"digits-ul-text-{method}-s{seed}-{rng.getrandbits(32):08x}",
        state="done",
        tags={
            "air.trial_key": f"{rng.getrandbits(160):040x}",
            "air.point": f"digits-ul-text-{method}/{setting}",
            "air.seed": str(seed),
            "air.user": "ada",
            "air.versions": json.dumps(dict.fromkeys(("torch", "numpy", "python"), "1.2.3")),
            **world(method),
        },
        params={**params(setting, method), "seed": str(seed)},
        metrics={name: rng.random() for name in SINGLES},
        curves={name: [rng.random() for _ in range(10)] for name in CURVES},
        started=started,
        ended=started + SECOND,
    )


def point(last: TrialRun, setting: int, seeds: int) -> PointRun:
    curves = {name: [0.5] * 10 for name in CURVES}
    spread = dict.fromkeys(("test/accuracy_std", "test/accuracy_low", "test/accuracy_high"), 0.1)
    metrics = {**last.metrics, **{n: curve[-1] for n, curve in last.curves.items()}, **spread}
    slots = [f"{last.tags['air.point']}/seed={seed}" for seed in range(seeds)]
    return PointRun(
        point=last.tags["air.point"],
        name=f"{last.name.rsplit('-', 2)[0]} images_per_class={setting}",
        content=str(setting),
        tags=world(last.tags["air.method"]),
        params=params(setting, last.tags["air.method"]),
        note=" ".join(link(f"seed {seed}", "trial", slot) for seed, slot in enumerate(slots)),
        numbers=lambda: Numbers(
            metrics={**metrics, "n": float(seeds)},
            curves={**curves, "test/accuracy": [0.5] * 9 + [metrics["test/accuracy"]]},
            interval="95 %",
        ),
        started=BEGAN + setting * SEEDS * SECOND,
        ended=last.ended,
    )


def world(method: str) -> dict[str, str]:
    return {
        "air.dataset": "digits",
        "air.paradigm": "ul",
        "air.modality": "text",
        "air.method": method,
    }


def params(setting: int, method: str) -> dict[str, str]:
    return {"method": method, "images_per_class": str(setting), "fusion_weight": f"{setting % 9}"}


def experiment_of(url: str, project: str) -> str:
    found = get(f"{url}/api/2.0/mlflow/experiments/get-by-name?experiment_name=air/{project}")
    return str(found["experiment"]["experiment_id"])


def searched(url: str, experiment: str, order: str) -> float:
    """Median seconds of the table's request."""
    asked = {
        "experiment_ids": [experiment],
        "run_view_type": "ACTIVE_ONLY",
        "max_results": 100,
        "order_by": [order],
    }
    request = urllib.request.Request(
        f"{url}/ajax-api/2.0/mlflow/runs/search",
        json.dumps(asked).encode(),
        {"Content-Type": "application/json"},
    )
    taken = []
    for _ in range(7):
        began = time.monotonic()
        assert len(get(request)["runs"]) > 1
        taken.append(time.monotonic() - began)
    return statistics.median(taken)


def get(request: Any) -> Any:
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.loads(answer.read())


def loaded(url: str, experiment: str, name: str, scratch: Path) -> dict[str, float]:
    """Median seconds from an address to what is looked for, each in a browser that knows nothing.

    The experiment, until the sweep stands there with its runs folded; all settings, best first.
    """
    runs = f"{url}/#/experiments/{experiment}/runs?workflowType=machine_learning"
    pages = {
        "experiment": (runs, f"[...document.links].some(a => a.innerText === '{name}')"),
        "settings": (
            f"{runs}&viewStateShareKey=air-{name}-point",
            "document.body.innerText.includes('digits-ul-text-')",
        ),
    }
    taken: dict[str, list[float]] = {page: [] for page in pages}
    for attempt in range(3):
        for page, (address, until) in pages.items():
            browser = Browser(scratch / f"{name}-{page}-{attempt}")
            try:
                taken[page].append(browser.open(address, until))
            finally:
                browser.close()
    return {f"page: {page}": statistics.median(seconds) for page, seconds in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--few", type=int, default=21)
    parser.add_argument("--store", type=Path, help="kept, and used again where it is there")
    asked = parser.parse_args()
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        store = asked.store or scratch / "runs"
        sweeps = {"few": asked.few, "many": asked.trials}
        seconds = 0.0
        if not (store / DATABASE).exists():
            tell(store, "first", 1)  # makes the file, which takes seconds
            for name, trials in sweeps.items():
                seconds = tell(store, name, trials)
                print(f"{name}: {trials} trials told in {seconds:.0f} s", file=sys.stderr)
        server = MlflowServer(store, scratch / "log")
        stack.callback(server.stop)
        server.start()
        found: dict[str, dict[str, float]] = {}
        for name in sweeps:
            experiment = experiment_of(server.url, name)
            times = {order: searched(server.url, experiment, by) for order, by in ORDERS.items()}
            if CHROMIUM:
                times |= loaded(server.url, experiment, name, scratch)
            found[name] = {key: round(value, 3) for key, value in times.items()}
            print(name, found[name], file=sys.stderr)
    if not CHROMIUM:
        print(f"no pages: {MISSING}", file=sys.stderr)
    key = "page: settings" if CHROMIUM else "best"
    result = {
        "name": "browsing",
        "ratio": round(found["many"][key] / found["few"][key], 2),
        "baseline": f"the same with {asked.few} trials",
        "trials": asked.trials,
        "told_s": round(seconds, 1),
        **{f"{name}_s": times for name, times in found.items()},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

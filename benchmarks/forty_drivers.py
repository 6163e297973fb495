"""Forty drivers at once on one MLflow with users, over Postgres and S3: is anything lost, how slow
are pages, how many connections?

Starts Postgres (fsync on), an S3 server and `mlflow server --app-name basic-auth` on loopback, one
Ray cluster that all drivers join, and then the drivers: `airsweep run` with a search of its own
each, studies in Postgres, two projects, a user each, one store. Trials take ten seconds and
compute nothing (`tests/trivial.py`), in their driver, so that what is measured is what drivers do
to shared services; they begin when the last driver is there, half a second apart. Meanwhile
somebody opens the list of runs again and again: the two requests of that page (`experiments/get`,
`runs/search`, 100 a page), and once in headless chromium. Baseline: the same requests when all
drivers have ended.

    python benchmarks/forty_drivers.py [--drivers 40] [--points 5] [--workers 2] [--no-ray]

Ten minutes on two cores, most of them for starting Python forty times; 190 MB of memory a driver.
Needs Debian's postgresql. The last line is JSON; `ratio` is the 95th percentile of the page's data
with drivers over the one without.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.browser import CHROMIUM, Browser
from tests.drivers import PROJECTS, Figures, drive, percentile
from tests.team import HERE, MISSING, Team, team

POOL = 10 + 10  # connections of a store, as docs/team.md sets it
STORES = 2  # of a server's process: runs, users


def folder_of_images(folder: Path) -> Path:
    """As many as trials ask for; nobody looks at them."""
    from PIL import Image

    from air_core.datasets.digits import CLASSNAMES

    for digit, name in enumerate(CLASSNAMES):
        (folder / name).mkdir(parents=True)
        for index in range(16):
            shade = (20 * digit, 10 * index, 0)
            Image.new("RGB", (8, 8), shade).save(folder / name / f"{index:02}.png")
    return folder


def one_cluster(stack: ExitStack) -> str:
    """The address of a Ray of one node."""
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    from ray.cluster_utils import Cluster

    # In a folder of its own: the usual one says to everybody here which cluster is the last.
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp"))
    node = {"num_cpus": 2, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    cluster: Any = Cluster(initialize_head=True, head_node_args={**node, "temp_dir": folder})
    stack.callback(cluster.shutdown)
    return str(cluster.address)


def opened(services: Team, user: dict[str, str], project: str, profile: Path) -> float:
    """Seconds from the address of a project's list to its rows, in a browser that knows nothing."""
    found = services.mlflow.post("api/2.0/mlflow/experiments/search", {"max_results": 100})
    experiment = next(e for e in found["experiments"] if e["name"] == f"air/{project}")
    url = services.mlflow.url
    page = f"{url}/#/experiments/{experiment['experiment_id']}/runs"
    login = "//{MLFLOW_TRACKING_USERNAME}:{MLFLOW_TRACKING_PASSWORD}@".format(**user)
    browser = Browser(profile)
    try:
        browser.open(f"{url.replace('//', login)}/version", "document.body.innerText")
        rows = "[...document.links].some(a => a.innerText.startsWith('sweep'))"
        return browser.open(f"{page}?workflowType=machine_learning", rows, 300)
    finally:
        browser.close()


def shown(found: Figures) -> dict[str, Any]:
    seconds = {
        f"page_{phase}_{name}_s": round(percentile(values, share), 3)
        for phase, values in found.pages.items()
        for name, share in (("p50", 0.5), ("p95", 0.95))
    }
    return {
        "drivers": found.drivers,
        "alive_at_once": found.alive,
        "exit_codes": {str(code): count for code, count in found.codes.items()},
        "runs_expected": found.expected,
        "runs_late": found.late,
        "runs_lost": found.lost,
        "runs_doubled": found.doubled,
        "runs_not_finished": found.open_runs,
        **seconds,
        "pages_refused": found.refused,
        "looks": {phase: len(values) for phase, values in found.pages.items()},
        "postgres_connections_most": found.connections,
        "http_connections_a_driver": found.http,
        "driver_rss_mb": round(statistics.median(found.rss)),
        "driver_private_mb": round(statistics.median(found.private)),
        "wall_s": round(found.wall, 1),
        "load": round(found.load, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--drivers", type=int, default=40)
    parser.add_argument("--points", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10, help="that a trial takes")
    parser.add_argument("--workers", type=int, default=2, help="processes of the server")
    parser.add_argument("--no-ray", action="store_true", help="200 MB less a driver")
    asked = parser.parse_args()
    if not HERE:
        sys.exit(MISSING)
    pages: dict[str, float] = {}
    load = os.getloadavg()[0]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        address = None if asked.no_ray else one_cluster(stack)
        running = stack.enter_context(team(folder, careful=True, workers=asked.workers))

        def look(services: Team, user: dict[str, str], project: str) -> None:
            if CHROMIUM:
                time.sleep(30)  # till all sweeps are there
                pages["with"] = opened(services, user, project, folder / f"p{len(pages)}")

        found = drive(
            running,
            asked.drivers,
            folder / "team",
            folder_of_images(folder / "images"),
            points=asked.points,
            trial_seconds=asked.seconds,
            apart=0.5,
            address=address,
            say=lambda line: print(line, file=sys.stderr),
            meanwhile=look,
        )
        if CHROMIUM:
            someone = running.mlflow.make_user("someone")
            pages["without"] = opened(running, someone, PROJECTS[0], folder / "p9")
    figures = shown(found)
    ratio = figures["page_with_p95_s"] / figures["page_without_p95_s"]
    bound = asked.workers * STORES * POOL
    result = {
        "name": "forty_drivers",
        "ratio": round(ratio, 2),
        "baseline": "the page's requests when all drivers have ended",
        "ray": address is not None,
        **figures,
        "postgres_connections_bound": bound,
        "chromium_s": {phase: round(seconds, 1) for phase, seconds in pages.items()},
        "load_before": round(load, 1),
        "load_after": round(os.getloadavg()[0], 1),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

"""Does `airsweep plan --probe` say what the work then takes?

A probe on a fresh store, then all of the work that it spoke of, each stage in a process of its own
as workers do it, without Ray. Both by the processor's time, which other programs on the machine
move less than they move a clock.

    python benchmarks/probe.py [--sweep quickstart] [--set KEY=VALUE ...] [--only KEY=VALUE ...]

The whole quickstart takes four minutes on an idle core. The last line is JSON; `ratio` is what was
said over what it took.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from orchestrator.place import Place, place_of
from orchestrator.plan import Plan, plan_sweep
from orchestrator.sweep_file import find_sweep, load_sweep


def planned(asked: argparse.Namespace, store: Path) -> tuple[Plan, Place]:
    sweep = load_sweep(find_sweep(asked.sweep), sets=asked.sets, only=asked.only)
    place = place_of(sweep, store, None)
    return plan_sweep(sweep, place.store, place.resolver(), place.ledger()), place


def probe(asked: argparse.Namespace, store: Path) -> tuple[dict[str, float], float]:
    """Seconds that are said, by stage, and what it took to say so."""
    from orchestrator import probe
    from orchestrator.workshop import Workshop

    probe._now = lambda device: time.process_time()
    plan, place = planned(asked, store)
    started = time.process_time()
    probe.probe_work(
        plan.work,
        Workshop(place.store),
        plan.sweep.resources,
        lambda line: print(line, file=sys.stderr),
    )
    taken = time.process_time() - started
    found = planned(asked, store)[0].estimate
    assert found.source == "probe", found.reason
    return dict(found.stages), taken


def work(asked: argparse.Namespace, store: Path, stage: str) -> float:
    """Seconds that a stage takes."""
    import torch

    from orchestrator.image_rows import build_image_block, open_generator
    from orchestrator.replicas import run_trials
    from orchestrator.stages import build_features, build_labels, build_lora
    from orchestrator.workshop import Workshop

    torch.set_num_threads(1)
    plan, place = planned(asked, store)
    shop = Workshop(place.store)
    started = time.process_time()
    builders: dict[str, Any] = {
        "features": build_features,
        "labels": build_labels,
        "lora": build_lora,
    }
    for need in plan.needs:
        if need.stage != stage:
            continue
        if stage in builders:
            builders[stage](need.spec, shop)
            continue
        generator = open_generator(need.spec.images, shop)
        for c, block in need.shards():
            build_image_block(need.spec, c, block, shop, lambda of=generator: of)
    if stage == "trials":
        points: dict[tuple[str, int], list[Any]] = {}
        for slot in plan.slots:
            points.setdefault((slot.cell.id, slot.point), []).append(slot.spec)
        for specs in points.values():
            problems = [one for one in run_trials(specs, place.store) if isinstance(one, Exception)]
            assert not problems, problems
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sweep", default="quickstart")
    parser.add_argument("--set", action="append", default=[], dest="sets")
    parser.add_argument("--only", action="append", default=[])
    asked = parser.parse_args()
    fresh = multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1)
    with tempfile.TemporaryDirectory() as folder, fresh as pool:
        store = Path(folder) / "runs"
        said, cost = pool.apply(probe, (asked, store))
        took = {}
        for stage in said:  # in the order in which one needs the other
            took[stage] = pool.apply(work, (asked, store, stage))
            print(f"{stage}: said {said[stage]:.1f} s, took {took[stage]:.1f} s", file=sys.stderr)
    total = sum(took.values())
    result = {
        "name": "probe",
        "ratio": round(sum(said.values()) / total, 3),
        "baseline": f"what {asked.sweep} then took, 1 thread, CPU time",
        "said_s": {stage: round(value, 2) for stage, value in said.items()},
        "took_s": {stage: round(value, 2) for stage, value in took.items()},
        "probe_s": round(cost, 1),
        "share": round(cost / total, 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

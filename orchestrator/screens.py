"""Screens that are printed once: plan, status, the end of a run. Imports no torch."""

from __future__ import annotations

import json
import os
import shlex
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from air_core.datasets import get_dataset
from air_core.flat import to_flat
from air_core.normal import normalised
from orchestrator import presets, report
from orchestrator.driver import does_not_fit
from orchestrator.estimate import Estimate
from orchestrator.failures import CLASSES
from orchestrator.freshness import remedy
from orchestrator.place import Place, read_outcome
from orchestrator.plan import Need, Plan, plan_sweep
from orchestrator.remote import folder_of
from orchestrator.results import Standing, entries_of, pruned_points, standing
from orchestrator.screen import clock
from orchestrator.store import smoke_store
from orchestrator.studies import searches
from orchestrator.summary import summary
from orchestrator.sweep import SweepSpec, notes_of

STATES = {"present": "there", "partial": "in part", "missing": "to make"}


# ---------------------------------------------------------------- plan


def plan_screen(
    plan: Plan, place: Place, explain: bool, sources: Mapping[str, int] = MappingProxyType({})
) -> str:
    """What would run.

    Args:
        sources: other sweeps whose trials are reused, and how many of each.
    """
    shown = plan.json(place.store)
    trials = shown["trials"]
    lines = [
        f"{plan.sweep.name}: {len(plan.cells)} cells, {plan.points} points, "
        f"{trials['total']} trials: {trials['done']} done, {trials['reused']} reused, "
        + (f"{trials['pruned']} pruned, " if trials["pruned"] else "")
        + f"{trials['to_run']} to run",
        *([str(plan.edit)] if plan.edit is not None else []),
        "",
    ]
    lines += [f"  reused   {count} trials of {name}" for name, count in sources.items()]
    for artifact in shown["artifacts"]:
        count = "" if artifact["need"] == 1 else f"  {artifact['have']}/{artifact['need']} blocks"
        size = f"  {artifact['bytes'] / 1e6:.1f} MB" if artifact["bytes"] else ""
        lines.append(f"  {STATES[artifact['state']]:<8} {artifact['key']}{count}{size}")
    lines += ["", f"  {_time_left(plan)}"]
    problem = does_not_fit(plan, place.store)
    lines += [f"  it would not start: {problem}"] if problem else []
    stale = plan.stale(place.store)
    lines += [f"  {one}" for one in stale]
    lines += [f"  {remedy(stale)}"] if stale else []
    lines += [f"  note: {note}" for note in notes_of(plan.sweep)]
    varied = plan.sweep.seeds.vary
    if "split_seed" in varied:
        rows = sum(need.stage == "images" for need in plan.needs)
        lines.append(f"  note: seeds vary {', '.join(varied)}: {rows} rows of images")
    if explain:
        lines += ["", *_explain(plan)]
    return "\n".join(lines)


def _time_left(plan: Plan) -> str:
    if not plan.to_run:
        return "nothing to do"
    found = plan.estimate
    gpu = f", {found.gpu_hours:.1f} GPU-hours" if found.gpu_hours else ""
    wall = f", at least {clock(found.wall)} on this machine" if found.wall is not None else ""
    return f"about {clock(found.seconds)} of work on one worker{wall}{gpu} ({_basis(found)})"


def _basis(found: Estimate) -> str:
    """What the time is known from."""
    probed = [stage for stage, source in found.sources.items() if "probe" in source]
    parts = [found.reason] if found.reason else []
    parts += ["measured in this store"] if found.source.startswith("history") else []
    if probed and "probed on" not in found.reason:
        parts.append(f"{', '.join(probed)} probed on {' and '.join(found.devices)}")
    if found.source == "guess":
        parts.append("`airsweep plan --probe` measures a little of it")
    return "; ".join(parts)


def _explain(plan: Plan) -> list[str]:
    lines = []
    for cell in plan.cells:
        method = presets.METHODS[cell.method]
        slot = next((slot for slot in plan.slots if slot.cell.id == cell.id), None)
        settings = to_flat(slot.spec) if slot else cell.flat
        world = presets.defaults(cell.method, cell.flat)
        lines.append(f"{cell.id}")
        for name, value in settings.items():
            source = (
                "pinned by the method"
                if name in method.pins
                else "grid"
                if name in cell.chosen
                else "fixed"
                if name in plan.sweep.fixed
                else "default of the world"
                if name in world
                else "default"
            )
            lines.append(f"  {name:<34} {value!s:<26} {source}")
    return lines


# ---------------------------------------------------------------- status


def status(place: Place) -> dict[str, Any]:
    """The contract of `status --json`."""
    found = standing(place.ledger())
    alive = place.ledger().busy()
    return {
        "sweep": f"{place.project}/{place.name}",
        "running": alive,
        "exit_code": found.exit_code,
        "trials": found.counts(alive),
        "prepared": dict(found.prepared),
        "waiting": _waiting(found, place) if alive else None,
        "retried": dict(found.retried),
        "failures": [
            {"slot": slot, "class": event["failure_class"], "message": event["message"]}
            for slot, event in found.failures.items()
        ],
        "unmade": [
            {"artifact": key, "class": event["failure_class"], "message": event["message"]}
            for key, event in found.unmade.items()
        ],
    }


def _waiting(found: Standing, place: Place) -> dict[str, Any] | None:
    """Who waits for what: cells for artifacts that are made now, and which of these others make."""
    left = {key: count for key, count in found.waiting_for.items() if count > 0}
    if not left:
        return None
    holders = {key: place.store.locks.holder(key.rpartition("-")[2]) for key in left}
    mine = f"{place.project}/{place.name} "
    others = {key: who for key, who in holders.items() if who and not who.startswith(mine)}
    return {"cells": list(found.waiting_cells), "for": left, "others": others}


def status_screen(found: dict[str, Any]) -> str:
    """The same for people."""
    counts = ", ".join(f"{count} {state}" for state, count in found["trials"].items())
    now = "running" if found["running"] else f"not running, last exit {found['exit_code']}"
    lines = [f"{found['sweep']}: {now}", f"  trials    {counts}"]
    if found["prepared"]:
        made = ", ".join(f"{count} {stage}" for stage, count in found["prepared"].items())
        lines.append(f"  prepared  {made}")
    if found["waiting"]:
        cells, left = found["waiting"]["cells"], found["waiting"]["for"]
        lines.append(f"  waiting   {len(cells)} cells, such as {cells[0]}, for")
        for key, count in left.items():
            who = found["waiting"]["others"].get(key)
            lines.append(f"              {key}" + _count(count))
            lines += [f"              which {who} makes"] if who else []
    if found["retried"]:
        tried = ", ".join(f"{count} x {name}" for name, count in found["retried"].items())
        lines.append(f"  retried   {tried}")
    for artifact in found["unmade"]:
        lines.append(f"  not made  {artifact['artifact']}")
        lines.append(f"              {artifact['class']}: {artifact['message']}")
    for (name, message), count in Counter(
        (failure["class"], failure["message"]) for failure in found["failures"]
    ).items():
        lines.append(f"  failed    {count} x {name}: {message}")
        lines.append(f"              {CLASSES[name].remedy}")
    return "\n".join(lines)


def _count(left: int) -> str:
    return "" if left == 1 else f": {left} blocks"


# ---------------------------------------------------------------- the end of a run


def summary_screen(sweep: SweepSpec, place: Place) -> str:
    """The table of a sweep and what its last run did."""
    plan = plan_sweep(sweep, place.store, place.resolver(), place.ledger())
    entries = entries_of(plan, place.store)
    outcome = read_outcome(place)
    facts = [
        *_image_facts(plan, place, outcome),
        *_work_facts(plan, place, outcome),
        *_search_facts(plan, place),
        *_next_facts(plan, place),
    ]
    if not entries:
        return "\n".join(f"{label:<9}{text}" for label, text in facts)
    objective = sweep.search.objective if sweep.search else None
    rows = report.rows(entries, objective, pruned_points(plan))
    return summary(_title(plan), entries, rows, facts)


def _title(plan: Plan) -> str:
    datasets = sorted({slot.spec.dataset.name for slot in plan.slots})
    about = ", ".join(map(_about, datasets))
    if all(slot.spec.paradigm == "ul" for slot in plan.slots):
        about += ", no label trains"
    return f"airsweep {plan.sweep.name}   {about}"


def _about(dataset: str) -> str:
    try:
        return get_dataset(dataset).about
    except ValueError:  # a folder of somebody's that is no longer there
        return dataset


def _image_facts(plan: Plan, place: Place, outcome: dict[str, Any]) -> list[tuple[str, str]]:
    run = outcome.get("run", {})
    parts = []
    shares = run.get("shares", {})
    if shares:
        groups = ", ".join(f"{name} {share:.0%}" for name, share in sorted(shares.items()))
        parts.append(f"CLIP recognises {groups}")
    if run.get("drawn"):
        parts.append(
            f"{run['redrawn']} of {run['drawn'] + run['holes']} were blank and redrawn, "
            f"{run['holes']} given up"
        )
    return [("images", "; ".join(parts))] if parts else []


def _work_facts(plan: Plan, place: Place, outcome: dict[str, Any]) -> list[tuple[str, str]]:
    found = standing(place.ledger())
    counts = found.counts(alive=False)
    facts = [
        (
            "trials",
            f"{plan.total}: {counts['done']} run, {counts['reused']} reused, "
            + (f"{counts['pruned']} pruned, " if counts["pruned"] else "")
            + f"{counts['failed']} failed"
            + _read_by(plan, place),
        )
    ]
    run = outcome.get("run", {})
    walls = run.get("walls", {})
    if walls:
        total = outcome["seconds"]
        named = "  ".join(
            f"{PHASES[stage]} {clock(walls[stage])}" for stage in PHASES if stage in walls
        )
        overhead = max(0.0, total - sum(walls.values()))
        each = run.get("overheads")
        warm = f"{sum(each) / len(each):.2f} s overhead a point on warm actors; " if each else ""
        facts.append(
            (
                "time",
                f"{clock(total)}: {named}  rest {clock(overhead)}; {warm}"
                f"peak {run.get('memory', 0) / 2**30:.1f} GiB",
            )
        )
    return facts


def _search_facts(plan: Plan, place: Place) -> list[tuple[str, str]]:
    """Searches that patience ended."""
    search = plan.sweep.search
    if search is None or search.patience is None:
        return []
    found = searches(place.ledger())
    ended = {cell.id: found.points(cell, search) for cell in plan.cells if cell.space}
    lines = [
        f"{cell}: ended after {points} of {search.points} points, "
        f"the last {search.patience} or more no better"
        for cell, points in ended.items()
        if points < search.points
    ]
    return [("search", "\n".join(lines))] if lines else []


PHASES = {
    "features": "features",
    "labels": "labels",
    "lora": "LoRA",
    "images": "images",
    "trials": "trials",
}


def _read_by(plan: Plan, place: Place) -> str:
    there = [need for need in plan.needs if need.have(place.store) == need.total()]
    rows = [need for need in there if need.stage == "images"]
    if not rows:
        return ""
    loras = sum(need.stage == "lora" for need in there)
    images = sum(_images_in(need) for need in rows)
    readers = sum(normalised(slot.spec).images is not None for slot in plan.slots)
    return f"; {loras} LoRA, {images} images drawn once, read by {readers} trials"


def _images_in(need: Need) -> int:
    return need.images_per_class * len(need.spec.images.classnames)  # type: ignore[union-attr]


def _next_facts(plan: Plan, place: Place) -> list[tuple[str, str]]:
    sheet = place.folder / "contact_sheet.png"
    facts = []
    if sheet.exists():
        facts.append(("look", f"{_near(sheet)}"))
    asked, store = _asked(plan, place), _store_option(place)
    facts.append(("browse", f"airsweep ui{store}  ->  http://127.0.0.1:5000"))
    facts.append(
        (
            "cluster",
            f"ray job submit --address $ADDR --working-dir . -- python -m orchestrator run "
            f"{asked} --store {place.store.name if place.store.mirror else '/shared/runs'}",
        )
    )
    left = f"{plan.to_run} trials are left" if plan.to_run else "nothing to do"
    facts.append(("again", f"airsweep run {asked}{store}: {left}"))
    return facts


def _asked(plan: Plan, place: Place) -> str:
    """The file and the options that this sweep was asked for with."""
    words = [plan.sweep.source]
    with suppress(FileNotFoundError):
        origin = json.loads((place.folder / "resolved.json").read_text())
        for option, kept in (("--set", "sets"), ("--only", "only")):
            words += [f"{option} {shlex.quote(word)}" for word in origin.get(kept, [])]
        words += ["--smoke"] if origin.get("smoke") else []
    return " ".join(words)


def _store_option(place: Place) -> str:
    store = place.store
    usual = os.environ.get("AIRSWEEP_STORE") or "runs"
    if store.mirror is not None:
        known = (usual, str(smoke_store(usual)))
        return "" if store.name in known else f" --store {shlex.quote(store.name)}"
    folder = folder_of(usual).absolute()
    return (
        "" if store.root in (folder, Path(f"{folder}-smoke")) else f" --store {_near(store.root)}"
    )


def _near(path: Path) -> str:
    """A path as people would type it from here."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)

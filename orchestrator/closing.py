"""What a sweep's last run did, in words: for the screen at its end and for trackers.

Imports no torch.
"""

from __future__ import annotations

import os
import shlex
from contextlib import suppress
from pathlib import Path
from typing import Any

from air_core.normal import normalised
from orchestrator.dataset_text import about
from orchestrator.output import near
from orchestrator.place import Place, read_outcome, read_resolved
from orchestrator.plan import Need, Plan
from orchestrator.remote import folder_of, is_bucket
from orchestrator.results import standing
from orchestrator.screen import clock
from orchestrator.store import smoke_store
from orchestrator.studies import searches
from orchestrator.sweep import option_words
from orchestrator.variables import in_ray_job


def title_of(plan: Plan) -> str:
    """A sweep's name, and what stands behind it."""
    datasets = sorted({slot.spec.dataset.name for slot in plan.slots})
    words = ", ".join(map(about, datasets))
    if all(slot.spec.paradigm == "ul" for slot in plan.slots):
        words += ", no label trains"
    return f"airsweep {plan.sweep.name}   {words}"


def facts_of(plan: Plan, place: Place) -> list[tuple[str, str]]:
    """What the last run did, as (label, text): images, trials, time, searches."""
    outcome = read_outcome(place)
    return [
        *_image_facts(plan, place, outcome),
        *_work_facts(plan, place, outcome),
        *_search_facts(plan, place),
    ]


def _image_facts(plan: Plan, place: Place, outcome: dict[str, Any]) -> list[tuple[str, str]]:
    run = outcome.get("run", {})
    parts = []
    shares = run.get("shares", {})
    if shares:
        groups = ", ".join(f"{name} {share:.0%}" for name, share in sorted(shares.items()))
        parts.append(f"CLIP recognises {groups} of the sheet")
    if run.get("drawn"):
        parts.append(
            f"{run['redrawn']} of {run['drawn'] + run['holes']} in whole blocks were blank "
            f"and redrawn, {run['holes']} given up"
        )
    return [("images", "; ".join(parts))] if parts else []


def _work_facts(plan: Plan, place: Place, outcome: dict[str, Any]) -> list[tuple[str, str]]:
    found = standing(place.ledger())
    counts = found.counts(alive=False, among={slot.id for slot in plan.slots})
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


def next_facts(plan: Plan, place: Place) -> list[tuple[str, str]]:
    """Where to look, and what to type next, from here."""
    sheet = place.folder / "contact_sheet.png"
    facts = []
    if sheet.exists():
        facts.append(("look", f"{near(sheet)}"))
    asked, store = _asked(plan, place), _store_option(place, smoke=True)
    browsed = _store_option(place, smoke=False)
    facts.append(("browse", f"airsweep ui{browsed}  ->  http://127.0.0.1:5000"))
    left = f"{plan.to_run} trials are left" if plan.to_run else "nothing to do"
    if in_ray_job():
        facts.append(("again", f"submit it again, with the same options: {left}"))
        return facts
    shared = place.store.name if is_bucket(place.store.name) else "/shared/runs"
    facts.append(("cluster", f"airsweep submit {asked} --address $ADDR --store {shared}"))
    facts.append(("again", f"airsweep run {asked}{store}: {left}"))
    return facts


def _asked(plan: Plan, place: Place) -> str:
    """The file and the options that this sweep was asked for with."""
    words = [plan.sweep.source]
    with suppress(FileNotFoundError):
        origin = read_resolved(place)
        kept = (origin.get("sets", []), origin.get("only", []), bool(origin.get("smoke")))
        words += map(shlex.quote, option_words(*kept))
    return " ".join(words)


def _store_option(place: Place, *, smoke: bool) -> str:
    """
    Args:
        smoke: the command has an option that leads to the store of trial runs.
    """
    store = place.store
    usual = os.environ.get("AIRSWEEP_STORE") or "runs"
    if is_bucket(store.name):
        known = [usual, *([str(smoke_store(usual))] if smoke else [])]
        return "" if store.name in known else f" --store {shlex.quote(store.name)}"
    folder = folder_of(usual).absolute()
    folders = [folder, *([Path(f"{folder}-smoke")] if smoke else [])]
    return "" if store.root in folders else f" --store {near(store.root)}"

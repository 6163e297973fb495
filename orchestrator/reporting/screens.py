"""Screens that are printed once: plan, status, the end of a run. Imports no torch."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from air_core.flat import to_flat
from orchestrator.failures import CLASSES
from orchestrator.formatting import clock, counted, shown
from orchestrator.planning import (
    Plan,
    changed_inputs,
    earlier_results,
    plan_of,
    unschedulable_reason,
)
from orchestrator.planning.estimate import Estimate
from orchestrator.reporting.results import Standing, results_of, standing
from orchestrator.reporting.summary import facts_of, next_facts, summary, title_of
from orchestrator.spec import SweepSpec, notes_of, presets
from orchestrator.store import SweepLocation

STATES = {"present": "there", "partial": "in part", "missing": "to make"}


# ---------------------------------------------------------------- plan


def plan_screen(
    plan: Plan,
    location: SweepLocation,
    explain: bool,
    sources: Mapping[str, int] = MappingProxyType({}),
) -> str:
    """What would run.

    Args:
        sources: other sweeps whose trials are reused, and how many of each.
    """
    shown = plan.json(location.store)
    trials = shown["trials"]
    lines = [
        f"{plan.sweep.name}: {counted(len(plan.cells), 'cell')}, "
        f"{counted(plan.points, 'point')}, "
        f"{counted(trials['total'], 'trial')}: {trials['done']} done, {trials['reused']} reused, "
        + (f"{trials['pruned']} pruned, " if trials["pruned"] else "")
        + f"{trials['to_run']} to run",
        *([str(plan.edit)] if plan.edit is not None else []),
        *changed_inputs(earlier_results(plan, location)),
        "",
    ]
    lines += [f"  reused   {counted(count, 'trial')} of {name}" for name, count in sources.items()]
    for artifact in shown["artifacts"]:
        count = "" if artifact["need"] == 1 else f"  {artifact['have']}/{artifact['need']} blocks"
        size = f"  {artifact['bytes'] / 1e6:.1f} MB" if artifact["bytes"] else ""
        lines.append(f"  {STATES[artifact['state']]:<8} {artifact['key']}{count}{size}")
    lines += ["", f"  {_time_left(plan)}"]
    problem = unschedulable_reason(plan, location.store)
    lines += [f"  it would not start: {problem}"] if problem else []
    lines += [f"  note: {note}" for note in notes_of(plan.sweep)]
    varied = plan.sweep.seeds.vary
    if "split_seed" in varied:
        rows = sum(requirement.stage == "images" for requirement in plan.requirements)
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
    parts = [found.reason] if found.reason else ["measured in this store"]
    if found.source == "guess":
        parts.append("`airsweep run --smoke` measures a little of it")
    return "; ".join(parts)


def _explain(plan: Plan) -> list[str]:
    lines = []
    for cell in plan.cells:
        method = presets.METHODS[cell.method]
        slot = next((slot for slot in plan.slots if slot.cell.id == cell.id), None)
        settings = to_flat(slot.spec) if slot else cell.flat
        sources = (
            ("pinned by the method", method.pins),
            ("grid", cell.chosen),
            ("fixed", plan.sweep.fixed),
            ("default of the world", presets.defaults(cell.method, cell.flat)),
        )
        lines.append(f"{cell.id}")
        for name, value in settings.items():
            source = next((word for word, names in sources if name in names), "default")
            lines.append(f"  {name:<34} {shown(value):<26} {source}")
    return lines


# ---------------------------------------------------------------- status


def status(location: SweepLocation) -> dict[str, Any]:
    """The contract of `status --json`."""
    found = standing(location.event_log())
    alive = location.event_log().is_locked()
    return {
        "sweep": f"{location.project}/{location.name}",
        "running": alive,
        "exit_code": found.exit_code,
        "trials": found.counts(alive),
        "prepared": dict(found.prepared),
        "waiting": _waiting(found, location) if alive else None,
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


def _waiting(found: Standing, location: SweepLocation) -> dict[str, Any] | None:
    """Who waits for what: cells for artifacts that are made now, and which of these others make."""
    left = {key: count for key, count in found.waiting_for.items() if count > 0}
    if not left:
        return None
    holders = {key: location.store.locks.holder(key.rpartition("-")[2]) for key in left}
    mine = f"{location.project}/{location.name} "
    others = {key: who for key, who in holders.items() if who and not who.startswith(mine)}
    return {"cells": list(found.waiting_cells), "for": left, "others": others}


def status_screen(found: dict[str, Any]) -> str:
    """The same for people."""
    counts = ", ".join(f"{count} {state}" for state, count in found["trials"].items())
    code = found["exit_code"]
    last = "its last run was killed" if code is None else f"last exit {code}"
    now = "running" if found["running"] else f"not running, {last}"
    lines = [f"{found['sweep']}: {now}", f"  trials    {counts}"]
    if found["prepared"]:
        made = ", ".join(f"{count} {stage}" for stage, count in found["prepared"].items())
        lines.append(f"  prepared  {made}")
    if found["waiting"]:
        cells, left = found["waiting"]["cells"], found["waiting"]["for"]
        lines.append(f"  waiting   {counted(len(cells), 'cell')}, such as {cells[0]}, for")
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


WIDEST, NARROWEST = 100, 60  # columns


def summary_screen(sweep: SweepSpec, location: SweepLocation) -> str:
    """The table of a sweep and what its last run did."""
    location = replace(location, recorded=True)
    plan = plan_of(sweep, location)
    facts = [*facts_of(plan, location), *next_facts(plan, location)]
    width = min(WIDEST, max(NARROWEST, shutil.get_terminal_size((WIDEST, 24)).columns))
    return summary(title_of(plan), results_of(plan, location.store), facts, width=width)

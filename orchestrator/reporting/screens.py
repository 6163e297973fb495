"""Screens of `plan` and `status` and at the end of a run. This module does not import torch."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import chain
from statistics import fmean
from typing import Any

from air_core.methods import EMBEDDED, METHODS
from air_core.settings.flat import to_flat, trial_keys
from orchestrator.failures import CLASSES
from orchestrator.formatting import aligned, format_bytes, format_duration, format_value, plural
from orchestrator.planning import (
    Plan,
    changed_inputs,
    earlier_results,
    unschedulable_reason,
    unused_gpus_reason,
)
from orchestrator.planning.history import RESULT_STATES, History, results_text
from orchestrator.planning.ledger import read_ledger
from orchestrator.planning.recorded import count_by_sweep
from orchestrator.planning.requests import results_command, run_command
from orchestrator.planning.requirements import STAGE_TITLES
from orchestrator.reporting.results import holes_text, results_of
from orchestrator.reporting.summary import data_text, next_fact, run_facts, summary, sweep_title
from orchestrator.spec import Cell, notes_of, presets
from orchestrator.spec.cells import computation_of
from orchestrator.spec.space import default_params
from orchestrator.stages import STAGES
from orchestrator.stages.dataset_text import UnusedImages, unused_by_dataset
from orchestrator.store import SweepLocation, read_outcome

# ---------------------------------------------------------------- plan


def plan_report(plan: Plan, location: SweepLocation) -> dict[str, Any]:
    """The plan of a sweep for `plan --json`. New versions may add keys but never remove any."""
    earlier, sources = earlier_results(plan, location), {}
    if plan.results["reused"]:
        sources = dict(count_by_sweep(location.store, plan.has_result, location))
    return {
        **plan.json(location.store),
        "reused_from": sources,
        "changed_inputs": changed_inputs(earlier),
        "stale": [
            {"stage": stage, "artifacts": count}
            for (stage, cause), count in earlier.items()
            if cause == "code"
        ],
    }


def plan_screen(
    plan: Plan, location: SweepLocation, origin: Mapping[str, Any], explain: bool
) -> str:
    """The screen of `airsweep plan`: trials, artifacts, time.

    Args:
        origin: the file and options of the request; see `complete_origin`.
        explain: also list the settings that differ from the methods' presets, with their source.
    """
    content = plan_report(plan, location)
    trials = content["trials"]
    lines = [
        f"{plan.sweep.name}: {plural(len(plan.cells), 'cell')}, "
        f"{plural(sum(plan.points.values()), 'point')}, "
        f"{plural(trials['total'], 'trial')}: {results_text(trials)}, "
        f"{trials['to_run']} to run",
        *([data_text(plan)] if plan.slots else []),
        *content["changed_inputs"],
        "",
    ]
    sources = content["reused_from"].items()
    lines += [f"  reused   {plural(count, 'trial')} of {name}" for name, count in sources]
    for artifact in content["artifacts"]:
        count = "" if artifact["need"] == 1 else f"  {artifact['have']}/{artifact['need']} blocks"
        size = f"  {artifact['bytes'] / 1e6:.1f} MB" if artifact["bytes"] else ""
        lines.append(f"  {artifact['state']:<8} {artifact['key']}{count}{size}")
    lines += ["", f"  {_time_left(plan, run_command(location, origin))}"]
    if plan.to_run and (memory := plan.sweep.resources.trial.memory):
        lines.append(f"  each trial process reserves {format_bytes(memory)} of memory")
    for problem in (
        unschedulable_reason(plan, location.store),
        unused_gpus_reason(plan, location.store),
    ):
        lines += [f"  cannot start: {problem}"] if problem else []
    lines += [f"  note: {note}" for note in notes_of(plan.sweep, plan.cells)]
    if explain:
        lines += ["", *_explain(plan)]
    return "\n".join(lines)


def _time_left(plan: Plan, command: str) -> str:
    """The expected time with its source; `command` runs the sweep."""
    if not plan.to_run:
        return "nothing to do"
    estimate = plan.estimate
    seconds = estimate.seconds if estimate.wall is None else estimate.wall
    place = "one worker" if estimate.wall is None else "this machine"
    gpu = f", {estimate.gpu_hours:.1f} GPU-hours" if estimate.gpu_hours else ""
    about = f"about {format_duration(seconds)} on {place}{gpu}"
    if estimate.reason:
        smoke = "" if "--smoke" in command.split() else " --smoke"
        guess = f"{about}, a guess that can be far off" if estimate.is_known else "time unknown"
        return (
            f"{guess}: {estimate.reason}; `{command}{smoke}` measures it on a small part of the "
            "sweep"
        )
    return f"{about}, by the fastest measurements; more if the machine is busy"


def _explain(plan: Plan) -> list[str]:
    """The settings of cells that differ from the preset of their method, and why: first those of
    all cells."""
    of_cells = {cell.id: [*_unusual_settings(plan, cell)] for cell in plan.cells}
    shared = set.intersection(*map(set, of_cells.values()))
    groups = {"every cell": [row for row in next(iter(of_cells.values())) if row in shared]}
    groups |= {cell: [row for row in rows if row not in shared] for cell, rows in of_cells.items()}
    head = ("  setting", "value", "preset", "from")
    tables = ([name, *aligned([head, *rows])] for name, rows in groups.items() if rows)
    return [*chain.from_iterable(tables)]


def _unusual_settings(plan: Plan, cell: Cell) -> Iterator[tuple[str, ...]]:
    method = METHODS[cell.method]
    preset = {name: key.default for name, key in trial_keys().items()}
    preset |= {**EMBEDDED, "lora": True, **method.sets, **method.pins}
    settings = {**cell.flat, **default_params(cell)}
    used = to_flat(computation_of(settings))  # without effect, a setting has another value there
    sources = {
        "search, nearest to the default": dict(settings.items() - cell.flat.items()),
        "grid": cell.chosen,
        "overrides": cell.overridden,
        "fixed": plan.sweep.fixed,
        "default of dataset or models": presets.defaults(cell.method, cell.flat, plan.sweep.worlds),
    }
    for name, value in settings.items():
        if value != preset.get(name) and used.get(name) == value:
            source = next((label for label, names in sources.items() if name in names), "derived")
            yield f"  {name}", format_value(value), format_value(preset.get(name)), source


# ---------------------------------------------------------------- status


def status_report(location: SweepLocation) -> dict[str, Any]:
    """The status of a sweep for `status --json`. New versions may add keys but never remove any."""
    ledger = read_ledger(location)
    history, images = ledger.history, ledger.history.images
    unused = unused_by_dataset(ledger.features, location.store)
    return {
        "sweep": location.full_name,
        "options": ledger.about.options,
        "running": ledger.alive,
        "exit_code": history.exit_code,
        "trials": ledger.counts,
        "prepared": dict(history.prepared),
        "unused": {name: asdict(images) for name, images in unused.items()},
        "holes": dict(images) if images["holes"] else None,
        "waiting": _waiting(history, location) if ledger.alive else None,
        "removed": ledger.removed,
        "retried": dict(history.retried),
        "failures": [
            {"slot": slot, "class": event["failure_class"], "message": event["message"]}
            for slot, event in ledger.failures.items()
        ],
        "unmade": [
            {"artifact": key, "class": event["failure_class"], "message": event["message"]}
            for key, event in history.failed_artifacts.items()
        ],
        "last_run": _last_run(location, history),
    }


def _last_run(location: SweepLocation, history: History) -> dict[str, Any] | None:
    """Work, time and memory of the last run, from its outcome; None: it has none."""
    outcome = read_outcome(location)
    run = outcome.get("run")
    if not run:
        return None
    overheads = run.get("overheads")
    return {
        "seconds": outcome["seconds"],
        "trials": history.computed,
        "phases": run.get("walls", {}),  # seconds
        "overhead": fmean(overheads) if overheads else None,  # seconds of a point
        "memory": run.get("memory", 0),  # bytes; 0: unknown
        "memory_of": run.get("memory_of", ""),
        "images": {name: run[name] for name in ("drawn", "redrawn", "holes")},
        "recognised": run.get("shares", {}),  # by CLIP, of the images with and without LoRA
    }


def _waiting(history: History, location: SweepLocation) -> dict[str, Any] | None:
    """The cells that wait for artifacts, those artifacts, and the other sweeps that make some."""
    pending = {key: count for key, count in history.pending_artifacts.items() if count > 0}
    if not pending:
        return None
    holders = {key: location.store.locks.holder(key.rpartition("-")[2]) for key in pending}
    own = f"{location.full_name} "
    others = {
        key: holder for key, holder in holders.items() if holder and not holder.startswith(own)
    }
    return {"cells": list(history.waiting_cells), "for": pending, "others": others}


def status_screen(content: dict[str, Any]) -> str:
    """The screen of `airsweep status`, from the result of `status`."""
    trials = content["trials"]
    others = [f"{count} {state}" for state, count in trials.items() if state not in RESULT_STATES]
    counts = ", ".join([results_text(trials), *others])
    code = content["exit_code"]
    last = "last run was killed" if code is None else f"last exit code {code}"
    state = "running" if content["running"] else f"not running, {last}"
    lines = [f"{content['sweep']}: {state}", f"  trials    {counts}"]
    lines += [f"  options   {content['options']}"] if content["options"] else []
    if content["removed"]:
        lines.append(f"  removed   {plural(content['removed'], 'result')}; a run makes them again")
    if content["prepared"]:
        prepared = ", ".join(
            f"{count} {STAGE_TITLES[stage]}" for stage, count in content["prepared"].items()
        )
        lines.append(f"  prepared  by this sweep, in all runs: {prepared}")
    for name, unused in content["unused"].items():
        lines.append(f"  not used  {name}: {UnusedImages(**unused)}")
    if content["holes"]:
        lines.append(f"  not used  {holes_text(content['holes'])}")
    if content["waiting"]:
        cells, pending = content["waiting"]["cells"], content["waiting"]["for"]
        lines.append(f"  waiting   {plural(len(cells), 'cell')}, such as {cells[0]}, for")
        for key, count in pending.items():
            holder = content["waiting"]["others"].get(key)
            lines.append(f"              {key}" + ("" if count == 1 else f": {count} blocks"))
            lines += [f"              being made by {holder}"] if holder else []
    if content["retried"]:
        retried = ", ".join(f"{count} x {name}" for name, count in content["retried"].items())
        lines.append(f"  retried   {retried}")
    for artifact in content["unmade"]:
        lines.append(f"  failed    {artifact['artifact']}")
        lines.append(f"              {artifact['class']}: {artifact['message']}")
    for (name, message), count in Counter(
        (failure["class"], failure["message"]) for failure in content["failures"]
    ).items():
        lines.append(f"  failed    {count} x {name}: {message}")
        lines.append(f"              {CLASSES[name].remedy}")
    if content["last_run"]:
        lines += _last_run_lines(content["last_run"])
    return "\n".join(lines)


PHASES = {stage: stage for stage in STAGES} | {"lora": "LoRA"}


def _last_run_lines(run: Mapping[str, Any]) -> Iterator[str]:
    phases, images = run["phases"], run["images"]
    if phases:
        verbs = {"drawn": "drawn", "redrawn": "drawn again", "holes": "given up"}
        parts = [f"computed {plural(run['trials'], 'trial')}"]
        parts += [f"{plural(images[n], 'image')} {verbs[n]}" for n in verbs if images[n]]
        yield f"  last run  {', '.join(parts)}"
        named = [f"{PHASES[of]} {format_duration(phases[of])}" for of in PHASES if of in phases]
        rest = max(0.0, run["seconds"] - sum(phases.get(stage, 0.0) for stage in PHASES))
        yield (
            f"            {format_duration(run['seconds'])}: {'  '.join(named)}  "
            f"other {format_duration(rest)}"
        )
        overhead = run["overhead"]
        each = "" if overhead is None else f"{overhead:.2f} s a point beyond its trials; "
        of = f" of the {run['memory_of']}" if run["memory_of"] else ""
        yield f"            {each}peak memory{of} {format_bytes(run['memory'])}"
    if run["recognised"]:
        groups = ", ".join(
            f"{name} {share:.0%}" for name, share in sorted(run["recognised"].items())
        )
        yield f"  images    CLIP recognises {groups} of the drawn images"


# ---------------------------------------------------------------- the end of a run


WIDEST, NARROWEST = 100, 60  # columns


def summary_screen(location: SweepLocation) -> str:
    """The closing screen of `airsweep run`: results and facts about the run."""
    ledger = read_ledger(location)
    results = results_of(ledger, location.store)
    commands = {name: results_command(name, location) for name in ("table", "report")}
    width = min(WIDEST, max(NARROWEST, shutil.get_terminal_size((WIDEST, 24)).columns))
    facts = [*run_facts(ledger, location), next_fact(ledger, location, results, width)]
    return summary(sweep_title(ledger), results, facts, width=width, **commands)

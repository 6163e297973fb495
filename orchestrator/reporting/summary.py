"""What a sweep's last run found and did, in words: for the screen at its end and for trackers.

Imports no torch.
"""

from __future__ import annotations

import os
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from air_core.normal import normalised
from air_core.specs import SyntheticFeaturesSpec
from orchestrator.environment import in_ray_job
from orchestrator.formatting import clock, near
from orchestrator.planning import Plan
from orchestrator.planning.dataset_text import about
from orchestrator.planning.studies import searches
from orchestrator.reporting._layouts import screen_lines
from orchestrator.reporting.results import standing
from orchestrator.reporting.rows import (
    EMPTY,
    Results,
    choice_notes,
    collapse_notes,
    has_images,
    mark_notes,
    protocol_notes,
)
from orchestrator.reporting.tables import differences, texts
from orchestrator.spec.sweep import option_words
from orchestrator.store import (
    SweepLocation,
    folder_of,
    is_bucket,
    read_outcome,
    read_resolved,
    smoke_store,
)

MOST = 12  # differences that are shown
# Columns of `table` and of the report alone.
WIDE_ONLY = ["n_test", "fused", "gain over host", "gain over control"]
REPORT_ONLY = ["compared with", "p", "p corrected"]


def summary(
    title: str, results: Results, facts: Sequence[tuple[str, str]], *, width: int = 100
) -> str:
    """What a finished run puts on the screen, at most `width` columns wide.

    Args:
        title: name of the sweep and its data; paradigm, seeds and splits are added.
        facts: (label, text) lines below; an empty label for a plain line. Lines of a text that
            should not be folded are the caller's to keep short.
        width: of the terminal.
    """
    tail = [f"{paradigm}/{modality}" for _, paradigm, modality in results.worlds]
    lines = _folded("   ".join([title, *(tail if len(tail) == 1 else [])]), width)
    if not results.rows:
        return "\n".join([*lines, f" {EMPTY}", *_facts(facts, width)])
    lines += _table(texts(results), WIDE_ONLY, width)
    # What synthetic images add to a host, and to the control without diffusion.
    gains = [i for i, one in enumerate(results.comparisons) if has_images(one.row.method)]
    if gains:
        every = differences(results)
        lines += _table([every[i] for i in gains[:MOST]], REPORT_ONLY, width)
    if len(gains) > MOST:
        lines.append(f" {len(gains) - MOST} more differences stand in the table")
    notes = [
        *protocol_notes(results.rows),
        *(mark_notes(results.comparisons, marks=False) if gains else []),
    ]
    for note in [*notes, *choice_notes(results.rows), *collapse_notes(results)]:
        lines += _folded(note, width)
    return "\n".join([*lines, *_facts(facts, width)])


def _table(lines: Sequence[Mapping[str, str]], hidden: Sequence[str], width: int) -> list[str]:
    kept = [{name: of[name] for name in of if name not in hidden} for of in lines]
    return [f" {line}" for line in screen_lines(kept, width - 1)]


def _facts(facts: Sequence[tuple[str, str]], width: int) -> list[str]:
    """Texts beside their labels. Commands and paths are not broken."""
    labels = max((len(label) for label, _ in facts), default=0)
    lines = []
    for label, text in facts:
        lead = f"{label:<{labels}}   " if label else ""
        for part in text.splitlines():
            lines += _folded(part, width, lead)
            lead = " " * len(lead)
    return lines


def _folded(text: str, width: int, lead: str = "") -> list[str]:
    indent = " " * (len(lead) + len(text) - len(text.lstrip()) + 3)
    return textwrap.wrap(
        text,
        width,
        initial_indent=f" {lead}",
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
    )


# ---------------------------------------------------------------- facts


def title_of(plan: Plan) -> str:
    """A sweep's name, and what stands behind it."""
    datasets = sorted({slot.spec.dataset.name for slot in plan.slots})
    words = ", ".join(map(about, datasets))
    if all(slot.spec.paradigm == "ul" for slot in plan.slots):
        words += ", no label trains"
    return f"airsweep {plan.sweep.name}   {words}"


def facts_of(plan: Plan, location: SweepLocation) -> list[tuple[str, str]]:
    """What the last run did, as (label, text): images, trials, time, searches."""
    outcome = read_outcome(location)
    run = outcome.get("run", {})
    counts = standing(location.event_log()).counts(alive=False, among={s.id for s in plan.slots})
    parts = []
    if shares := run.get("shares", {}):
        groups = ", ".join(f"{name} {share:.0%}" for name, share in sorted(shares.items()))
        parts.append(f"CLIP recognises {groups} of the sheet")
    if run.get("drawn"):
        parts.append(
            f"{run['redrawn']} of {run['drawn'] + run['holes']} in whole blocks were blank "
            f"and redrawn, {run['holes']} given up"
        )
    pruned = f"{counts['pruned']} pruned, " if counts["pruned"] else ""
    trials = (
        f"{plan.total}: {counts['done']} run, {counts['reused']} reused, {pruned}"
        f"{counts['failed']} failed{_read_by(plan, location)}"
    )
    facts = [("images", "; ".join(parts)), ("trials", trials), ("time", _time(outcome, run))]
    facts.append(("search", "\n".join(_ended_searches(plan, location))))
    return [(label, text) for label, text in facts if text]


def _time(outcome: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    walls = run.get("walls", {})
    if not walls:
        return ""
    parts = [f"{PHASES[stage]} {clock(walls[stage])}" for stage in PHASES if stage in walls]
    rest = max(0.0, outcome["seconds"] - sum(walls.values()))
    each = run.get("overheads")
    warm = f"{sum(each) / len(each):.2f} s overhead a point on warm actors; " if each else ""
    return (
        f"{clock(outcome['seconds'])}: {'  '.join(parts)}  rest {clock(rest)}; {warm}"
        f"peak {run.get('memory', 0) / 2**30:.1f} GiB"
    )


def _ended_searches(plan: Plan, location: SweepLocation) -> list[str]:
    """Searches that patience ended."""
    search = plan.sweep.search
    if search is None or search.patience is None:
        return []
    found = searches(location.event_log())
    ended = {cell.id: found.points(cell, search) for cell in plan.cells if cell.space}
    return [
        f"{cell}: ended after {points} of {search.points} points, "
        f"the last {search.patience} or more no better"
        for cell, points in ended.items()
        if points < search.points
    ]


PHASES = {one: one for one in ("features", "labels", "lora", "images", "trials")}
PHASES["lora"] = "LoRA"


def _read_by(plan: Plan, location: SweepLocation) -> str:
    there = [
        requirement
        for requirement in plan.requirements
        if requirement.have(location.store) == requirement.total()
    ]
    rows = [
        (requirement.images_per_class, requirement.spec.images)
        for requirement in there
        if isinstance(requirement.spec, SyntheticFeaturesSpec)
    ]
    if not rows:
        return ""
    loras = sum(requirement.stage == "lora" for requirement in there)
    images = sum(count * len(spec.classnames) for count, spec in rows)
    readers = sum(normalised(slot.spec).images is not None for slot in plan.slots)
    return f"; {loras} LoRA, {images} images drawn once, read by {readers} trials"


def next_facts(plan: Plan, location: SweepLocation) -> list[tuple[str, str]]:
    """Where to look, and what to type next, from here."""
    sheet = location.folder / "contact_sheet.png"
    facts = []
    if sheet.exists():
        facts.append(("look", f"{near(sheet)}"))
    asked, store = _asked(plan, location), _store_option(location, smoke=True)
    browsed = _store_option(location, smoke=False)
    facts.append(("browse", f"airsweep ui{browsed}  ->  http://127.0.0.1:5000"))
    left = f"{plan.to_run} trials are left" if plan.to_run else "nothing to do"
    if in_ray_job():
        facts.append(("again", f"submit it again, with the same options: {left}"))
        return facts
    shared = location.store.name if is_bucket(location.store.name) else "/shared/runs"
    facts.append(("cluster", f"airsweep submit {asked} --address $ADDR --store {shared}"))
    facts.append(("again", f"airsweep run {asked}{store}: {left}"))
    return facts


def _asked(plan: Plan, location: SweepLocation) -> str:
    """The file and the options that this sweep was asked for with."""
    words = [plan.sweep.source]
    with suppress(FileNotFoundError):
        origin = read_resolved(location)
        kept = (origin.get("sets", []), origin.get("only", []), bool(origin.get("smoke")))
        words += map(shlex.quote, option_words(*kept))
    return " ".join(words)


def _store_option(location: SweepLocation, *, smoke: bool) -> str:
    """
    Args:
        smoke: the command has an option that leads to the store of trial runs.
    """
    store = location.store
    usual = os.environ.get("AIRSWEEP_STORE") or "runs"
    if is_bucket(store.name):
        known = [usual, *([str(smoke_store(usual))] if smoke else [])]
        return "" if store.name in known else f" --store {shlex.quote(store.name)}"
    folder = folder_of(usual).absolute()
    folders = [folder, *([Path(f"{folder}-smoke")] if smoke else [])]
    return "" if store.root in folders else f" --store {near(store.root)}"

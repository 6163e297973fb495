"""Summary of a sweep's results and of its last run, for the closing screen and for trackers.

This module does not import torch.
"""

from __future__ import annotations

import os
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from air_core.specs import SyntheticFeaturesSpec
from air_core.specs.normal import normalised
from orchestrator.environment import in_ray_job
from orchestrator.formatting import format_duration, plural, relative_path
from orchestrator.planning import Plan
from orchestrator.planning.dataset_text import dataset_description
from orchestrator.planning.studies import read_searches
from orchestrator.reporting._layouts import screen_lines
from orchestrator.reporting._worth import worth_sentences
from orchestrator.reporting.results import sweep_status
from orchestrator.reporting.rows import (
    EMPTY,
    Results,
    choice_notes,
    collapse_notes,
    protocol_notes,
    significance_notes,
    uses_diffusion,
)
from orchestrator.reporting.tables import classifier_notes, comparison_lines, table_lines
from orchestrator.spec.sweep import option_words
from orchestrator.store import (
    SweepLocation,
    is_bucket,
    read_outcome,
    read_resolved,
    smoke_store,
    store_folder,
)

MAX_COMPARISONS = 12
# Columns that the screen leaves out.
HIDDEN_RESULTS = ["n_test", "gain over host", "gain over control"]
HIDDEN_COMPARISONS = ["compared with", "p", "p corrected"]


def summary(
    title: str, results: Results, facts: Sequence[tuple[str, str]], *, width: int = 100
) -> str:
    """The screen at the end of a run, at most `width` columns wide.

    Args:
        title: name and data of the sweep; the paradigm and modality are appended.
        facts: (label, text) lines below the tables; an empty label for a plain line.
        width: of the terminal.
    """
    tail = [f"{paradigm}/{modality}" for _, paradigm, modality in results.tasks]
    lines = _wrap("   ".join([title, *(tail if len(tail) == 1 else [])]), width)
    if not results.rows:
        return "\n".join([*lines, f" {EMPTY}", *_facts(facts, width)])
    rows = table_lines(results)
    lines += _table(rows, HIDDEN_RESULTS, width)
    # Comparisons of methods with a diffusion model only.
    gains = [i for i, c in enumerate(results.comparisons) if uses_diffusion(c.row.method)]
    if gains:
        every = comparison_lines(results)
        lines += _table([every[i] for i in gains[:MAX_COMPARISONS]], HIDDEN_COMPARISONS, width)
    if len(gains) > MAX_COMPARISONS:
        more = len(gains) - MAX_COMPARISONS
        lines.append(f" {more} more differences: see `airsweep table`")
    notes = [
        *protocol_notes(results.rows),
        *(significance_notes(results.comparisons, marks=False) if gains else []),
    ]
    for note in [
        " ".join(classifier_notes(rows[0])),
        *notes,
        *choice_notes(results.rows),
        *collapse_notes(results),
    ]:
        lines += _wrap(note, width)
    worth = "\n".join(worth_sentences(results))
    facts = [*([("diffusion", worth)] if worth else []), *facts]
    return "\n".join([*lines, *_facts(facts, width)])


def _table(lines: Sequence[Mapping[str, str]], hidden: Sequence[str], width: int) -> list[str]:
    visible = [{name: line[name] for name in line if name not in hidden} for line in lines]
    return [f" {line}" for line in screen_lines(visible, width - 1)]


def _facts(facts: Sequence[tuple[str, str]], width: int) -> list[str]:
    """Texts next to their labels. Commands and paths are not broken."""
    labels = max((len(label) for label, _ in facts), default=0)
    lines = []
    for label, text in facts:
        lead = f"{label:<{labels}}   " if label else ""
        for part in text.splitlines():
            lines += _wrap(part, width, lead)
            lead = " " * len(lead)
    return lines


def _wrap(text: str, width: int, lead: str = "") -> list[str]:
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


def sweep_title(plan: Plan) -> str:
    """The name of a sweep and a description of its datasets."""
    datasets = sorted({slot.spec.dataset.name for slot in plan.slots})
    description = ", ".join(map(dataset_description, datasets))
    if all(slot.spec.paradigm == "ul" for slot in plan.slots):
        description += ", trained without labels"
    return f"airsweep {plan.sweep.name}   {description}"


def run_facts(plan: Plan, location: SweepLocation) -> list[tuple[str, str]]:
    """Facts about the last run as (label, text): images, trials, time, searches."""
    outcome = read_outcome(location)
    run = outcome.get("run", {})
    counts = sweep_status(location.event_log()).counts(
        alive=False, among={s.id for s in plan.slots}
    )
    parts = []
    if shares := run.get("shares", {}):
        groups = ", ".join(f"{name} {share:.0%}" for name, share in sorted(shares.items()))
        parts.append(f"CLIP recognises {groups} of the contact sheet")
    if run.get("drawn"):
        parts.append(
            f"{run['redrawn']} of {run['drawn'] + run['holes']} drawn in whole blocks were blank "
            f"and redrawn, {run['holes']} given up"
        )
    pruned = f"{counts['pruned']} pruned, " if counts["pruned"] else ""
    trials = (
        f"{plan.total}: {counts['done']} run, {counts['reused']} reused, {pruned}"
        f"{counts['failed']} failed{_image_usage(plan, location)}"
    )
    facts = [("images", "; ".join(parts)), ("trials", trials), ("time", _time(outcome, run))]
    facts.append(("search", "\n".join(_early_ends(plan, location))))
    return [(label, text) for label, text in facts if text]


def _time(outcome: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    walls = run.get("walls", {})
    if not walls:
        return ""
    parts = [
        f"{PHASES[stage]} {format_duration(walls[stage])}" for stage in PHASES if stage in walls
    ]
    rest = max(0.0, outcome["seconds"] - sum(walls.values()))
    overheads = run.get("overheads")
    overhead = (
        f"{sum(overheads) / len(overheads):.2f} s overhead per point on warm actors; "
        if overheads
        else ""
    )
    return (
        f"{format_duration(outcome['seconds'])}: {'  '.join(parts)}  "
        f"rest {format_duration(rest)}; {overhead}"
        f"peak {run.get('memory', 0) / 2**30:.1f} GiB"
    )


def _early_ends(plan: Plan, location: SweepLocation) -> list[str]:
    """One line per cell whose search ended early because of its `patience`."""
    search = plan.sweep.search
    if search is None or search.patience is None:
        return []
    history = read_searches(location.event_log())
    points_of = {cell.id: history.points(cell, search) for cell in plan.cells if cell.space}
    return [
        f"{cell}: ended after {points} of {search.points} points, "
        f"no improvement in the last {search.patience} or more"
        for cell, points in points_of.items()
        if points < search.points
    ]


PHASES = {
    "features": "features",
    "labels": "labels",
    "lora": "LoRA",
    "images": "images",
    "evidence": "evidence",
    "trials": "trials",
}


def _image_usage(plan: Plan, location: SweepLocation) -> str:
    """Counts of LoRAs and images in the store and of the trials that use them; empty: no images."""
    present = [
        requirement for requirement in plan.requirements if requirement.is_complete(location.store)
    ]
    rows = [
        (requirement.images, requirement.spec.images)
        for requirement in present
        if isinstance(requirement.spec, SyntheticFeaturesSpec)
    ]
    if not rows:
        return ""
    loras = sum(requirement.stage == "lora" for requirement in present)
    images = sum(count * len(spec.classnames) for count, spec in rows)
    readers = sum(normalised(slot.spec).images is not None for slot in plan.slots)
    return f"; {loras} LoRA and {images} images, made once, used by {readers} trials"


def next_steps(plan: Plan, location: SweepLocation) -> list[tuple[str, str]]:
    """Files to look at and commands to run next, as (label, text)."""
    sheet = location.folder / "contact_sheet.png"
    facts = []
    if sheet.exists():
        facts.append(("look", f"{relative_path(sheet)}"))
    arguments, store = _sweep_arguments(plan, location), _store_option(location, smoke=True)
    ui_store = _store_option(location, smoke=False)
    facts.append(("browse", f"airsweep ui{ui_store}  ->  http://127.0.0.1:5000"))
    left = f"{plural(plan.to_run, 'trial')} left to run" if plan.to_run else "nothing to do"
    if in_ray_job():
        facts.append(("again", f"submit it again with the same options: {left}"))
        return facts
    shared = location.store.name if is_bucket(location.store.name) else "/shared/runs"
    facts.append(("cluster", f"airsweep submit {arguments} --address $ADDR --store {shared}"))
    facts.append(("again", f"airsweep run {arguments}{store}: {left}"))
    return facts


def _sweep_arguments(plan: Plan, location: SweepLocation) -> str:
    """The sweep file and the options that select this sweep, for a command line."""
    words = [plan.sweep.source]
    with suppress(FileNotFoundError):
        origin = read_resolved(location)
        options = (origin.get("sets", []), origin.get("only", []), bool(origin.get("smoke")))
        words += map(shlex.quote, option_words(*options))
    return " ".join(words)


def _store_option(location: SweepLocation, *, smoke: bool) -> str:
    """The option `--store` for a command, empty if the command finds the store by default.

    Args:
        smoke: whether the command has the option --smoke, which selects the smoke store.
    """
    store = location.store
    usual = os.environ.get("AIRSWEEP_STORE") or "runs"
    if is_bucket(store.name):
        defaults = [usual, *([str(smoke_store(usual))] if smoke else [])]
        return "" if store.name in defaults else f" --store {shlex.quote(store.name)}"
    folder = store_folder(usual).absolute()
    folders = [folder, *([Path(f"{folder}-smoke")] if smoke else [])]
    return "" if store.root in folders else f" --store {relative_path(store.root)}"

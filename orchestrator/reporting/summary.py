"""Summary of a sweep's results and of its last run, for the closing screen and for trackers.

This module does not import torch.
"""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from air_core.specs import STAGES, SyntheticFeaturesSpec
from air_core.specs.normal import normalised
from orchestrator.environment import in_ray_job
from orchestrator.formatting import (
    aligned_table,
    format_duration,
    format_percent,
    plural,
    relative_path,
)
from orchestrator.planning import Plan, results_text
from orchestrator.planning.dataset_text import dataset_description, unused_by_dataset
from orchestrator.planning.requests import (
    last_origin,
    results_command,
    run_command,
    store_command,
    sweep_words,
)
from orchestrator.planning.resolve import REFS
from orchestrator.planning.studies import read_searches
from orchestrator.reporting._answers import answers
from orchestrator.reporting.results import SweepStatus, holes_text, plan_status
from orchestrator.reporting.rows import (
    EMPTY,
    Results,
    choice_notes,
    collapse_notes,
    is_bound,
    protocol_notes,
    significance_notes,
    untested_notes,
    uses_diffusion,
)
from orchestrator.reporting.selection import best_candidate
from orchestrator.reporting.tables import column_notes, comparison_lines, table_lines
from orchestrator.spec.sweep import split_name
from orchestrator.store import (
    SweepLocation,
    is_bucket,
    read_outcome,
    store_of_smoke,
)

MAX_COMPARISONS = 12
# Columns that the screen leaves out.
HIDDEN_RESULTS = ["n_test", "gain over host", "gain over control"]
HIDDEN_COMPARISONS = ["compared with", "p", "p corrected"]


def summary(
    title: str,
    results: Results,
    facts: Sequence[tuple[str, str]],
    *,
    width: int = 100,
    table: str = "airsweep table",
) -> str:
    """The screen at the end of a run, at most `width` columns wide.

    Args:
        title: name and data of the sweep; the paradigm and modality are appended.
        facts: (label, text) lines below the tables; an empty label for a plain line.
        width: of the terminal.
        table: the command that prints the whole table.
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
        lines.append(f" {more} more differences: see `{table}`")
    notes = [
        *protocol_notes(results),
        *significance_notes(results.comparisons, marks=False),
        *untested_notes([results.comparisons[i] for i in gains] or results.comparisons),
    ]
    for note in [
        " ".join(column_notes({*rows[0]} - {"pseudo-labels"})),
        *notes,
        *choice_notes(results.rows),
        *collapse_notes(results),
    ]:
        lines += _wrap(note, width)
    facts = [("answers", "\n".join(answers(results))), *facts]
    return "\n".join([*lines, *_facts(facts, width)])


def _table(lines: Sequence[Mapping[str, str]], hidden: Sequence[str], width: int) -> list[str]:
    visible = [{name: line[name] for name in line if name not in hidden} for line in lines]
    return [f" {line}" for line in aligned_table(visible, width - 1)]


def _facts(facts: Sequence[tuple[str, str]], width: int) -> list[str]:
    """Texts next to their labels. Commands and paths are not broken."""
    facts = [(label, text) for label, text in facts if text]
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
    tested = {slot.spec.test_dataset and slot.spec.test_dataset.name for slot in plan.slots}
    if len(tested) == 1 and (name := tested.pop()):  # of several, the table has a column
        description += f", tested on {dataset_description(name)}"
    return f"airsweep {plan.sweep.name}   {description}"


def run_facts(plan: Plan, location: SweepLocation) -> list[tuple[str, str]]:
    """Facts about a sweep and about its last run, as (label, text)."""
    outcome = read_outcome(location)
    run = outcome.get("run", {})
    status = plan_status(plan, location)
    counts = status.counts(alive=False)
    shares = ", ".join(
        f"{name} {share:.0%}" for name, share in sorted(run.get("shares", {}).items())
    )
    pruned = f"{counts['pruned']} pruned, " if counts["pruned"] else ""
    trials = (
        f"{plan.total}: {results_text(counts)}, {pruned}"
        f"{counts['failed']} failed{_image_usage(plan, location)}"
    )
    return [
        ("images", f"CLIP recognises {shares} of the contact sheet" if shares else ""),
        ("not used", "\n".join(unused_lines(plan, location, status))),
        ("trials", trials),
        ("last run", "\n".join(_last_run(outcome, run, status))),
        ("search", "\n".join(_early_ends(plan, location))),
    ]


def unused_lines(plan: Plan, location: SweepLocation, status: SweepStatus) -> list[str]:
    """Real and synthetic images that no trial reads: a line for each dataset, one for holes."""
    unused = unused_by_dataset((slot.spec for slot in plan.slots), location.store)
    lines = [f"{name}: {images}" for name, images in unused.items()]
    return [*lines, *filter(None, [holes_text(status.images, status.hole_files)])]


def _last_run(
    outcome: Mapping[str, Any], run: Mapping[str, Any], status: SweepStatus
) -> Iterator[str]:
    """Lines on the work of the last run."""
    if run.get("walls"):
        drawn = ""
        if run["drawn"] + run["holes"]:
            drawn = (
                f", drew {run['drawn']} images in whole blocks "
                f"({run['redrawn']} redrawn, {run['holes']} given up)"
            )
        yield f"computed {plural(status.last_run['done'], 'trial')}{drawn}"
        yield _time(outcome, run)


def _time(outcome: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    walls = run["walls"]
    parts = [
        f"{PHASES[stage]} {format_duration(walls[stage])}" for stage in PHASES if stage in walls
    ]
    rest = max(0.0, outcome["seconds"] - sum(walls.get(stage, 0.0) for stage in PHASES))
    overheads = run.get("overheads")
    overhead = (
        f"{sum(overheads) / len(overheads):.2f} s overhead per point on warm actors; "
        if overheads
        else ""
    )
    measured = f" of the {run['memory_of']}" if run.get("memory_of") else ""
    return (
        f"{format_duration(outcome['seconds'])}: {'  '.join(parts)}  "
        f"rest {format_duration(rest)}; {overhead}"
        f"peak{measured} {run.get('memory', 0) / 2**30:.1f} GiB"
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


PHASES = {spec.stage: spec.stage for spec in STAGES} | {"lora": "LoRA"}


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
    return f"; {loras} LoRA and {images} images, made once, used by {plural(readers, 'trial')}"


def next_steps(plan: Plan, location: SweepLocation) -> list[tuple[str, str]]:
    """Files to look at and commands to run next, as (label, text)."""
    sheet = location.folder / "contact_sheet.png"
    facts = []
    if sheet.exists():
        facts.append(("look", f"{relative_path(sheet)}"))
    origin = last_origin(location)
    if origin.get("smoke"):
        facts.append(("table", results_command("table", location)))
    facts.append(("browse", f"{store_command('ui', location)}  ->  http://127.0.0.1:5000"))
    left = f"{plural(plan.to_run, 'trial')} left to run" if plan.to_run else "nothing to do"
    if in_ray_job():
        facts.append(("again", f"submit it again with the same options: {left}"))
        return facts
    shared = location.store.name if is_bucket(location.store.name) else "/shared/runs"
    if origin.get("smoke") and is_bucket(shared):
        shared = store_of_smoke(shared)
    words = ["airsweep", "submit", *sweep_words(location, origin)]
    submit = f"{shlex.join(words)} --address $ADDR --store {shared}"
    if relative := _relative_folder(plan):
        submit = f"airsweep submit needs an absolute path that all nodes have instead of {relative}"
    facts.append(("cluster", submit))
    facts.append(("again", f"{run_command(location)}: {left}"))
    return facts


def export_step(results: Results, location: SweepLocation) -> list[tuple[str, str]]:
    """The classifier that `airsweep export best` selects and the command, as (label, text)."""
    rows = [row for row in results.rows if not is_bound(row.method)]
    if len(results.tasks) != 1 or not rows:
        return []
    try:
        best = best_candidate(results, rows)
    except ValueError:  # no measure that needs no test labels
        return []
    accuracy = results.mean(best.row, f"test/accuracy_{best.classifier}")
    tested = "" if accuracy is None else f"; test accuracy {format_percent(accuracy)} %"
    command = results_command("export best --sweep", location, "-o", "bundle")
    return [("best", f"{best}{tested}\n{command}")]


def _relative_folder(plan: Plan) -> str | None:
    """A relative path to images or a model of the sweep; None if it has none."""
    located = plan.sweep.folders
    names = (str(cell.flat.get(key)) for cell in plan.cells for key in REFS)
    folders = (name for name in names if name in located or name.startswith("folder:"))
    paths = {name: split_name(located.get(name, name))[1] for name in folders}
    return next((name for name, path in paths.items() if path[0] != "/"), None)

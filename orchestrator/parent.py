"""A sweep as a tracker shows it: the parent of its trials, and what is said at its end."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.children import FilesOnDemand
from orchestrator.closing import facts_of, title_of
from orchestrator.figures import pictures
from orchestrator.place import DONE, FAILED, Place
from orchestrator.plan import plan_sweep
from orchestrator.points import point_runs
from orchestrator.report import (
    EMPTY,
    Entry,
    Results,
    Row,
    choice_notes,
    comparisons,
    counted,
    mean_std,
    signed_interval,
    worlds_of,
)
from orchestrator.resolve import text_digest
from orchestrator.results import entries_of, finished, rows_of
from orchestrator.summary import MOST, MethodLine, difference_lines, headline_of, method_lines
from orchestrator.sweep import SweepSpec
from orchestrator.tracking import PointRun, Status, SweepRun, image, link

SHEET, SMALL = "contact_sheet.png", "contact_sheet_small.png"
WIDTH_PX = 700  # of pictures in a note: MLflow shows them as they are and cuts off the rest
SHOWN = 20  # rows of a note: a tag holds 8,000 characters, and a row is up to 200


@dataclass(frozen=True)
class Ending:
    """What a tracker is told when a run of a sweep is over."""

    note: str  # Markdown
    files: Mapping[str, Path]
    points: Sequence[PointRun]


def status_of(code: int | None) -> Status:
    """An exit code as the state of a parent; None: the driver was killed."""
    return "FINISHED" if code == DONE else "FAILED" if code == FAILED else "KILLED"


def parent_of(sweep: SweepSpec, place: Place, made: Mapping[str, Any]) -> SweepRun:
    """A sweep as a tracker's parent.

    Args:
        made: who runs it, and with which code: user, commit.
    """
    return SweepRun(
        sweep=place.name,
        project=place.project,
        spec_hash=text_digest(sweep.text),
        note=sweep.question,
        user=made["user"],
        commit=made["commit"],
        source=f"airsweep run {sweep.source}",
    )


def ending_of(sweep: SweepSpec, place: Place, folder: Path) -> Ending:
    """How a sweep stands, from ledger and store.

    Args:
        folder: for charts.
    """
    place = replace(place, recorded=True)
    plan = plan_sweep(sweep, place.store, place.resolver(), place.ledger())
    done = finished(plan, place.store)
    entries = entries_of(plan, place.store, done)
    found = rows_of(plan, entries)
    kept = sweep_files(place)
    makers = pictures(found, entries)
    if SHEET in kept:
        makers[SMALL] = lambda: _small(kept[SHEET])
    drawn = FilesOnDemand(folder / "charts", makers)
    files = {**{name: drawn[name] for name in drawn}, **kept}
    about = list(_about(title_of(plan), found, entries, list(drawn)))
    facts = facts_of(plan, place)
    about += ["\n".join(f"- **{label}**: {_plain(text)}" for label, text in facts)]
    note = "\n\n".join([*filter(None, about), sweep.question])
    return Ending(note, files, point_runs(sweep, done))


def sweep_files(place: Place) -> dict[str, Path]:
    """What a sweep's folder has for people: sheet, audit cards, code that was not committed."""
    found = [place.folder / SHEET]
    found += [
        file for like in ("audit-*", "uncommitted-*.diff") for file in place.folder.glob(like)
    ]
    return {file.name: file for file in sorted(found) if file.exists()}


def _small(sheet: Path) -> bytes:
    from orchestrator.pictures import smaller  # heavy

    return smaller(sheet, WIDTH_PX)


# ---------------------------------------------------------------- the closing screen as Markdown


def _about(
    title: str, found: Sequence[Row], entries: Sequence[Entry], pictures: Sequence[str]
) -> Iterator[str]:
    """The answer first, since long notes are folded; tables, pictures, differences."""
    bold = f"**{_plain(' '.join(title.split()))}**"
    if not found:
        yield f"{bold}\n{EMPTY.capitalize()}."
        return
    results = Results(found, entries)
    worlds = worlds_of(found)
    tables = {
        world: method_lines([row for row in found if row.world == world], results, entries)
        for world in worlds
    }
    yield "\n".join([bold, *(_best(*tables[world], many=len(worlds) > 1) for world in worlds[:3])])
    left = SHOWN
    for (dataset, paradigm, modality), (baseline, lines) in tables.items():
        if left:
            yield f"{dataset}, {paradigm}/{modality}" if len(worlds) > 1 else ""
            yield _table(lines[:left], baseline)
        left = max(0, left - len(lines))
    if len(found) > SHOWN:
        yield f"{len(found) - SHOWN} more rows: `airsweep table`."
    all_of = f"All {link('settings', 'runs', 'point')} ({link('in charts', 'charts', 'point')})"
    yield f"{all_of}, all {link('trials', 'runs', 'trial')}."
    yield "\n\n".join(_picture(name) for name in pictures)
    differences = difference_lines(comparisons(found, entries), many=len(worlds) > 1)[:MOST]
    yield "\n".join(
        f"- {_plain(label)}: {_plain(' '.join(text.split()))}" for label, text in differences
    )
    yield _plain(" ".join(choice_notes(found)))


def _picture(name: str) -> str:
    if name == SMALL:
        return f"{image('contact sheet', SMALL)}\n{link('at full size', 'file', SHEET)}"
    return image(name.partition(".")[0].replace("_", " "), name)


def _best(baseline: str, lines: Sequence[MethodLine], *, many: bool) -> str:
    """The row with the highest mean, in a sentence."""
    best = max(lines, key=lambda line: line.row.mean)
    row = best.row
    where = f"{row.dataset}, {row.paradigm}/{row.modality}: " if many else ""
    with_settings = f" ({best.settings})" if best.settings else ""
    gain = f", {signed_interval(best.gain)} over {baseline}" if best.gain else ""
    return _plain(
        f"{where}{row.method}{with_settings} has the highest mean {headline_of(row)}: "
        f"{mean_std(row, '±')} %{gain}"
    )


def _table(lines: Sequence[MethodLine], baseline: str) -> str:
    """Each method with a link to its runs; the best in bold."""
    best = max(line.row.mean for line in lines)
    columns = [
        ("method", "---", [line.row.method for line in lines]),
        (
            f"{headline_of(lines[0].row)}, %",
            "---:",
            [_bold(mean_std(line.row, "±"), line.row.mean == best) for line in lines],
        ),
        ("runs", "---:", [_runs(line.row) for line in lines]),
        (
            f"gain over {baseline}, 95 %",
            "---",
            [signed_interval(line.gain) if line.gain else "" for line in lines],
        ),
        (
            "pseudo-labels right, %",
            "---:",
            ["" if line.right is None else f"{100 * line.right:.0f}" for line in lines],
        ),
        ("settings", "---", [_plain(line.settings) for line in lines]),
    ]
    kept = [column for column in columns if any(column[2])]
    body = zip(*(cells for *_, cells in kept), strict=True)
    table = [[name for name, *_ in kept], [rule for _, rule, _ in kept], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in table)


def _runs(row: Row) -> str:
    return link(counted(row.n, "run"), "point", f"{row.cell}/{row.point}")


def _bold(text: str, bold: bool) -> str:
    return f"**{text}**" if bold else text


def _plain(text: str) -> str:
    """
    >>> print(_plain("zero_shot | a*b"))
    zero_shot \\| a\\*b
    """
    return re.sub(r"([*|])", r"\\\1", text)

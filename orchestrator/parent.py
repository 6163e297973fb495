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
from orchestrator.layouts import Layout, markdown
from orchestrator.place import DONE, FAILED, Place
from orchestrator.plan import plan_sweep
from orchestrator.points import point_runs
from orchestrator.report import (
    EMPTY,
    Entry,
    Row,
    choice_notes,
    comparisons,
    counted,
    headline,
    mean_std,
    settings_text,
    world_text,
    worlds_of,
)
from orchestrator.resolve import text_digest
from orchestrator.results import entries_of, finished, rows_of
from orchestrator.summary import MOST, difference_lines
from orchestrator.sweep import SweepSpec
from orchestrator.tables import laid_out
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
    worlds, gains = worlds_of(found), comparisons(found, entries)
    yield "\n".join([bold, *(_best(found, world) for world in worlds[:3])])
    layout = laid_out(found, entries, gains)
    frame = layout.frame.assign(n=[_runs(row) for row in found]).head(SHOWN)
    bold_cells = frozenset((line, column) for line, column in layout.bold if line < SHOWN)
    yield markdown(Layout(frame=frame, bold=bold_cells))
    if len(found) > SHOWN:
        yield f"{len(found) - SHOWN} more rows: `airsweep table`."
    all_of = f"All {link('settings', 'runs', 'point')} ({link('in charts', 'charts', 'point')})"
    yield f"{all_of}, all {link('trials', 'runs', 'trial')}."
    yield "\n\n".join(_picture(name) for name in pictures)
    yield "\n".join(
        f"- {_plain(label)}: {_plain(text)}" for label, text in difference_lines(gains)[:MOST]
    )
    yield _plain(" ".join(choice_notes(found)))


def _picture(name: str) -> str:
    if name == SMALL:
        return f"{image('contact sheet', SMALL)}\n{link('at full size', 'file', SHEET)}"
    return image(name.partition(".")[0].replace("_", " "), name)


def _best(found: Sequence[Row], world: tuple[str, str, str]) -> str:
    """The row with the highest mean, in a sentence."""
    row = max((row for row in found if row.world == world), key=lambda row: row.mean)
    settings = settings_text(row, row.settings)
    name = f"{row.method} ({settings})" if settings else row.method
    accuracy = f"{headline([row])}: {mean_std(row)}"
    return _plain(f"{world_text(world)}: {name} has the highest mean {accuracy}")


def _runs(row: Row) -> str:
    return link(counted(row.n, "run"), "point", f"{row.cell}/{row.point}")


def _plain(text: str) -> str:
    """
    >>> print(_plain("zero_shot | a*b"))
    zero_shot \\| a\\*b
    """
    return re.sub(r"([*|])", r"\\\1", text)

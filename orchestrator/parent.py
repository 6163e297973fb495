"""A sweep as a tracker shows it: the parent of its trials."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.place import DONE, FAILED, Place
from orchestrator.plan import plan_sweep
from orchestrator.report import rows
from orchestrator.resolve import text_digest
from orchestrator.results import entries_of
from orchestrator.sweep import SweepSpec
from orchestrator.tables import table
from orchestrator.tracking import Status, SweepRun


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


def note_of(sweep: SweepSpec, place: Place) -> str:
    """The parent's note: the table first, since long notes are folded; then the question."""
    plan = plan_sweep(sweep, place.store, place.resolver(), place.ledger())
    entries = entries_of(plan, place.store)
    found = rows(entries, sweep.search.objective if sweep.search else None)
    return f"{table(found, 'md', entries=entries)}\n\n{sweep.question}"


def sweep_files(place: Place) -> dict[str, Path]:
    """What a tracker's parent shows: contact sheet, audit cards, code that was not committed."""
    found = [place.folder / "contact_sheet.png"]
    found += [
        file for like in ("audit-*", "uncommitted-*.diff") for file in place.folder.glob(like)
    ]
    return {file.name: file for file in sorted(found) if file.exists()}

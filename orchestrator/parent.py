"""A sweep as a run of a tracker, and the note with its answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

from orchestrator.charts import pictures
from orchestrator.place import DONE, FAILED, Place
from orchestrator.plan import Plan
from orchestrator.report import Results, mean_std, settings_text
from orchestrator.resolve import text_digest
from orchestrator.summary import facts_of, summary, title_of
from orchestrator.sweep import SweepSpec
from orchestrator.tracking import Status, SweepRun

WORLDS = 3  # with a sentence of their own in a note


def status_of(code: int | None) -> Status:
    """An exit code as the status of a run; None: the driver was killed."""
    return "FINISHED" if code == DONE else "FAILED" if code == FAILED else "KILLED"


def parent_of(sweep: SweepSpec, place: Place, made: Mapping[str, Any]) -> SweepRun:
    """A sweep as a run.

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


def note_and_files(
    plan: Plan, place: Place, results: Results, run_id: str
) -> tuple[str, dict[str, bytes]]:
    """What MLflow shows of a sweep: Markdown with the answer, and charts and files.

    Args:
        run_id: of the sweep's run, whose files the note shows.
    """
    charts = pictures(results)
    screen = summary(title_of(plan), results, facts_of(plan, place))
    note = [
        "\n".join(_best(results)),  # first, since long notes are folded
        *(_picture(name, run_id) for name in charts),
        plan.sweep.question,
        f"```\n{screen}\n```",
    ]
    # Of the sweep's folder: contact sheet, audit cards, code that was not committed.
    patterns = ("contact_sheet.png", "audit-*", "uncommitted-*.diff")
    kept = [file for pattern in patterns for file in place.folder.glob(pattern)]
    files = charts | {file.name: file.read_bytes() for file in kept}
    return "\n\n".join(filter(None, note)), files


def _best(results: Results) -> Iterator[str]:
    """The row with the highest mean of each world, in a sentence."""
    for world in results.worlds[:WORLDS]:
        row = results.best(world)
        settings = settings_text(row, row.settings)
        with_settings = f" ({settings})" if settings else ""
        yield (
            f"{row.dataset}, {row.paradigm}/{row.modality}: **{row.method}**{with_settings} has "
            f"the highest mean test {row.metric.replace('_', ' ')}: {mean_std(row)} %\n"
        )


def _picture(name: str, run_id: str) -> str:
    # Relative, so that it is found wherever MLflow's pages are reached.
    title = name.partition(".")[0].replace("_", " ")
    return f"![{title}](get-artifact?path={quote(name)}&run_uuid={run_id})"

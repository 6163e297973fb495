"""The report of a sweep: one self-contained HTML file, with the same bytes for the same data.

Each section is a function from `ReportData` to groups of charts and tables. Sections without groups
are left out.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from air_core.datasets.images import open_image
from orchestrator.formatting import format_percent, plural
from orchestrator.planning.ledger import Ledger
from orchestrator.planning.requests import results_command, run_command
from orchestrator.reporting import charts
from orchestrator.reporting._layouts import Layout
from orchestrator.reporting._statistics import Array
from orchestrator.reporting.comparisons import MARKS, Results
from orchestrator.reporting.notes import answers, headlines, splits_and_seeds
from orchestrator.reporting.rows import row_text
from orchestrator.reporting.summary import data_text, run_facts
from orchestrator.reporting.tables import (
    column_notes,
    difference_layouts,
    points_layouts,
    table_layout,
)
from orchestrator.stages.dataset_text import image_files
from orchestrator.store import SweepLocation, read_outcome, read_trial

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATE = Path(__file__).with_name("templates") / "report.html"
SHOWN_CLASSES, THUMB_PX = 20, 56
MAX_TASKS = 12  # with learning curves and confusion matrices
READING = "Further right is better; a row whose interval reaches chance is no better than guessing."


@dataclass(frozen=True)
class ReportData:
    """A sweep with its results."""

    location: SweepLocation
    ledger: Ledger
    results: Results


def page(ledger: Ledger, location: SweepLocation, results: Results) -> str:
    """The report of a sweep as HTML.

    It depends only on the sweep's event log, records and pictures, and contains no time of its
    creation.

    Raises:
        ValueError: the sweep has no finished trial.
    """
    from jinja2 import Environment, StrictUndefined

    if not results.trials:
        raise ValueError(
            f"sweep {location.full_name} has no finished trial to report "
            f"({ledger.total} are planned); run `{run_command(location)}`, or see its status with "
            f"`{results_command('status', location)}`"
        )
    data = ReportData(location, ledger, results)
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    groups = {name: [*section(data)] for name, section in SECTIONS.items()}
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=ledger.about.name,
        description=_description(data),
        question=re.split(r"\n\s*\n", ledger.about.question.strip()),
        sections={name: of_section for name, of_section in groups.items() if of_section},
        footer=f"airsweep {version('airsweep')}, sweep {location.full_name}, "
        f"{len(results.trials)} results.",
    )
    return text + "\n"


def _description(data: ReportData) -> str:
    """What was run, which can differ from what the comment of the sweep file says."""
    methods = plural(len({row.method for row in data.results.rows}), "method")
    runs = f", {splits_and_seeds(data.results.rows)}" if data.results.rows else "."
    return f"{data_text(data.ledger)}; {methods}, {plural(data.ledger.total, 'trial')}{runs}"


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image that is embedded in the page."""

    src: str  # a data: URL
    alt: str
    caption: str = ""
    wide: bool = False


@dataclass(frozen=True, kw_only=True)
class Group:
    """A part of a section: sentences, figures and tables, side by side where the page is wide."""

    heading: str = ""
    texts: Sequence[str] = ()
    figures: Sequence[Picture] = ()
    tables: Sequence[Layout] = ()
    details: Sequence[tuple[str, str]] = ()  # (title, text) of collapsible texts


def _chart(figure: Figure, alt: str, caption: str = "") -> Picture:
    src = _data("image/svg+xml", charts.svg(figure).encode())
    return Picture(src=src, alt=alt, caption=caption)


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


# ---------------------------------------------------------------- accuracy


def answer(data: ReportData) -> Iterator[Group]:
    """Answers and the state of the sweep, beside the picture of all rows."""
    results = data.results
    figures = []
    if results.tested:
        alt = f"Accuracy of {len(results.rows)} rows with intervals and chance"
        figures = [_chart(charts.accuracy(results), alt, READING)]
    facts = [(label, text) for label, text in run_facts(data.ledger, data.location) if text]
    texts = [
        *headlines(results),
        *answers(results),
        *(f"{label.capitalize()} {text}." for label, text in facts),
    ]
    yield Group(texts=texts, figures=figures)
    yield from unlabelled(data)


def unlabelled(data: ReportData) -> Iterator[Group]:
    """Unlabelled images by the class that the best classifier of a task predicts."""
    for task, best in data.results.best_classifiers.items():
        slot = next(slot for slot in data.ledger.slots if slot.key.digest == best.trial.key)
        arrays = read_trial(slot.key, data.location.store).pool_arrays()
        if not arrays or any(name.startswith("pool/accuracy") for name in best.trial.metrics):
            continue
        predicted = arrays[best.classifier]
        confidence = arrays[f"probability_{best.classifier}"].astype(float)
        of = data.ledger.data[slot.cell.flat["dataset"]]
        files = image_files(of.ref.name, data.location.data_root)
        if len(files) != of.ref.images:  # the positions are of another folder's images
            files = ()
        lines, figures, names = [], [], of.classnames
        counts = np.bincount(predicted, minlength=len(names))
        for c in np.argsort(-counts, kind="stable")[:SHOWN_CLASSES]:
            of_class = np.flatnonzero(predicted == c)
            of_class = of_class[np.argsort(-confidence[of_class], kind="stable")]
            mean = format_percent(confidence[of_class].mean()) if len(of_class) else ""
            images = f"{len(of_class):,}"
            share = format_percent(len(of_class) / len(predicted))
            lines.append({"class": names[c], "images": images, "share": share, "confidence": mean})
            if files and len(of_class):
                ends = arrays["index"][[*of_class[:4], *of_class[4:][-4:]]]
                figures.append(_strip([files[i] for i in ends], f"{names[c]}: {images} images"))
        after = f"label a sample, {results_command('sample', data.location)}"
        if best.row.is_tested:
            after = results_command("export best --sweep", data.location, "-o", "bundle")
        texts = [
            f"{best.classifier.capitalize()} classifier of "
            f"{row_text(best.row)}; {len(predicted):,} images, of "
            f"{np.count_nonzero(counts)} of {plural(len(names), 'class')}.",
            f"Confidence does not tell how often the classifier is right. Next: {after}.",
        ]
        note = "Share of the images and mean confidence, in %; the most frequent classes first."
        tables = [Layout(lines=lines, notes=[note])]
        yield Group(heading=data.results.task_text(task), texts=texts, tables=tables)
        shown = "Of each class the four surest images, then the four least sure ones."
        yield Group(texts=[shown] if figures else [], figures=figures)


def _strip(files: Sequence[Path], caption: str) -> Picture:
    """Images side by side."""
    from PIL import Image, ImageOps

    strip = Image.new("RGB", (8 * (THUMB_PX + 2), THUMB_PX), "white")
    for k, file in enumerate(files):
        with suppress(ValueError, OSError):  # unreadable or gone
            thumbnail = ImageOps.fit(open_image(file), (THUMB_PX, THUMB_PX))
            strip.paste(thumbnail, (k * (THUMB_PX + 2), 0))
    content = io.BytesIO()
    strip.save(content, "JPEG", quality=85)
    return Picture(src=_data("image/jpeg", content.getvalue()), alt=caption, caption=caption)


def table(data: ReportData) -> Iterator[Group]:
    """All rows, as in `airsweep table`; the next section has their differences."""
    layout = table_layout(data.results, [f"gain over {role}" for role in MARKS])
    points = [replace(each, notes=each.caption) for each in points_layouts(data.results)]
    notes = ("Notes on the table", "\n".join(layout.caption))
    meanings = [] if data.results.tested else column_notes(layout.columns)
    yield Group(texts=meanings, tables=[layout, *points], details=[notes])


def differences(data: ReportData) -> Iterator[Group]:
    """Each comparison of two rows, as in `airsweep table`."""
    for layout in difference_layouts(data.results, data.results.all_comparisons):
        figure = _chart(charts.differences(data.results), "Differences with intervals, line at 0")
        notes = [("Notes on the tests", "\n".join(layout.notes))] if layout.notes else []
        yield Group(figures=[figure], tables=[replace(layout, notes=())], details=notes)


def by_setting(data: ReportData) -> Iterator[Group]:
    """Accuracy against each numeric setting of the grid."""
    figures = [
        _chart(figure, f"Accuracy against {key}")
        for key in charts.numeric_settings(data.results)
        if (figure := charts.by_setting(data.results, key))
    ]
    if figures:
        yield Group(figures=figures)


# ---------------------------------------------------------------- curves, images, classes


def learning_curves(data: ReportData) -> Iterator[Group]:
    """Accuracy and coverage of the pseudo-labels by iteration."""
    for task in data.results.tasks[:MAX_TASKS]:
        of_task = [row for row in data.results.rows if row.task == task]
        figures = [
            _chart(figure, f"By iteration: {title}")
            for metric, (_, title) in charts.PSEUDO.items()
            if (figure := charts.pseudo_labels(data.results, of_task, metric))
        ]
        if figures:
            if len(figures) < len(charts.PSEUDO):
                figures[-1] = replace(figures[-1], caption="Their accuracy needs labels.")
            yield Group(heading=data.results.task_text(task), figures=figures)


def images(data: ReportData) -> Iterator[Group]:
    """The contact sheet."""
    sheet = data.location.folder / "contact_sheet.png"
    # Of an earlier run, if no trial of this one reads images.
    if data.ledger.about.reads_images and sheet.exists() and sheet.stat().st_size:
        shares = read_outcome(data.location).get("run", {}).get("shares", {})
        by_group = ", ".join(f"{name} {share:.0%}" for name, share in sorted(shares.items()))
        caption = f"Zero-shot CLIP recognises {by_group}." if by_group else ""
        alt = "Real images, images of the base model and images with LoRA, one class per row"
        src = _data("image/png", sheet.read_bytes())
        yield Group(figures=[Picture(src=src, alt=alt, caption=caption, wide=True)])


def confusions(data: ReportData) -> Iterator[Group]:
    """Confusion matrix and most frequent confusions of the best classifier of each task."""
    results = data.results
    for task in results.tasks[:MAX_TASKS]:
        best = results.best_classifiers.get(task)
        if best is None or best.test is None:
            continue
        slot = next(slot for slot in data.ledger.slots if slot.cell.id == best.row.cell)
        classes = data.ledger.tested(slot).classnames
        names = [name.replace("_", " ") for name in classes]
        matrices = (
            charts.confusion(trial.labels, trial.by_classifier[best.classifier], len(names))
            for trial in best.row.trials.values()
        )
        matrix = np.sum([*matrices], axis=0)
        title = f"{best.classifier} classifier of {row_text(best.row)}"
        figure = charts.heatmap(matrix, names, title)
        lines = [
            {"class": true, "predicted": wrong, "share of the class": f"{share:.0%}"}
            for true, wrong, share in frequent_confusions(matrix, names)
        ]
        yield Group(
            heading=data.results.task_text(task),
            figures=[_chart(figure, f"Confusion matrix of the {title}")],
            tables=[Layout(lines=lines)] if lines else [],
        )


def frequent_confusions(
    matrix: Array, names: Sequence[str], most: int = 5
) -> Iterator[tuple[str, str, float]]:
    """The most frequent confusions: true class, wrongly predicted class, share of the true class.

    Args:
        matrix: (C, C) counts by true class (rows) and predicted class (columns).

    Yields:
        The largest shares first; shares are in [0, 1].
    """
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    np.fill_diagonal(shares, 0)
    for flat in np.argsort(-shares, axis=None, kind="stable")[:most]:
        true, wrong = np.unravel_index(flat, shares.shape)
        if shares[true, wrong] > 0:
            yield names[true], names[wrong], float(shares[true, wrong])


# By anchor; the template has their titles and texts.
SECTIONS: dict[str, Callable[[ReportData], Iterator[Group]]] = {
    "answer": answer,
    "table": table,
    "differences": differences,
    "settings": by_setting,
    "curves": learning_curves,
    "images": images,
    "confusion": confusions,
}

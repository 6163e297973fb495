"""The report of a sweep: one self-contained HTML file, with the same bytes for the same data.

Each section is a function from `ReportData` to groups of charts and tables. Sections without groups
are left out.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pandas import DataFrame

from air_core.datasets.images import open_image
from air_core.methods import METHODS
from air_core.specs import EvidenceSettings
from orchestrator.formatting import format_percent, format_value, plural
from orchestrator.planning import Plan, plan_of
from orchestrator.planning.dataset_text import image_files, tested_classes, unused_by_dataset
from orchestrator.planning.plan import RESULT_STATES, results_text
from orchestrator.planning.requests import results_command, run_command
from orchestrator.reporting import charts
from orchestrator.reporting._layouts import Layout, drop_empty_columns
from orchestrator.reporting._statistics import Array
from orchestrator.reporting.answers import answers, headlines
from orchestrator.reporting.results import SweepStatus, plan_status, results_of
from orchestrator.reporting.rows import (
    UNTESTED,
    Results,
    Row,
    Task,
    row_text,
    rows,
    significance_notes,
    splits_and_seeds,
    task_text,
)
from orchestrator.reporting.summary import data_text, unused_lines
from orchestrator.reporting.tables import comparison_lines, table_layout
from orchestrator.spec import SweepSpec
from orchestrator.store import SweepLocation, read_outcome, read_trial

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATE = Path(__file__).with_name("templates") / "report.html"
MAX_TASKS = 12  # with pseudo-label curves and confusion matrices
MAIN_WIDTH = 4.6  # of the first chart, in inches of 96 px


@dataclass(frozen=True)
class ReportData:
    """A sweep with its plan, results and status."""

    sweep: SweepSpec
    location: SweepLocation
    plan: Plan
    results: Results
    status: SweepStatus


def page(sweep: SweepSpec, location: SweepLocation) -> str:
    """The report of a sweep as HTML.

    It depends only on the sweep's event log, records and pictures, and contains no time of its
    creation.

    Raises:
        ValueError: the sweep has no finished trial.
    """
    from jinja2 import Environment, StrictUndefined

    plan = plan_of(sweep, location)
    results = results_of(plan, location.store)
    if not results.trials:
        raise ValueError(
            f"sweep {location.full_name} has no finished trial to report "
            f"({plan.total} are planned); run `{run_command(location)}`, or see its status with "
            f"`{results_command('status', location)}`"
        )
    data = ReportData(sweep, location, plan, results, plan_status(plan, location))
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    sections = [
        {"id": name, "title": title, "text": text, "groups": groups}
        for name, title, text, section in SECTIONS
        if (groups := list(section(data)))
    ]
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=sweep.name,
        description=_description(data),
        question=re.split(r"\n\s*\n", sweep.question.strip()),
        sections=sections,
        footer=f"airsweep {_version()}, sweep {location.full_name}, {len(results.trials)} results.",
    )
    return text + "\n"


def _description(data: ReportData) -> str:
    """What was run, which can differ from what the comment of the sweep file says."""
    methods = plural(len({row.method for row in data.results.rows}), "method")
    runs = f", {splits_and_seeds(data.results.rows)}" if data.results.rows else "."
    return f"{data_text(data.plan)}; {methods}, {plural(data.plan.total, 'trial')}{runs}"


def _version() -> str:
    try:
        return version("airsweep")
    except PackageNotFoundError:  # a checkout on PYTHONPATH without installation
        return "(not installed)"


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image that is embedded in the page."""

    src: str  # a data: URL
    alt: str
    caption: str = ""
    wide: bool = False


@dataclass(frozen=True, kw_only=True)
class Group:
    """A part of a section."""

    heading: str = ""
    texts: Sequence[str] = ()
    figures: Sequence[Picture] = ()
    tables: Sequence[Layout] = ()
    details: Sequence[tuple[str, str]] = ()  # (title, text) of collapsible texts


def _chart(figure: Figure, alt: str, wide: bool = False) -> Picture:
    return Picture(src=_data("image/svg+xml", charts.svg(figure).encode()), alt=alt, wide=wide)


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _tables(lines: Sequence[Mapping[str, str]], note: str = "") -> list[Layout]:
    """A list of one table, or an empty list without lines."""
    frame = DataFrame(drop_empty_columns(lines))
    return [Layout(frame=frame, notes=[note] if note else [])] if lines else []


# ---------------------------------------------------------------- accuracy


def answer(data: ReportData) -> Iterator[Group]:
    """The picture of all rows below its headline, answers, and the state of the sweep."""
    results = data.results
    figures = []
    if results.tested:
        alt = f"Accuracy of {len(results.rows)} rows with intervals"
        figures = [_chart(charts.accuracy(results, width=MAIN_WIDTH), alt, wide=True)]
    yield Group(texts=headlines(results), figures=figures)
    unused = unused_lines(data.plan, data.location, data.status)
    not_used = [f"Not used: {line}." for line in unused]
    yield Group(texts=[*answers(results), _state(data), *not_used])
    files = _unused_files(data)
    if files:
        yield Group(details=[("Images that were not used", "\n".join(files))])


def _unused_files(data: ReportData) -> list[str]:
    """Names of unused images; of unreadable ones with the reason."""
    unused = unused_by_dataset((slot.spec for slot in data.plan.slots), data.location.store)
    files = [f"{file}  {why}" for images in unused.values() for file, why in images.files.items()]
    return [*files, *(f"{file}  synthetic" for file in data.status.hole_files)]


def _state(data: ReportData) -> str:
    counts = data.status.counts(alive=False)
    left = {state: counts[state] for state in ("waiting", "failed") if counts[state]}
    done = sum(counts[state] for state in RESULT_STATES)
    text = f"{plural(done, 'trial')} of {data.plan.total} have a result: {results_text(counts)}"
    if left:
        text += "; " + ", ".join(f"{count} {state}" for state, count in left.items())
    return f"{text}." if data.results.tested else f"{text}. {UNTESTED}"


def table(data: ReportData) -> Iterator[Group]:
    """All rows, as in `airsweep table`."""
    layout = table_layout(data.results)
    yield Group(tables=[layout], details=[("Notes on the table", "\n".join(layout.caption))])


def by_setting(data: ReportData) -> Iterator[Group]:
    """Accuracy against each numeric setting that the sweep varies."""
    if not data.results.tested:
        return
    points = rows(data.results.trials, None)  # also those of a search that no row shows
    figures = [
        _chart(figure, f"Accuracy against {key}")
        for key in charts.numeric_settings(points)
        for figure in charts.by_setting(data.results, points, key)
    ]
    text = (
        "Mean over runs against the setting, with the 95 % interval as a band. Dashed lines are "
        "methods without this setting."
    )
    if data.sweep.search is not None:
        text = "One dot for each point of the search. Other settings differ between the points too."
    if figures:
        yield Group(texts=[text], figures=figures)


def components(data: ReportData) -> Iterator[Group]:
    """Each row minus its host and its control."""
    if data.results.all_comparisons:
        figure = charts.differences(data.results)
        notes = significance_notes(data.results.all_comparisons, marks=False)
        yield Group(
            figures=[_chart(figure, "Differences with intervals and a line at 0")],
            tables=[
                Layout(
                    frame=DataFrame(comparison_lines(data.results, data.results.all_comparisons))
                )
            ],
            details=[("Notes on the tests", "\n".join(notes))] if notes else [],
        )


# ---------------------------------------------------------------- pseudo-labels and classes


PSEUDO = (
    ("pseudo/accuracy", "accuracy, %", "accuracy of the pseudo-labels"),
    ("pseudo/coverage", "coverage, %", "share of the pool with a pseudo-label"),
    ("pseudo/balance", "balance, %", "evenness over classes (entropy)"),
)


# Columns of the table of pseudo-labels: title and metric.
POOL_ACCURACY = {
    "last pseudo-labels": "pseudo/accuracy",
    "whole pool": "pool/accuracy_fused",
    "evidence alone": "pool/accuracy_evidence",
}

POOL_NOTE = (
    "In %, mean over runs. Last pseudo-labels: those selected in the last round. Whole pool: all "
    "pool images, by the fused classifier after the last round. Evidence alone: scored pool "
    "images, by the smallest denoising error."
)


def pseudo_labels(data: ReportData) -> Iterator[Group]:
    """Accuracy, coverage and balance of the pseudo-labels by iteration; accuracy on the pool."""
    for task in data.results.tasks[:MAX_TASKS]:
        best: dict[str, Row] = {}  # the best row of each method
        for row in sorted(data.results.rows, key=lambda row: -row.mean):
            if row.task == task:
                best.setdefault(row.method, row)
        figures = []
        for metric, ylabel, title in PSEUDO:
            series = charts.over_iterations([*best.items()], data.results, metric)
            if shown := series[: charts.MAX_CURVES]:
                figure = charts.curves(shown, "iteration", ylabel, title=title)
                figures.append(_chart(figure, f"Pseudo-labels over iterations: {title}"))
        tables = _tables([*_pool_lines(task, data.results)], POOL_NOTE)
        if figures or tables:
            yield Group(heading=task_text(task), figures=figures, tables=tables)


def _pool_lines(task: Task, results: Results) -> Iterator[dict[str, str]]:
    """Accuracy on the pool, and settings of the evidence, of the rows of a task."""
    for row in results.rows:
        values = {
            title: format_percent(results.mean(row, metric))
            for title, metric in POOL_ACCURACY.items()
        }
        if row.task == task and any(values.values()):
            first = next(iter(results.distinct_trials(row).values()))
            method = row_text(row, results.varied_settings)
            yield {"method": method, **values, "evidence settings": evidence_text(first.flat)}


def evidence_text(flat: Mapping[str, Any]) -> str:
    """
    >>> evidence_text({"evidence.draws": 8, "evidence.weight": 0.3, "evidence.top": 5})
    'draws 8, weight 0.3, top 5'
    """
    prefix, defaults = "evidence.", vars(EvidenceSettings())
    settings = {key.removeprefix(prefix): flat[key] for key in flat if key.startswith(prefix)}
    if not settings["draws"]:
        return ""
    first = {name: settings[name] for name in ("draws", "weight")}
    others = {name: value for name, value in settings.items() if value != defaults[name]}
    return ", ".join(f"{name} {format_value(value)}" for name, value in (first | others).items())


def confusions(data: ReportData) -> Iterator[Group]:
    """Confusion matrices of the best classifier of each task and of its host."""
    results = data.results
    for task in results.tasks[:MAX_TASKS]:
        best = results.best_classifier(task)
        if best is None or best.test is None:
            continue
        host_method = METHODS[best.row.method].host
        host = results.baseline(best.row, host_method) if host_method else None
        spec = next(slot.spec for slot in data.plan.slots if slot.cell.id == best.row.cell)
        classes = tested_classes(spec, data.location.store)
        names = [name.replace("_", " ") for name in classes]
        figures, lines = [], []
        for row, classifier in ((best.row, best.classifier), (host, None)):
            if row is None:
                continue
            trials = results.distinct_trials(row).values()
            matrix = np.sum(
                [
                    charts.confusion(trial.labels, predicted, len(names))
                    for trial in trials
                    if (predicted := trial.predicted(classifier)) is not None
                ],
                axis=0,
            )
            figure = charts.heatmap(matrix, names, title=row.method)
            figures.append(_chart(figure, f"Confusion matrix of {row.method}"))
            lines += [
                {"method": row.method, "class": true, "predicted": wrong, "share": f"{share:.0%}"}
                for true, wrong, share in frequent_confusions(matrix, names)
            ]
        yield Group(heading=task_text(task), figures=figures, tables=_tables(lines))


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


# ---------------------------------------------------------------- images


def images(data: ReportData) -> Iterator[Group]:
    """The contact sheet."""
    sheet = data.location.folder / "contact_sheet.png"
    if sheet.exists() and sheet.stat().st_size:
        shares = read_outcome(data.location).get("run", {}).get("shares", {})
        by_group = ", ".join(f"{name} {share:.0%}" for name, share in sorted(shares.items()))
        caption = "Real images, images without LoRA, and images with LoRA from the same noise."
        if by_group:
            caption += f" Zero-shot CLIP recognises {by_group}."
        alt = "Real images, images of the base model and images with LoRA, one class per row"
        src = _data("image/png", sheet.read_bytes())
        yield Group(figures=[Picture(src=src, alt=alt, caption=caption, wide=True)])


SHOWN_CLASSES, THUMB_PX = 20, 56
THRESHOLDS = (0.5, 0.7, 0.9, 0.95)  # of confidence


def unlabelled(data: ReportData) -> Iterator[Group]:
    """Unlabelled images by the class that the best classifier of a task predicts."""
    for task, best in data.results.best_classifiers.items():
        slot = next(slot for slot in data.plan.slots if slot.key.digest == best.trial.key)
        arrays = read_trial(slot.spec, data.location.store).pool_arrays()
        if not arrays or any(name.startswith("pool/accuracy") for name in best.trial.metrics):
            continue
        predicted = arrays[best.classifier]
        confidence = arrays[f"probability_{best.classifier}"].astype(float)
        files = image_files(slot.spec.dataset.name, data.location.data_root)
        if len(files) != slot.spec.dataset.images:  # the positions are of another folder's images
            files = ()
        lines, figures, names = [], [], slot.spec.classnames
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
        left = ", ".join(f"{np.mean(confidence >= t):.0%} over {t:g}" for t in THRESHOLDS)
        texts = [
            f"{best.classifier.capitalize()} classifier of "
            f"{row_text(best.row, [*best.row.settings])}; {len(predicted):,} images, of "
            f"{np.count_nonzero(counts)} of {plural(len(names), 'class')}. Share over a threshold "
            f"of confidence: {left} (airsweep classify --min-probability).",
            "Confidence does not tell how often the classifier is right. Next: label a sample, "
            f"{results_command('sample', data.location)}.",
        ]
        note = "Share of the images and mean confidence, in %; the most frequent classes first."
        heading = task_text(task) if len(data.results.tasks) > 1 else ""
        yield Group(heading=heading, texts=texts, figures=figures, tables=_tables(lines, note))


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


# Anchor, title, introduction, and the function that yields the groups.
SECTIONS: tuple[tuple[str, str, str, Callable[[ReportData], Iterator[Group]]], ...] = (
    ("answer", "Answer", "", answer),
    ("table", "Table", "", table),
    (
        "unlabelled",
        "Unlabelled images",
        "By the class that the best classifier predicts: the four surest images, then the four "
        "least sure ones.",
        unlabelled,
    ),
    ("settings", "Accuracy by setting", "", by_setting),
    (
        "components",
        "Comparisons with host and control",
        "Each method minus its host, and minus its control (diamonds), which builds the same "
        "auxiliary classifier from real pseudo-labelled images. Differences are paired by image "
        "and run. Green: significantly higher; orange: significantly lower; grey: not significant; "
        "grey without an interval: not tested.",
        components,
    ),
    (
        "pseudo-labels",
        "Pseudo-labels",
        "Means over runs, with a band from the lowest to the highest run. Hosts (such as cpl) "
        "label the pool with the text classifier only. Other methods add an auxiliary classifier, "
        "built from synthetic images (air) or from real ones (the control), or denoising evidence. "
        "True labels serve only to measure the pseudo-labels after training.",
        pseudo_labels,
    ),
    (
        "confusion",
        "Confusion",
        "Test images of all runs by true class (rows) and predicted class (columns), for the best "
        "classifier of each task and for its host. Shades are shares of the true class, from 0 "
        "(dark) to 1 (bright).",
        confusions,
    ),
    ("images", "Images", "", images),
)

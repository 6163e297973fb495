"""A sweep as one HTML file: whole, offline, the same bytes for the same data.

Each section is a function from evidence to groups of charts and tables. One without a group is left
out.
"""

from __future__ import annotations

import base64
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pandas import DataFrame

from orchestrator.failures import CLASSES
from orchestrator.formatting import clock, counted
from orchestrator.planning.dataset_text import tested_classes
from orchestrator.planning.estimate import gpu_share
from orchestrator.planning.plan import WORDS
from orchestrator.reporting import charts
from orchestrator.reporting._layouts import Layout, without_empty
from orchestrator.reporting._statistics import Array
from orchestrator.reporting.report_data import ReportData
from orchestrator.reporting.rows import Row, choice_notes, has_images, mark_notes, world_text
from orchestrator.reporting.tables import WORLD, differences, laid_out, texts
from orchestrator.spec.presets import METHODS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATE = Path(__file__).with_name("templates") / "report.html"
MOST_WORLDS = 12  # of which charts are drawn that are large
MOST_CARDS = 2  # of which there are pictures


def page(found: ReportData) -> str:
    """The report: what came out, on what it rests, what it cost.

    Nothing in it tells when it was made; numbers, charts and pictures follow from the sweep's
    ledger and records alone.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    sections = [
        {"id": name, "title": title, "text": text, "groups": groups}
        for name, title, text, make in SECTIONS
        if (groups := list(make(found)))
    ]
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=found.sweep.name,
        question=re.split(r"\n\s*\n", found.sweep.question.strip()),
        sections=sections,
        footer=f"airsweep {_version()}, sweep {found.location.project}/{found.location.name}, "
        f"{len(found.results.entries)} results.",
    )
    return text + "\n"


def _version() -> str:
    try:
        return version("airsweep")
    except PackageNotFoundError:  # a checkout on the path, without installation
        return "(not installed)"


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image of the page, whole in its address."""

    src: str
    alt: str
    caption: str = ""
    wide: bool = False


@dataclass(frozen=True, kw_only=True)
class Group:
    """What stands together in a section."""

    heading: str = ""
    texts: Sequence[str] = ()
    cards: Sequence[Mapping[str, str]] = ()  # names and texts; of the heading the name is empty
    figures: Sequence[Picture] = ()
    tables: Sequence[Layout] = ()
    details: Sequence[tuple[str, str]] = ()  # folded texts with their names


def _chart(figure: Figure, alt: str) -> Picture:
    return Picture(src=_data("image/svg+xml", charts.svg(figure).encode()), alt=alt)


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _tables(lines: Sequence[Mapping[str, str]], note: str = "") -> list[Layout]:
    """One table; none where there are no lines."""
    frame = DataFrame(without_empty(lines))
    return [Layout(frame=frame, notes=[note] if note else [])] if lines else []


# ---------------------------------------------------------------- accuracy


def answer(found: ReportData) -> Iterator[Group]:
    """The best row of each world, and the best with synthetic images where that is another."""
    results, lines = found.results, texts(found.results)
    cards = []
    for world in results.worlds:
        best = results.best(world)
        drawn = [row for row in results.rows if row.world == world and has_images(row.method)]
        chosen = {"highest mean": best}
        if drawn and not has_images(best.method):
            top = max(drawn, key=lambda row: row.mean)
            chosen["highest mean with synthetic images"] = top
        for what, row in chosen.items():
            [line] = [line for line, of in zip(lines, results.rows, strict=True) if of is row]
            about = {key: text for key, text in line.items() if text and key not in WORLD}
            cards.append({"": f"{world_text(world)}: {what}", **about})
    yield Group(texts=[*filter(None, [_verdict(found), _state(found)])], cards=cards)


def _verdict(found: ReportData) -> str:
    """Do synthetic images help, in one sentence."""
    parts = []
    comparisons = found.results.comparisons
    for role, what in (("host", "the host"), ("control", "the control without diffusion")):
        gains = [c for c in comparisons if c.role == role and has_images(c.row.method)]
        if gains:
            above = sum(gain.significant and gain.difference.mean > 0 for gain in gains)
            below = sum(gain.significant and gain.difference.mean < 0 for gain in gains)
            lower = f", lower in {below}" if below else ""
            parts.append(f"than {what} in {above} of {counted(len(gains), 'comparison')}{lower}")
    if not parts:
        return ""
    if all(one.difference.reason_not_tested for one in comparisons):
        return " ".join(mark_notes(comparisons))
    return (
        f"With synthetic images accuracy is significantly higher {' and '.join(parts)} "
        f"(p < 0.05, Holm-corrected over {counted(len(comparisons), 'comparison')})."
    )


def _state(found: ReportData) -> str:
    counts = found.counts
    left = {state: counts[state] for state in ("waiting", "failed", "pruned") if counts[state]}
    done = counts["done"] + counts["reused"]
    text = f"{counted(done, 'trial')} of {found.plan.total} have a result"
    if left:
        text += "; " + ", ".join(f"{count} {state}" for state, count in left.items())
    picked = "The best row has the highest mean on the test images, which was seen afterwards."
    return f"{text}. {picked}"


def table(found: ReportData) -> Iterator[Group]:
    """All rows, as `airsweep table` prints them."""
    layout = laid_out(found.results)
    alt = f"Accuracy of {len(found.results.rows)} rows with intervals"
    drawn = [_chart(charts.accuracy(found.results), alt)]
    yield Group(texts=[" ".join(layout.caption)], figures=drawn, tables=[layout])


def by_setting(found: ReportData) -> Iterator[Group]:
    """Accuracy against each number that the sweep varies."""
    drawn = [
        _chart(figure, f"Accuracy against {key}")
        for key in charts.numeric_settings(found.points)
        for figure in charts.by_setting(found.results, found.points, key)
    ]
    text = (
        "Mean over runs against the setting; the band is the 95 % interval. Dashed lines are "
        "methods without this setting."
    )
    if found.sweep.search is not None:
        text = "Every point of the search, one dot each; other settings vary along with it."
    if drawn:
        yield Group(texts=[text], figures=drawn)


def components(found: ReportData) -> Iterator[Group]:
    """Each row minus its host and its control."""
    if found.results.comparisons:
        figure = charts.differences(found.results)
        yield Group(
            texts=[" ".join(mark_notes(found.results.comparisons, marks=False))],
            figures=[_chart(figure, "Differences with intervals and a line at 0")],
            tables=[Layout(frame=DataFrame(differences(found.results)))],
        )


# ---------------------------------------------------------------- pseudo-labels and classes


PSEUDO = (
    ("pseudo/accuracy", "right, %", "share of the pseudo-labels that is right"),
    ("pseudo/coverage", "covered, %", "share of the pool that has a pseudo-label"),
    ("pseudo/balance", "balance, %", "evenness over classes (entropy)"),
)


def pseudo_labels(found: ReportData) -> Iterator[Group]:
    """How good pseudo-labels are, iteration by iteration."""
    for world in found.results.worlds[:MOST_WORLDS]:
        best: dict[str, Row] = {}  # the best row of each method
        for row in sorted(found.results.rows, key=lambda row: -row.mean):
            if row.world == world:
                best.setdefault(row.method, row)
        drawn = []
        for metric, ylabel, what in PSEUDO:
            series = charts.over_iterations([*best.items()], found.results, metric)
            if shown := series[: charts.MOST_CURVES]:
                figure = charts.curves(shown, "iteration", ylabel, title=what)
                drawn.append(_chart(figure, f"Pseudo-labels over iterations: {what}"))
        if drawn:
            yield Group(heading=world_text(world), figures=drawn)


def confusions(found: ReportData) -> Iterator[Group]:
    """Which classes are taken for which, by the best row and by its host."""
    results = found.results
    for world in results.worlds[:MOST_WORLDS]:
        best = results.best(world)
        known = METHODS.get(best.method)
        host = results.partner(best, known.host) if known and known.host else None
        spec = next(slot.spec for slot in found.plan.slots if slot.cell.id == best.cell)
        classes = tested_classes(spec, found.location.store)
        names = [name.replace("_", " ") for name in classes]
        drawn, lines = [], []
        for row in filter(None, (best, host)):
            entries = results.distinct(row).values()
            matrix = np.sum(
                [charts.confusion(e.labels, e.predictions, len(names)) for e in entries], axis=0
            )
            figure = charts.heat(matrix, names, title=row.method)
            drawn.append(_chart(figure, f"Confusion matrix of {row.method}"))
            lines += [
                {"method": row.method, "class": true, "taken for": taken, "share": f"{share:.0%}"}
                for true, taken, share in confused(matrix, names)
            ]
        yield Group(heading=world_text(world), figures=drawn, tables=_tables(lines))


def confused(
    matrix: Array, names: Sequence[str], most: int = 5
) -> Iterator[tuple[str, str, float]]:
    """The pairs that are confused most: true class, what it was taken for, and how often.

    Args:
        matrix: (C, C) counts by true (rows) and predicted class.

    Returns:
        Shares of the true class in [0, 1], the largest first.
    """
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    np.fill_diagonal(shares, 0)
    for flat in np.argsort(-shares, axis=None, kind="stable")[:most]:
        true, taken = np.unravel_index(flat, shares.shape)
        if shares[true, taken] > 0:
            yield names[true], names[taken], float(shares[true, taken])


# ---------------------------------------------------------------- images


def images(found: ReportData) -> Iterator[Group]:
    """Real images beside those of the diffusion model, and how good the latter are."""
    sheet = found.location.folder / "contact_sheet.png"
    if sheet.exists() and sheet.stat().st_size:
        shares = found.outcome.get("run", {}).get("shares", {})
        by_group = ", ".join(f"{name} {share:.0%}" for name, share in sorted(shares.items()))
        caption = "Real images, images without LoRA and with it; same noise in the same place."
        if by_group:
            caption += f" Zero-shot CLIP recognises {by_group}."
        alt = "Real images, images of the base model, images after LoRA, a class a row"
        yield Group(figures=[_photo(sheet, alt, caption)])
    yield from _audits(found)


def _photo(file: Path, alt: str, caption: str = "") -> Picture:
    return Picture(src=_data("image/png", file.read_bytes()), alt=alt, caption=caption, wide=True)


def _audits(found: ReportData) -> Iterator[Group]:
    """What `airsweep audit` says of all rows of images, and pictures of the most doubtful ones."""
    if not found.cards:
        return
    lines = [
        {
            "images of": card.title,
            "images": f"{card.images:,}",
            "recognised": _percent(card.recognised),
            "recognised before LoRA": _percent(card.base_recognised),
            "KID to the pool": _plus_minus(card.kid),
            "KID before LoRA": _plus_minus(card.base_kid),
            "nearest test image": "" if card.test_cosine is None else f"{card.test_cosine:.3f}",
            "copies": f"{card.counts['test copy']}",
            "flagged": f"{card.flagged_images}",
        }
        for card, _ in found.cards
    ]
    most = sorted(found.cards, key=lambda one: -one[0].flagged_images / one[0].images)
    drawn = [
        _photo(picture, f"The best, worst and flagged images of {card.title}")
        for card, picture in most[:MOST_CARDS]
    ]
    note = "Recognised: zero-shot CLIP predicts its class. Nearest test image: largest cosine."
    if len(found.cards) > len(drawn):
        note += f" Pictured: the {len(drawn)} of {len(found.cards)} with most flagged images."
    yield Group(heading="Audit", tables=_tables(lines, note))
    yield Group(figures=drawn)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def _plus_minus(pair: Sequence[float] | None) -> str:
    return "" if pair is None else f"{pair[0]:.3f} ± {pair[1]:.3f}"


# ---------------------------------------------------------------- search


def searched(found: ReportData) -> Iterator[Group]:
    """What a search tried, which settings mattered, and whether its objective was a guide."""
    search = found.sweep.search
    if search is None:
        return
    from orchestrator.planning.search import importances  # Optuna: half a second

    if notes := choice_notes(found.results.rows):
        yield Group(texts=notes)
    objectives = {(e.cell, e.point): e.objective for e in found.results.entries}
    chosen = {row.cell: row.point for row in found.results.rows}
    for cell in found.plan.cells:
        rows = sorted((r for r in found.points if r.cell == cell.id), key=lambda row: row.point)
        valued = [(row, objectives.get((cell.id, row.point))) for row in rows]
        pairs = [(row, value) for row, value in valued if value is not None]
        if len(pairs) < 2:
            continue
        values, numbers = [value for _, value in pairs], [row.point for row, _ in pairs]
        best = np.maximum.accumulate(values).tolist()
        tried = [
            charts.Series(label="point", x=numbers, y=values),
            charts.Series(label="best so far", x=numbers, y=best),
        ]
        history = charts.curves(tried, "point", search.objective, percent=False, title="History")
        every = charts.Series(label="point", x=values, y=[row.mean for row, _ in pairs])
        marked = [
            charts.Series(label=name, x=[value], y=[row.mean])
            for name, point in (("chosen", chosen.get(cell.id)), ("default", 0))
            for row, value in pairs
            if row.point == point
        ]
        words = (search.objective, "test accuracy, %")
        title = "Objective against test"
        guide = charts.curves([every, *marked], *words, title=title, joined=False)
        weights = importances(cell.space, [(row.settings, value) for row, value in pairs])
        lines = [{"setting": key, "importance": f"{share:.0%}"} for key, share in weights.items()]
        note = "Importance: share of the variance of the objective (functional ANOVA)."
        yield Group(
            heading=cell.id,
            figures=[_chart(history, "Objective by point"), _chart(guide, title)],
            tables=_tables(lines, note),
        )


# ---------------------------------------------------------------- time, failures, lineage


def costs(found: ReportData) -> Iterator[Group]:
    """Where the time went."""
    lines = []
    for stage, (count, seconds) in found.costs().items():
        hours = seconds * gpu_share(stage, found.sweep.resources) / 3600
        lines.append(
            {
                "stage": WORDS.get(stage, stage),
                "made": f"{count:,}",
                "time of one worker": clock(seconds),
                "seconds each": f"{seconds / count:.2f}" if count else "",
                "GPU-hours": f"{hours:.2f}" if hours else "",
            }
        )
    wall, reused = found.outcome.get("seconds"), found.counts["reused"]
    text = "Work that this sweep did itself, added up over workers and runs."
    text += f" The last run took {clock(wall)}." if wall else ""
    text += f" {counted(reused, 'trial')} had a result already and cost nothing." if reused else ""
    yield Group(texts=[text], tables=_tables(lines))


def failures(found: ReportData) -> Iterator[Group]:
    """What failed, and what was done about it."""
    standing = found.standing
    failed = Counter(
        (event["failure_class"], event["message"], what)
        for what, events in (("trial", standing.failures), ("artifact", standing.unmade))
        for event in events.values()
    )
    rows = [(name, counted(n, what), text) for (name, text, what), n in sorted(failed.items())]
    rows += [(name, f"{count} tried again", "") for name, count in sorted(standing.retried.items())]
    lines = [
        {"class": name, "how many": many, "message": message, "remedy": CLASSES[name].remedy}
        for name, many, message in rows
    ]
    if lines:
        yield Group(tables=_tables(lines))


def lineage(found: ReportData) -> Iterator[Group]:
    """From which inputs, with which code, and how to get it again."""
    facts = [
        (name, ", ".join(map(str, found.made(name))))
        for name in ("commit", "dirty", "user", "host", "device")
    ]
    for versions in found.made("versions"):
        facts.append(("versions", ", ".join(f"{k} {v}" for k, v in sorted(versions.items()))))
    seeds = [
        ", ".join(f"{k} {v}" for k, v in one.items()) for one in found.sweep.seeds.assignments()
    ]
    facts += [*found.inputs().items(), ("seeds", "; ".join(seeds))]
    last = found.standing.last
    keys = [
        f"{slot.key.digest[:12]}  {last.get(slot.id, 'waiting'):<8}  {slot.id}"
        for slot in found.plan.slots
    ]
    yield Group(
        texts=[
            f"Sweep {found.location.project}/{found.location.name}. The same again: airsweep run "
            f"{found.sweep.source}. One trial again, from its record: airsweep repro KEY. The "
            "differences between two trials: airsweep diff A B."
        ],
        tables=_tables([{"name": name, "value": value} for name, value in facts if value]),
        details=[("The sweep file", found.sweep.text), ("Trial keys", "\n".join(keys))],
    )


# Address, title, first paragraph, and what follows.
SECTIONS: tuple[tuple[str, str, str, Callable[[ReportData], Iterator[Group]]], ...] = (
    ("answer", "Answer", "", answer),
    ("table", "Accuracy", "", table),
    ("settings", "Accuracy by setting", "", by_setting),
    (
        "components",
        "What each part brings",
        "A method with synthetic images minus its host, and minus its control, which builds the "
        "same auxiliary classifier from real pseudo-labelled images (diamonds). Paired by image "
        "and run; grey: the 95 % interval contains 0. Images needed, where a difference is not "
        "significant: test images that detect one of this size in one pair of runs (80 % power).",
        components,
    ),
    (
        "pseudo-labels",
        "Pseudo-labels",
        "Means over runs, with the band from the lowest to the highest run. Hosts (such as cpl) "
        "label with the text classifier alone, others with an auxiliary classifier beside it: of "
        "synthetic images (air), or of real ones (the control). The labels are compared with the "
        "truth after the fact; nothing in training sees it.",
        pseudo_labels,
    ),
    (
        "confusion",
        "Confusion",
        "Test images of all runs by true class (rows) and predicted class (columns): the best row "
        "of each and its host. Shades are shares of the true class, from 0 (dark) to 1 (bright).",
        confusions,
    ),
    ("images", "Images", "", images),
    ("search", "Search", "", searched),
    ("cost", "Time and cost", "", costs),
    (
        "failures",
        "Failures",
        "Work without a result. The next run tries all of it again.",
        failures,
    ),
    ("lineage", "Lineage", "", lineage),
)

"""The sections of a report, each a function from evidence to groups of charts and tables.

A section without a group is left out.
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from orchestrator import charts, figures
from orchestrator.dataset_text import tested_classes
from orchestrator.estimate import gpu_share
from orchestrator.evidence import Evidence, confused
from orchestrator.failures import CLASSES
from orchestrator.layouts import Layout
from orchestrator.plan import WORDS
from orchestrator.presets import METHODS
from orchestrator.report import (
    Row,
    choice_notes,
    counted,
    mark_notes,
    settings_text,
    signed_interval,
    world_text,
    worlds_of,
)
from orchestrator.screen import clock
from orchestrator.tables import WORLD, laid_out, records

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_WORLDS = 12  # of which charts are drawn that are large
MOST_CARDS = 2  # of which there are pictures


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


# ---------------------------------------------------------------- the answer


def answer(found: Evidence) -> Iterator[Group]:
    """The best row of each world, and the best with synthetic images where that is another."""
    lines = records(found.rows, found.entries, found.gains)
    cards = []
    for world in worlds_of(found.rows):
        best = _best(found.rows, world)
        drawn = [row for row in found.rows if row.world == world and _draws(row.method)]
        chosen = {"highest mean": best}
        if drawn and not _draws(best.method):
            chosen["highest mean with synthetic images"] = _best(drawn, world)
        for what, row in chosen.items():
            line = next(line for line, of in zip(lines, found.rows, strict=True) if of is row)
            about = {key: text for key, text in line.items() if text and key not in WORLD}
            cards.append({"": f"{world_text(world)}: {what}", **about})
    yield Group(texts=[*filter(None, [_verdict(found), _state(found)])], cards=cards)


def _best(rows: Sequence[Row], world: tuple[str, str, str]) -> Row:
    """The highest mean; of equal ones the first."""
    return max((row for row in rows if row.world == world), key=lambda row: row.mean)


def _verdict(found: Evidence) -> str:
    """Do synthetic images help, in one sentence."""
    parts = []
    for role, what in (("host", "the host"), ("control", "the control without diffusion")):
        gains = [gain for gain in found.gains if gain.role == role and _draws(gain.a)]
        if gains:
            above = sum(gain.significant and gain.difference.mean > 0 for gain in gains)
            below = sum(gain.significant and gain.difference.mean < 0 for gain in gains)
            lower = f", lower in {below}" if below else ""
            parts.append(f"than {what} in {above} of {counted(len(gains), 'comparison')}{lower}")
    if not parts:
        return ""
    return (
        f"With synthetic images accuracy is significantly higher {' and '.join(parts)} "
        f"(p < 0.05, Holm-corrected over {counted(len(found.gains), 'comparison')})."
    )


def _draws(method: str) -> bool:
    """Does a method have synthetic images?"""
    return method in METHODS and "images_per_class" not in METHODS[method].pins


def _state(found: Evidence) -> str:
    counts = found.counts
    left = {state: counts[state] for state in ("waiting", "failed", "pruned") if counts[state]}
    done = counts["done"] + counts["reused"]
    text = f"{counted(done, 'trial')} of {found.plan.total} have a result"
    if left:
        text += "; " + ", ".join(f"{count} {state}" for state, count in left.items())
    picked = "The best row has the highest mean on the test images, which was seen afterwards."
    return f"{text}. {picked}"


# ---------------------------------------------------------------- the table


def table(found: Evidence) -> Iterator[Group]:
    """All rows, as `airsweep table` prints them."""
    layout = laid_out(found.rows, found.entries, found.gains)
    figure = figures.accuracy(found.rows, found.entries)
    drawn = [_chart(figure, f"Accuracy of {len(found.rows)} rows with intervals")]
    yield Group(texts=[" ".join(layout.caption)], figures=drawn, tables=[layout])


# ---------------------------------------------------------------- count and weight


def by_setting(found: Evidence) -> Iterator[Group]:
    """Accuracy against each number that the sweep varies."""
    drawn = []
    for key in figures.numeric_settings(found.points):
        parts = figures.by_setting(found.rows, found.points, found.entries, key)
        for number, part in enumerate(parts, 1):
            title = f"{number} of {len(parts)}" if len(parts) > 1 else ""
            figure = figures.setting_chart(part, found.rows, key, title)
            drawn.append(_chart(figure, f"Accuracy against {key}"))
    text = (
        "Mean over runs against the setting; the band is the 95 % interval. Dashed lines are "
        "methods without this setting."
    )
    if found.sweep.search is not None:
        text = "Every point of the search, one dot each; other settings vary along with it."
    if drawn:
        yield Group(texts=[text], figures=drawn)


# ---------------------------------------------------------------- what the parts bring


def components(found: Evidence) -> Iterator[Group]:
    """Each row minus its host and its control."""
    if not found.gains:
        return
    figure = figures.differences(found.gains, found.varied)
    drawn = [_chart(figure, "Differences with intervals and a line at 0")]
    lines = [
        {
            "where": world_text(gain.row.world),
            "difference": f"{gain.a} \N{MINUS SIGN} {gain.b}",
            "settings": settings_text(gain.row, found.varied),
            "b is the": gain.role,
            "points, 95 %": signed_interval(gain.difference) + gain.mark,
            "n": str(gain.difference.n),
            "n_test": str(gain.difference.n_test),
            "p": _p_value(gain.p),
            "p corrected": _p_value(gain.p_corrected),
            "images needed": _count(gain.difference.images_needed),
        }
        for gain in found.gains
    ]
    notes = [" ".join(mark_notes(found.gains))]
    yield Group(texts=notes, figures=drawn, tables=[_table(lines)])


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def _p_value(p: float) -> str:
    return "< 0.001" if p < 0.0005 else f"{p:.3f}"


# ---------------------------------------------------------------- pseudo-labels


PSEUDO = (
    ("pseudo/accuracy", "right, %", "share of the pseudo-labels that is right"),
    ("pseudo/coverage", "covered, %", "share of the pool that has a pseudo-label"),
    ("pseudo/balance", "balance, %", "evenness over classes (entropy)"),
)


def pseudo_labels(found: Evidence) -> Iterator[Group]:
    """How good pseudo-labels are, iteration by iteration."""
    for world in worlds_of(found.rows)[:MOST_WORLDS]:
        best: dict[str, Row] = {}  # the best row of each method
        for row in sorted(found.rows, key=lambda row: -row.mean):
            if row.world == world:
                best.setdefault(row.method, row)
        drawn = []
        for metric, ylabel, what in PSEUDO:
            series = figures.over_iterations([*best.items()], found.results, metric)
            if series:
                figure = charts.curves(
                    series[: figures.MOST_CURVES], "iteration", ylabel, title=what
                )
                drawn.append(_chart(figure, f"Pseudo-labels over iterations: {what}"))
        if drawn:
            yield Group(heading=world_text(world), figures=drawn)


# ---------------------------------------------------------------- confusion


def confusions(found: Evidence) -> Iterator[Group]:
    """Which classes are taken for which, by the best row and by its host."""
    for world in worlds_of(found.rows)[:MOST_WORLDS]:
        best = _best(found.rows, world)
        known = METHODS.get(best.method)
        host = found.results.partner(best, known.host) if known and known.host else None
        names = [name.replace("_", " ") for name in _classnames(found, best)]
        drawn, lines = [], []
        for row in filter(None, (best, host)):
            matrix = found.confusion(row, len(names))
            figure = charts.heat(matrix, names, title=row.method)
            drawn.append(_chart(figure, f"Confusion matrix of {row.method}"))
            lines += [
                {"method": row.method, "class": true, "taken for": taken, "share": f"{share:.0%}"}
                for true, taken, share in confused(matrix, names)
            ]
        tables = [_table(lines)] if lines else []
        yield Group(heading=world_text(world), figures=drawn, tables=tables)


def _classnames(found: Evidence, row: Row) -> Sequence[str]:
    spec = next(slot.spec for slot in found.plan.slots if slot.cell.id == row.cell)
    return tested_classes(spec, found.place.store)


# ---------------------------------------------------------------- pictures


def images(found: Evidence) -> Iterator[Group]:
    """Real images beside those of the diffusion model, and how good the latter are."""
    yield from _contact_sheet(found)
    yield from _audits(found)


def _contact_sheet(found: Evidence) -> Iterator[Group]:
    sheet = found.place.folder / "contact_sheet.png"
    if not sheet.exists() or not sheet.stat().st_size:
        return
    shares = found.outcome.get("run", {}).get("shares", {})
    by_group = ", ".join(f"{name} {share:.0%}" for name, share in sorted(shares.items()))
    caption = "Real images, images without LoRA and with it; same noise in the same place."
    picture = Picture(
        src=_data("image/png", sheet.read_bytes()),
        alt="Real images, images of the base model, images after LoRA, a class a row",
        caption=f"{caption} Zero-shot CLIP recognises {by_group}." if by_group else caption,
        wide=True,
    )
    yield Group(figures=[picture])


def _audits(found: Evidence) -> Iterator[Group]:
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
        Picture(
            src=_data("image/png", picture.read_bytes()),
            alt=f"The best, worst and flagged images of {card.title}",
            wide=True,
        )
        for card, picture in most[:MOST_CARDS]
    ]
    rest = len(found.cards) - len(drawn)
    note = "Recognised: zero-shot CLIP predicts its class. Nearest test image: largest cosine."
    if rest:
        note += f" Pictured: the {len(drawn)} of {len(found.cards)} with most flagged images."
    yield Group(heading="Audit", tables=[_table(lines, note)])
    yield Group(figures=drawn)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def _plus_minus(pair: Sequence[float] | None) -> str:
    return "" if pair is None else f"{pair[0]:.3f} ± {pair[1]:.3f}"


# ---------------------------------------------------------------- search


def searched(found: Evidence) -> Iterator[Group]:
    """What a search tried, which settings mattered, and whether its objective was a guide."""
    search = found.sweep.search
    if search is None:
        return
    if notes := choice_notes(found.rows):
        yield Group(texts=notes)
    objectives = {(e.cell, e.point): e.objective for e in found.entries}
    chosen = {row.cell: row.point for row in found.rows}
    for cell in found.plan.cells:
        points = sorted(
            (row for row in found.points if row.cell == cell.id), key=lambda row: row.point
        )
        valued = [(row, objectives.get((cell.id, row.point))) for row in points]
        pairs = [(row, value) for row, value in valued if value is not None]
        if len(pairs) < 2:
            continue
        values = [value for _, value in pairs]
        numbers = [row.point for row, _ in pairs]
        best = np.maximum.accumulate(values).tolist()
        history = charts.curves(
            [
                charts.Series(label="point", x=numbers, y=values),
                charts.Series(label="best so far", x=numbers, y=best),
            ],
            "point",
            search.objective,
            percent=False,
            title="History",
        )
        shown = {"chosen": chosen.get(cell.id), "default": 0}
        marked = [
            charts.Series(label=name, x=[value], y=[row.mean])
            for name, point in shown.items()
            for row, value in pairs
            if row.point == point
        ]
        every = charts.Series(label="point", x=values, y=[row.mean for row, _ in pairs])
        guide = charts.curves(
            [every, *marked],
            search.objective,
            "test accuracy, %",
            title="Objective against test",
            joined=False,
        )
        drawn = [_chart(history, "Objective by point"), _chart(guide, "Objective against test")]
        weights = _importances(found, cell.id, [(row.settings, value) for row, value in pairs])
        lines = [{"setting": key, "importance": f"{share:.0%}"} for key, share in weights.items()]
        note = "Importance: share of the variance of the objective (functional ANOVA)."
        tables = [_table(lines, note)] if lines else []
        yield Group(heading=cell.id, figures=drawn, tables=tables)


def _importances(
    found: Evidence, cell: str, points: Sequence[tuple[Mapping[str, Any], float]]
) -> dict[str, float]:
    from orchestrator.search import importances  # Optuna: half a second

    space = next(one.space for one in found.plan.cells if one.id == cell)
    return importances(space, points)


# ---------------------------------------------------------------- time, failures, lineage


def costs(found: Evidence) -> Iterator[Group]:
    """Where the time went."""
    words = {**WORDS, "trials": "trials"}
    lines = []
    for stage, (count, seconds) in found.costs().items():
        hours = seconds * gpu_share(stage, found.sweep.resources) / 3600
        lines.append(
            {
                "stage": words.get(stage, stage),
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
    yield Group(texts=[text], tables=[_table(lines)])


def failures(found: Evidence) -> Iterator[Group]:
    """What failed, and what was done about it."""
    failed = Counter(
        (event["failure_class"], event["message"], what)
        for what, events in (
            ("trial", found.standing.failures),
            ("artifact", found.standing.unmade),
        )
        for event in events.values()
    )
    rows = [
        (name, counted(count, what), message)
        for (name, message, what), count in sorted(failed.items())
    ]
    rows += [
        (name, f"{count} tried again", "") for name, count in sorted(found.standing.retried.items())
    ]
    lines = [
        {"class": name, "how many": many, "message": message, "remedy": CLASSES[name].remedy}
        for name, many, message in rows
    ]
    if lines:
        yield Group(tables=[_table(lines)])


def lineage(found: Evidence) -> Iterator[Group]:
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
    lines = [{"name": name, "value": value} for name, value in facts if value]
    name = f"{found.place.project}/{found.place.name}"
    again = f"airsweep run {found.sweep.source}"
    yield Group(
        texts=[
            f"Sweep {name}. The same again: {again}. One trial again, from its record: airsweep "
            "repro KEY. The differences between two trials: airsweep diff A B."
        ],
        tables=[_table(lines)],
        details=[("The sweep file", found.sweep.text), ("Trial keys", _keys(found))],
    )


def _keys(found: Evidence) -> str:
    lines = [
        f"{slot.key.digest[:12]}  {found.standing.last.get(slot.id, 'waiting'):<8}  {slot.id}"
        for slot in found.plan.slots
    ]
    return "\n".join(lines)


# Address, title, first paragraph, and what follows.
SECTIONS: tuple[tuple[str, str, str, Callable[[Evidence], Iterator[Group]]], ...] = (
    ("answer", "Answer", "", answer),
    ("table", "Accuracy", "", table),
    ("settings", "Accuracy by setting", "", by_setting),
    (
        "components",
        "What each part brings",
        "A method with synthetic images minus its host, and minus its control, which builds the "
        "same auxiliary classifier from real pseudo-labelled images (diamonds). Paired by image "
        "and run; grey: the 95 % interval contains 0. Images needed: test images that detect a "
        "difference of this size in one pair of runs (80 % power).",
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


# ---------------------------------------------------------------- words and pictures


def _chart(figure: Figure, alt: str) -> Picture:
    return Picture(src=_data("image/svg+xml", charts.svg(figure).encode()), alt=alt)


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _table(lines: Sequence[Mapping[str, str]], note: str = "") -> Layout:
    """Lines as a table without columns that say nothing."""
    from pandas import DataFrame

    frame = DataFrame(lines)
    return Layout(frame=frame.loc[:, (frame != "").any()], notes=[note] if note else [])

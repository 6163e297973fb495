"""Sentences on results, for captions, screens and bundles."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from air_core.methods import METHODS
from orchestrator.formatting import format_percent, plural
from orchestrator.reporting._statistics import ALPHA, Z_95
from orchestrator.reporting.comparisons import MARKS, WORSE, Comparison, Results
from orchestrator.reporting.rows import Row, is_bound, row_text
from orchestrator.spec import presets
from orchestrator.spec.sweep import SMOKE_ONLY

EMPTY = "no finished trial yet"
MAX_NAMES = 5  # of methods in a sentence
AT_CHANCE = "Not better than chance"
CORRECTED = (
    "Holm-corrected over the comparisons of a question: those with the host, with the control, or "
    "of a setting, in one dataset, paradigm and modality; intervals are not corrected"
)
UNTESTED = "No image is labelled for test, so no accuracy is known."


def protocol_notes(results: Results) -> list[str]:
    """Sentences for a caption: metric, chance, splits and seeds, interval."""
    rows, notes = results.rows, []
    for method in dict.fromkeys(row.method for row in rows if is_bound(row.method)):
        notes.append(f"{method} is {METHODS[method].summary}; it is no method.")
    for row in rows:
        if departures := row.departures:
            sets = METHODS[row.method].sets
            words = (f"{key}: {value} ({sets[key]})" for key, value in departures.items())
            notes.append(f"{row.method} differs from its definition in {', '.join(words)}.")
    notes = [*dict.fromkeys(notes)]
    if any(row.metric == "harmonic_mean" for row in rows):
        notes.append("TRZSL: harmonic mean of the accuracies on seen and on unseen classes.")
    kinds = Counter(row.interval for row in results.tested)
    if not kinds:
        return [UNTESTED, *notes, splits_and_seeds(rows)]
    levels = {
        row.dataset: f"{format_percent(chance)} ({plural(results.classes[row.dataset], 'class')})"
        for row in results.tested
        if (chance := results.chance(row)) is not None
    }
    if levels:
        named = [f"{name} {level}" for name, level in levels.items()]
        notes.append(f"Chance: {', '.join(named if len(named) > 1 else levels.values())}.")
    usual = kinds.most_common(1)[0][0]
    text = f"Interval: {usual}"
    for kind in kinds:
        if kind != usual:
            methods = dict.fromkeys(row.method for row in rows if row.interval == kind)
            text += f"; {', '.join(methods)}: {kind.removeprefix('95 % bootstrap ')}"
    return [*notes, splits_and_seeds(rows), text + "."]


def at_chance_notes(results: Results) -> list[str]:
    """Sentences on accuracies of a smoke run, or not above guessing or those of zero-shot CLIP.

    Every screen with an accuracy has them first.
    """
    if results.is_smoke:
        return [f"{SMOKE_ONLY[0].upper()}{SMOKE_ONLY[1:]}."]
    parts, below = [], []
    for task in results.tasks:
        where = results.task_text(task, " in ")
        methods = [row for row in results.tested if row.task == task and not is_bound(row.method)]
        rows = [row for row in methods if results.is_at_chance(row)]
        best = results.best_classifiers.get(task)
        test, plain = (best.test, results.baseline(best.row, "zero_shot")) if best else (None, None)
        guesses = best and test and results.is_at_chance(best.row, test)
        names = [*dict.fromkeys(map(row_text, rows))]
        if len(names) > MAX_NAMES:
            names[MAX_NAMES:] = [f"{len(names) - MAX_NAMES} more"]
        if guesses:
            names = ["the best classifier", *names]
        if test and plain and test.mean < plain.mean:
            below.append(
                f"The best classifier{where} is below zero_shot ({format_percent(plain.mean)} %) "
                "on the test images, which did not choose it."
            )
        if names:
            level = format_percent(results.chance(methods[0]))
            parts.append(f"{', '.join(names)}{where} (chance {level} %)")
    if not parts:
        return below
    setup = any(
        presets.tests_setup_only(row.protocol["backbone"], row.dataset) for row in results.rows
    )
    remedy = f"; {presets.SETUP_ONLY}" if setup else ""
    return [f"{AT_CHANCE}, by the 95 % interval: {'; '.join(parts)}{remedy}.", *below]


def chance_caution(right: int, total: int, classes: int, images: str = "images") -> str:
    """A sentence if a share is not above that of guessing, by its interval (Wilson 1927).

    >>> chance_caution(70, 100, 2)
    ''
    >>> chance_caution(55, 100, 2)
    'Not better than chance (50.0 %), by the 95 % interval: 55.0 % of 100 images are right.'
    """
    share, z2 = right / total, Z_95**2
    spread = Z_95 * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    if (share + z2 / (2 * total) - spread) / (1 + z2 / total) > 1 / classes:
        return ""
    return (
        f"{AT_CHANCE} ({format_percent(1 / classes)} %), by the 95 % interval: "
        f"{format_percent(share)} % of {total:,} {images} are right."
    )


def best_texts(results: Results) -> list[str]:
    """Texts on the best classifiers, which begin with the task if there are several."""
    bests = results.best_classifiers.items()
    return [f"{results.task_text(task, after=': ')}{best}" for task, best in bests]


def splits_and_seeds(rows: Sequence[Row]) -> str:
    """The largest number of splits, and of seeds in a split, of the rows."""
    splits = max(row.protocol["splits"] for row in rows)
    seeds = max(1, *(row.protocol["seeds"] for row in rows))
    each = " each" if splits > 1 else ""
    return f"{plural(splits, 'split')}, {plural(seeds, 'seed')}{each}."


def collapse_notes(results: Results, most: int = 4) -> list[str]:
    """Sentences on runs that are far below the other runs of their row."""
    collapses = [(row, run) for row in results.rows for run in row.collapsed_runs()]
    notes = []
    for row, run in collapses[:most]:
        task = results.task_text(row.task, after=", ")
        seed = "" if run.seed is None else f", seed {run.seed}"
        notes.append(
            f"Collapsed run: {task}{row_text(row)}, split {run.split_seed}"
            f"{seed} has accuracy {format_percent(run.score)}, the other runs "
            f"{format_percent(run.others)}; the mean includes it."
        )
    if len(collapses) > most:
        notes.append(f"{plural(len(collapses) - most, 'more run')} collapsed.")
    return notes


# ---------------------------------------------------------------- tests


def significance_notes(comparisons: Sequence[Comparison], *, marks: bool = True) -> list[str]:
    """Sentences for a caption on the level of significance; empty if nothing is tested.

    Args:
        marks: whether the table has marks, else it has columns `significant` and `detectable`.
    """
    if not any(c.is_tested for c in comparisons):
        return []
    notes = [
        f"Significant: p < {ALPHA:g}, {CORRECTED}.",
        "Detectable: smallest difference, in points, that is significant with 80 % power; it grows "
        "with the number of comparisons and the variance between all their runs.",
    ]
    if marks:
        roles = {c.role for c in comparisons}
        signs = ", ".join(f"{MARKS[role]} from the {role}" for role in MARKS if role in roles)
        worse = f" ({WORSE} below it)" if any(c.mark.endswith(WORSE) for c in comparisons) else ""
        notes = [f"Significantly different: {signs}{worse} (p < {ALPHA:g}, {CORRECTED})."]
    return [*notes, *one_split_notes(comparisons)]


def one_split_notes(comparisons: Sequence[Comparison]) -> list[str]:
    """A sentence if all tested differences are of one split."""
    tested = [c for c in comparisons if c.is_tested]
    if not tested or not all("1 split" in c.difference.interval for c in tested):
        return []
    return ["With one split, significance holds for that split and its images only."]


def comparison_notes(comparisons: Sequence[Comparison]) -> list[str]:
    """A sentence on differences that contain the gain of a search, and one for each reason why
    differences are not tested."""
    unequal = dict.fromkeys(
        c.name for c in comparisons if c.role in MARKS and c.row.is_chosen != c.baseline.is_chosen
    )
    reasons: dict[str, dict[str, None]] = {}
    for c in comparisons:
        if reason := c.difference.reason_not_tested:
            reasons.setdefault(reason, {})[c.name] = None
    notes = []
    if unequal:
        notes.append(
            "Only one side has settings that a search chose, and the difference contains what it "
            f"gained: {', '.join(unequal)}."
        )
    return [*notes, *(f"Not tested: {', '.join(of)} ({why})." for why, of in reasons.items())]

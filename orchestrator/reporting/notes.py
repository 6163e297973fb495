"""Sentences on results, for captions, screens and bundles, and answers to the questions of a sweep.

The questions follow from its grid and its search: what does the search gain, does a value of a
setting beat the default one, a method its host and its control, a modality another one?
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

from air_core.methods import METHODS
from orchestrator.formatting import format_percent, plural
from orchestrator.reporting._statistics import ALPHA, Z_95, Verdict
from orchestrator.reporting.comparisons import BEST, MARKS, WORSE, Comparison, Results, compared
from orchestrator.reporting.rows import MODALITY, Row, is_bound, row_text, signed_percent
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
ANSWERS: dict[Verdict, str] = {
    "higher": "yes",
    "lower": "no",
    "not significant": "cannot be told",
    "not tested": "cannot be told",
}


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
    collapses = [(row, run) for row in results.rows for run in row.collapsed_runs]
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


# ---------------------------------------------------------------- answers


def headlines(results: Results) -> list[str]:
    """A warning of chance, the best classifiers, and whether images are labelled for test."""
    bests = [f"Best classifier: {BEST}{text}." for text in best_texts(results)]
    return [*at_chance_notes(results), *bests, *([] if results.tested else [UNTESTED])]


def answers(results: Results, most: int | None = None, rest: str = "") -> list[str]:
    """Questions with their answers: searches, settings, methods, modalities.

    Args:
        most: the number of answers, taken from all questions in turn. Default: all.
        rest: the command that prints the comparisons of those that are left out.
    """
    questions = [*_questions(results)]
    ranked = sorted((rank, i) for i, texts in enumerate(questions) for rank in range(len(texts)))
    shown = [questions[i][rank] for i, rank in sorted((i, rank) for rank, i in ranked[:most])]
    left = len(ranked) - len(shown)
    return [*shown, f"{left} more: {rest}"] if left else shown


def _questions(results: Results) -> Iterator[list[str]]:
    """The answers to each question; empty without test images.

    Methods with a diffusion model come first.
    """
    if not results.tested:
        return
    by_key = dict(results.value_comparisons)
    modalities = by_key.pop(MODALITY, [])
    yield search_answers(results)
    yield from (_answers(of_key) for of_key in by_key.values())
    comparisons = [c for c in results.comparisons if not is_bound(c.row.method)]
    comparisons.sort(key=lambda c: not uses_diffusion(c.row.method))
    diffusion = any(uses_diffusion(row.method) for row in results.rows)
    asked = [c for c in comparisons if uses_diffusion(c.row.method) or not diffusion]
    fused = compared(((c.row, c.baseline, c.role) for c in asked), "fused")
    yield [
        *_answers(comparisons),
        *(f"Fused classifiers: {text[0].lower()}{text[1:]}" for text in _answers(fused)),
    ]
    yield _answers(modalities)


def search_answers(results: Results) -> list[str]:
    """For each searched cell, the gain of the search or the reason to set it aside."""
    return [_search_answer(results, row) for row in results.rows if row.choice is not None]


def _search_answer(results: Results, row: Row) -> str:
    assert row.choice is not None
    objective, found = row.choice.objective, row.choice.ranking
    name = row_text(row, [k for k in results.varied_settings if k not in row.first.searched])
    task = results.task_text(row.task, ", ")
    if not row.is_tested:
        known = f"set aside, since no test image shows whether {objective} finds good points"
        return f"Search of {name}{task}: {known}."
    gain, first = results.search_gains.get(row.cell), row.first.first_point
    best = f"its best point is the {first}"
    if gain is not None:
        best = f"its best point has {gain.text} points on the {first}, {gain.significance}"
    elif row.choice.points[:1] != (0,):
        best = f"its best point is taken, since the {first} has no result"
    points = plural(found.points, "point")
    verb = "ranks" if found.predicts_accuracy else "may not rank"
    known = f"{objective} {verb} its {points} by test accuracy, correlation {found}"
    if found.rho is None:
        known = f"{points} are too few, or too similar, to show whether {objective} finds good ones"
    text = f"set aside, since {known}; {best}" if row.choice.default else f"{best}; {known}"
    return f"Search of {name}{task}: {text}."


def _answers(comparisons: Sequence[Comparison]) -> list[str]:
    """One question and its answer for each pair of methods, or of values with a method."""
    pairs: dict[tuple[str, str], list[Comparison]] = {}
    for c in comparisons:
        method, sides = c.row.method, c.methods
        if c.role not in MARKS:
            value, default = c.values
            sides = f"{method} with {c.role} {value}", f"{method} with {default}"
        pairs.setdefault(sides, []).append(c)
    answers = []
    for (one, other), of_pair in pairs.items():
        answer = _single_answer(*of_pair) if len(of_pair) == 1 else _joint_answer(of_pair)
        answers.append(f"Does {one} beat {other}? {answer}.")
    return answers


def _single_answer(c: Comparison) -> str:
    text = f"{ANSWERS[c.verdict].capitalize()}: {c.text} points"
    if c.verdict == "not significant":
        return f"{text}; detectable from {format_percent(c.detectable)}"
    return f"{text}, {c.significance}"


def _joint_answer(comparisons: Sequence[Comparison]) -> str:
    parts: list[str] = []
    for word in dict.fromkeys(ANSWERS.values()):
        if found := [c for c in comparisons if ANSWERS[c.verdict] == word]:
            of = "" if parts else f" of {len(comparisons)} comparisons"
            parts.append(f"{word} in {len(found)}{of}")
    parts[0] = f"{parts[0][0].upper()}{parts[0][1:]}"
    means = sorted(c.difference.mean for c in comparisons)
    ends = dict.fromkeys(map(signed_percent, (means[0], means[-1])))
    return f"{', '.join(parts)}; {' to '.join(ends)} points"


def uses_diffusion(method: str) -> bool:
    """Whether a method uses a diffusion model: synthetic images or denoising errors."""
    pins = METHODS[method].pins
    has_images = "images_per_class" not in pins and pins.get("images_from") == "generator"
    return not is_bound(method) and (has_images or "evidence.draws" not in pins)

"""Answers to the questions of a sweep, which follow from its grid and its search.

What does the search gain, does a value of a setting beat the default one, does a method beat its
host and its control, does a modality beat another one?
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from air_core.methods import METHODS
from orchestrator.formatting import format_percent, plural
from orchestrator.reporting._statistics import Verdict
from orchestrator.reporting.comparisons import BEST, MARKS, Comparison, Results, compared
from orchestrator.reporting.notes import UNTESTED, at_chance_notes, best_texts
from orchestrator.reporting.rows import MODALITY, Row, is_bound, row_text, signed_percent

ANSWERS: dict[Verdict, str] = {
    "higher": "yes",
    "lower": "no",
    "not significant": "cannot be told",
    "not tested": "cannot be told",
}


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

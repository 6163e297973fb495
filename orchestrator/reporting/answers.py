"""Answers to the questions of a sweep: whether a method beats its host and its control."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from air_core.methods import METHODS
from orchestrator.formatting import format_percent
from orchestrator.reporting._statistics import Interval, Verdict, gain_share, paired_difference
from orchestrator.reporting.rows import (
    UNTESTED,
    Comparison,
    Results,
    Row,
    Task,
    compared,
    is_bound,
    mean_std,
    row_text,
    signed_percent,
    task_text,
    uses_diffusion,
)

ANSWERS: dict[Verdict, str] = {
    "higher": "yes",
    "lower": "no",
    "not significant": "cannot be told",
    "not tested": "cannot be told",
}
# The method that reads true labels in the place of synthetic images, by its host.
CEILINGS = {
    method.host: name
    for name, method in METHODS.items()
    if method.pins.get("images_from") == "true_labels"
}


MAX_HEADLINES = 3


def headlines(results: Results) -> list[str]:
    """For each of the first tasks a sentence on the row of the highest mean and on a gain."""
    return [_headline(results, task) for task in results.tasks[:MAX_HEADLINES]]


def _headline(results: Results, task: Task) -> str:
    row, gain = best_and_gain(results, task)
    if not row.is_tested:
        return f"{task_text(task)}: {UNTESTED}"
    text = (
        f"{task_text(task)}: {row_text(row, [*row.settings])} has the highest mean test "
        f"{row.metric.replace('_', ' ')}, {mean_std(row)} %"
    )
    if gain is not None:
        whose = "its gain" if gain.row is row else f"the gain of {gain.row.method}"
        text += f"; {whose} over {gain.baseline.method}: {gain.text} points, {gain.significance}"
    return f"{text}."


def best_and_gain(results: Results, task: Task) -> tuple[Row, Comparison | None]:
    """The row of the highest mean, and the gain of a row over its control or else its host.

    That is the highest row with a diffusion model; without any, the highest one with a baseline.
    """
    gains = [c for c in results.comparisons if c.row.task == task and not is_bound(c.row.method)]
    gains = [c for c in gains if uses_diffusion(c.row.method)] or gains
    gain = max(gains, key=lambda c: (c.row.mean, c.role == "control"), default=None)
    return results.best(task), gain


def answers(results: Results) -> list[str]:
    """Questions on the methods with a diffusion model, each with an answer.

    If the sweep has no such method, the questions are on its other methods. The last sentence is on
    shares of a possible gain, that of the ceiling over the host. Empty without test images.
    """
    if not results.tested:
        return []
    diffusion = [row for row in results.rows if uses_diffusion(row.method)]
    rows = diffusion or [row for row in results.rows if not is_bound(row.method)]
    comparisons = [c for row in rows for c in results.comparisons_of(row).values()]
    fused = []
    for c in comparisons:
        runs, others = (results.runs(row, "fused") for row in (c.row, c.baseline))
        if difference := paired_difference(runs, others):
            fused.append((c.row, c.baseline, c.role, difference))
    return [
        *_answers(comparisons),
        *_missing_controls(diffusion, results),
        *(f"Fused classifiers: {text[0].lower()}{text[1:]}" for text in _answers(compared(fused))),
        *_shares(diffusion, results),
    ]


def _answers(comparisons: Sequence[Comparison]) -> Iterator[str]:
    """One question and its answer for each pair of methods."""
    pairs: dict[tuple[str, str], list[Comparison]] = {}
    for c in comparisons:
        pairs.setdefault(c.methods, []).append(c)
    for (method, baseline), of_pair in pairs.items():
        answer = _single_answer(*of_pair) if len(of_pair) == 1 else _joint_answer(of_pair)
        yield f"Does {method} beat {baseline}? {answer}."


def _single_answer(c: Comparison) -> str:
    text = f"{ANSWERS[c.verdict].capitalize()}: {c.text} points"
    if c.verdict == "not significant":
        return f"{text}; detectable from {format_percent(c.detectable)}"
    return f"{text}, {c.significance}"


def _joint_answer(comparisons: Sequence[Comparison]) -> str:
    counts = Counter(ANSWERS[c.verdict] for c in comparisons)
    parts = [
        f"{word} in {counts[word]}" for word in dict.fromkeys(ANSWERS.values()) if counts[word]
    ]
    parts[0] = f"{parts[0][0].upper()}{parts[0][1:]} of {len(comparisons)} comparisons"
    means = _range([c.difference.mean for c in comparisons], signed_percent)
    return f"{', '.join(parts)}; {means} points"


def _missing_controls(rows: Sequence[Row], results: Results) -> Iterator[str]:
    """Questions that need a control without diffusion of which the sweep has no row."""
    every = Counter(row.method for row in rows)
    missing = Counter(
        row.method
        for row in rows
        if _control(row.method) and "control" not in results.comparisons_of(row)
    )
    for method, count in missing.items():
        control = _control(method)
        some = "" if count == every[method] else f" in {count} of {every[method]} rows"
        why = f"{control} has no result to compare"
        yield f"Does {method} beat {control}? Cannot be told{some}: {why}."


def _control(method: str) -> str | None:
    """The control of a method; None if it has none, or one that uses the diffusion model too."""
    control = METHODS[method].control
    return None if control is None or uses_diffusion(control) else control


def _shares(rows: Sequence[Row], results: Results) -> list[str]:
    possible: dict[str, list[float]] = {}  # gains, by the names of ceiling and host
    shares: dict[str, dict[tuple[str, int], Interval]] = {}  # by method and row
    for row in rows:
        method = METHODS[row.method]
        ceiling, host, control = (
            results.baseline(row, name) if name else None
            for name in (CEILINGS.get(method.host), method.host, _control(row.method))
        )
        gain = results.comparisons_of(ceiling).get("host") if ceiling else None
        if ceiling is None or host is None or gain is None or gain.verdict != "higher":
            continue
        for each in filter(None, (row, control)):
            share = gain_share(*map(results.runs, (each, host, ceiling)))
            if share is not None:
                shares.setdefault(each.method, {})[each.cell, each.point] = share
                gains = possible.setdefault(f"{ceiling.method} over {host.method}", [])
                gains.append(ceiling.mean - host.mean)
    of = "; ".join(
        f"{names} ({_range(gains, signed_percent)} points)" for names, gains in possible.items()
    )
    parts = ", ".join(f"{name} {_share([*found.values()])}" for name, found in shares.items())
    return [f"Share of the gain of {of}: {parts}."] if parts else []


def _share(shares: Sequence[Interval]) -> str:
    if len(shares) > 1:
        means = [share.mean for share in shares]
        return f"{_range(means, _percent)} in {len(means)} rows"
    [share] = shares
    return f"{_percent(share.mean)} [{100 * share.low:.0f}, {100 * share.high:.0f}]"


def _percent(share: float) -> str:
    return f"{100 * share + 0.0:.0f} %"


def _range(values: Sequence[float], text: Callable[[float], str]) -> str:
    """The smallest and the largest value."""
    return " to ".join(dict.fromkeys([text(min(values)), text(max(values))]))

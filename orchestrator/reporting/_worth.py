"""Sentences on what the diffusion model was worth in a sweep."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from air_core.methods import METHODS
from orchestrator.reporting._statistics import Interval, corrected_p_values
from orchestrator.reporting.rows import (
    Comparison,
    Results,
    Row,
    signed_interval,
    signed_percent,
    uses_diffusion,
)

SIGNIFICANCE = {"yes": "significant", "no": "not significant", "not tested": "not tested"}
# The method that reads true labels in the place of synthetic images, by its host.
CEILINGS = {
    method.host: name
    for name, method in METHODS.items()
    if method.pins.get("images_from") == "true_labels"
}


def worth_sentences(results: Results) -> list[str]:
    """Gains of methods with a diffusion model over their controls, and shares of a possible gain.

    A method that has no control without diffusion is compared with its host. The possible gain is
    that of the ceiling over the host.
    """
    rows = [row for row in results.rows if uses_diffusion(row.method)]
    gains = _comparisons(rows, results)
    sentences = [f"{name}{_gain(comparisons)}" for name, comparisons in gains.items()]
    return [*sentences, *_fused_gains(gains, results), *_shares(rows, results)]


def _comparisons(rows: Sequence[Row], results: Results) -> dict[str, list[Comparison]]:
    """Comparisons with the control, by the methods; none where the control has no row."""
    found: dict[str, list[Comparison]] = {}
    for row in rows:
        control = _control(row.method)
        comparison = results.comparisons_of(row).get("control" if control else "host")
        if comparison is not None:
            found.setdefault(" - ".join(comparison.methods), []).append(comparison)
        elif control is not None:
            found.setdefault(f"{row.method}: unknown without its control {control}", [])
    return found


def _control(method: str) -> str | None:
    """The control of a method; None if it has none, or one that uses the diffusion model too."""
    control = METHODS[method].control
    return None if control is None or uses_diffusion(control) else control


def _gain(comparisons: Sequence[Comparison]) -> str:
    if len(comparisons) < 2:
        return "".join(
            f" {signed_interval(c.difference)} points, {SIGNIFICANCE[c.verdict]}"
            for c in comparisons
        )
    means = [c.difference.mean for c in comparisons]
    higher = sum(c.is_significant and c.difference.mean > 0 for c in comparisons)
    lower = sum(c.is_significant and c.difference.mean < 0 for c in comparisons)
    return (
        f" {_range(means, signed_percent)} points in {len(means)} comparisons, significant in "
        f"{higher} above 0 and {lower} below"
    )


def _fused_gains(by_methods: Mapping[str, Sequence[Comparison]], results: Results) -> Iterator[str]:
    """Gains of the fused classifiers; p values are corrected over these comparisons."""
    found = [
        (name, replace(each, difference=difference))
        for name, comparisons in by_methods.items()
        for each in comparisons
        if (difference := results.fused_difference(each.row, each.baseline)) is not None
    ]
    p_values = corrected_p_values([each.difference for _, each in found])
    gains: dict[str, list[Comparison]] = {}
    for (name, each), p in zip(found, p_values, strict=True):
        gains.setdefault(name, []).append(replace(each, p_corrected=p))
    for name, comparisons in gains.items():
        yield f"fused classifiers: {name}{_gain(comparisons)}"


def _shares(rows: Sequence[Row], results: Results) -> list[str]:
    possible: dict[str, list[float]] = {}  # gains, by the names of ceiling and host
    shares: dict[str, dict[tuple[str, int], Interval]] = {}  # by method and row
    for row in rows:
        method = METHODS[row.method]
        ceiling, host, control = (
            results.baseline(row, name) if name else None
            for name in (CEILINGS.get(method.host), method.host, _control(row.method))
        )
        if ceiling is None or host is None:
            continue
        for each in filter(None, (row, control)):
            share = results.gain_share(each, host, ceiling)
            if share is not None:
                shares.setdefault(each.method, {})[each.cell, each.point] = share
                gains = possible.setdefault(f"{ceiling.method} over {host.method}", [])
                gains.append(ceiling.mean - host.mean)
    gain = "; ".join(
        f"{names} ({_range(gains, signed_percent)} points)" for names, gains in possible.items()
    )
    parts = ", ".join(f"{name} {_share([*found.values()])}" for name, found in shares.items())
    return [f"share of the gain of {gain}: {parts}"] if parts else []


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

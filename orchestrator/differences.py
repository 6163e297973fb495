"""Why two trials differ: settings, inputs, code, and what came out. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.tracked import Remembered

CODE = ("commit", "dirty", "code", "device", "host", "user")
NOTHING = "-"
WIDTH = 22  # characters of a value


@dataclass(frozen=True)
class Differences:
    """What differs, as pairs; of metrics all that either has, but for times."""

    a: str
    b: str
    settings: dict[str, tuple[Any, Any]]
    inputs: dict[str, tuple[Any, Any]]  # digests
    code: dict[str, tuple[Any, Any]]
    metrics: dict[str, tuple[float | None, float | None]]

    def json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """For people, in three columns."""
        lines = [f"{'':<34} {'a':<{WIDTH}} b", f"{'a':<4} {self.a}", f"{'b':<4} {self.b}"]
        parts = {"settings": self.settings, "inputs": self.inputs, "code": self.code}
        for word, pairs in parts.items():
            lines.append(word if pairs else f"{word}: the same")
            lines += [_line(name, pair) for name, pair in pairs.items()]
        lines.append("metrics")
        for name, (a, b) in self.metrics.items():
            gap = "" if a is None or b is None else f"  {round(b - a, 4) + 0.0:+.4f}"
            lines.append(_line(name, (_number(a), _number(b))) + gap)
        return lines


def differences(a: Remembered, b: Remembered) -> Differences:
    """Compare two trials."""
    versions = [side.made.get("versions") or {} for side in (a, b)]
    settings = dict(_pairs(a.flat, b.flat))
    # Other settings reach other code: only of the same question does that say anything.
    names = [name for name in CODE if name != "code" or not settings]
    code = [{name: side.made.get(name) or None for name in names} for side in (a, b)]
    metrics = [
        {name: value for name, value in side.metrics.items() if not name.startswith("time/")}
        for side in (a, b)
    ]
    return Differences(
        *(a.label, b.label),
        settings=settings,
        inputs=dict(_pairs(a.digests, b.digests)),
        code=dict(_pairs(*code)) | dict(_pairs(*versions)),
        metrics={
            name: (metrics[0].get(name), metrics[1].get(name))
            for name in sorted(metrics[0].keys() | metrics[1].keys())
        },
    )


def _pairs(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[tuple[str, tuple[Any, Any]]]:
    for name in [*a, *(name for name in b if name not in a)]:
        if a.get(name) != b.get(name):
            yield name, (a.get(name), b.get(name))


def _line(name: str, pair: tuple[Any, Any]) -> str:
    a, b = (NOTHING if value in (None, "") else str(value)[:WIDTH] for value in pair)
    return f"  {name:<32} {a:<{WIDTH}} {b}"


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"

"""Who used what: hours of devices and bytes, of all that lies in a store. Knows no tracker.

An artifact counts once, for whoever made it; who reads it later pays nothing. Work that left
nothing (a trial that failed, one that was killed) is in no record, and not in here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, get_args

from orchestrator.inventory import UNKNOWN, Holding, Inventory, size
from orchestrator.makers import Makers, rows_of_images

By = Literal["user", "project", "sweep", "stage"]
FIGURES = ("made", "gpu_hours", "cpu_hours", "unknown_hours", "untimed", "bytes")
NOBODY = "(not recorded)"
NAME_WIDTH = 28


@dataclass(frozen=True)
class Used:
    """One artifact, one block of images, or what lies beside blocks."""

    user: str
    sweep: str | None  # PROJECT/NAME
    stage: str
    bytes: int
    seconds: float | None  # None: not known
    cpu: float | None  # cores; None: not known
    gpu: float | None  # devices, or a share of one; None: not known
    made: int  # how many artifacts or blocks of images it counts as
    when: float | None  # since the epoch

    def name(self, by: By) -> str:
        sweep = self.sweep or NOBODY
        if by == "project" and self.sweep:
            return self.sweep.partition("/")[0]
        return {
            "user": NOBODY if self.user == UNKNOWN else self.user,
            "project": sweep,
            "sweep": sweep,
            "stage": self.stage,
        }[by]

    def figures(self) -> dict[str, float]:
        hours = (self.seconds or 0.0) / 3600
        known = {"made": self.made, "bytes": self.bytes}
        if self.seconds is None:
            return {**known, "untimed": self.made}
        if self.gpu:
            return {**known, "gpu_hours": hours * self.gpu}
        if self.cpu is not None:
            return {**known, "cpu_hours": hours * self.cpu}
        return {**known, "unknown_hours": hours}


def usage(inventory: Inventory, makers: Makers, by: By, since: float | None) -> dict[str, Any]:
    """The contract of `airsweep usage --json`.

    Args:
        since: seconds since the epoch; what was made before does not count, nor what nobody knows
            the time of.
    """
    rows: dict[str, dict[str, float]] = {}
    for one in used(inventory, makers):
        if since is not None and (one.when is None or one.when < since):
            continue
        row = rows.setdefault(one.name(by), dict.fromkeys(FIGURES, 0))
        for name, value in one.figures().items():
            row[name] += value
    order = sorted(rows, key=lambda n: (n == NOBODY, *(-rows[n][f] for f in FIGURES[1:4]), n))
    total = {name: sum(row[name] for row in rows.values()) for name in FIGURES}
    return {
        "store": inventory.name,
        "by": by,
        "since": None if since is None else datetime.fromtimestamp(since).astimezone().isoformat(),
        "rows": [{by: name, **_rounded(rows[name])} for name in order],
        "total": _rounded(total),
    }


def _rounded(row: dict[str, float]) -> dict[str, float]:
    return {n: round(v, 4) if n.endswith("hours") else int(v) for n, v in row.items()}


def used(inventory: Inventory, makers: Makers) -> Iterator[Used]:
    """Everything in a store, once."""
    of = rows_of_images(inventory)
    for holding in inventory.holdings:
        if holding.stage in ("images", "synthetic"):
            yield from _row(holding, of[holding.digest], makers)
        else:
            yield _artifact(holding, makers)


def _artifact(holding: Holding, makers: Makers) -> Used:
    record = holding.record
    cpu, gpu = record.get("cpu"), record.get("gpu")
    if cpu is None and gpu is None:  # before shares were noted, trials said on what they ran
        device = record.get("info", {}).get("device")
        cpu, gpu = {"cpu": (1.0, 0.0), "cuda": (None, 1.0)}.get(str(device), (None, None))
    return Used(
        user=holding.user,
        sweep=makers.sweeps.get(holding.digest),
        stage=holding.stage,
        bytes=holding.bytes,
        seconds=record.get("seconds"),
        cpu=cpu,
        gpu=gpu,
        made=1,
        when=record.get("started"),
    )


def _row(holding: Holding, images: str, makers: Makers) -> Iterator[Used]:
    """Blocks of images by who drew them. Their features were made in the same seconds, and count
    bytes alone."""
    draws = holding.stage == "images"
    rest = holding.bytes
    for (c, block), name in holding.shards.items():
        drawing = makers.blocks.get((images, c, block))
        rest -= holding.files[name]
        yield Used(
            user=drawing.user if drawing else holding.user,
            sweep=drawing.sweep if drawing else makers.sweeps.get(images),
            stage=holding.stage,
            bytes=holding.files[name],
            seconds=(drawing.seconds if drawing else None) if draws else 0.0,
            cpu=drawing.devices.get("cpu") if drawing else None,
            gpu=drawing.devices.get("gpu") if drawing else None,
            made=int(draws),
            when=drawing.time if drawing else holding.record.get("started"),
        )
    sweep, when = makers.sweeps.get(images), holding.record.get("started")
    yield Used(holding.user, sweep, holding.stage, rest, 0.0, None, None, 0, when)


def since_of(text: str | None) -> float | None:
    """A date, or a date with a time, as seconds since the epoch.

    Raises:
        ValueError: it is none.
    """
    if text is None:
        return None
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        raise ValueError(
            f"--since {text}: wanted a date such as 2026-03-31, or 2026-03-31T12:00"
        ) from None


def check_by(by: str) -> By:
    """
    Raises:
        ValueError: that is no column.
    """
    for known in get_args(By):
        if by == known:
            return known  # type: ignore[no-any-return]
    raise ValueError(f"--by {by}: allowed are {', '.join(get_args(By))}")


def usage_screen(found: dict[str, Any]) -> str:
    """The same for people, at most 80 columns."""
    by, total = found["by"], found["total"]
    unknown = bool(total["unknown_hours"])
    head = ("made", "GPU hours", "CPU hours", *(["unknown"] if unknown else []), "size")
    lines = [f"{by:<{NAME_WIDTH}}" + "".join(f"{word:>10}" for word in head)]
    for row in (*found["rows"], {by: "total", **total}):
        hours = [row["gpu_hours"], row["cpu_hours"], *([row["unknown_hours"]] if unknown else [])]
        words = [f"{row['made']:,}", *map(_hours, hours), size(row["bytes"])]
        lines.append(f"{_short(row[by]):<{NAME_WIDTH}}" + "".join(f"{word:>10}" for word in words))
    if unknown:
        lines += ["", "unknown: hours of work whose record does not say on what it ran"]
    if total["untimed"]:
        lines += [
            "",
            f"{total['untimed']:,} of these say not how long they took, and count 0 hours",
        ]
    return "\n".join(lines)


def _hours(hours: float) -> str:
    """
    >>> _hours(0), _hours(0.0004), _hours(0.25), _hours(12345.6)
    ('-', '< 0.01', '0.25', '12,345.60')
    """
    if not hours:
        return "-"
    return "< 0.01" if hours < 0.005 else f"{hours:,.2f}"


def _short(name: str) -> str:
    return name if len(name) < NAME_WIDTH else f"{name[: NAME_WIDTH - 4]}..."

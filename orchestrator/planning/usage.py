"""Device hours and bytes of all that lies in a store, by who made it. Knows no tracker.

An artifact counts once, for whoever made it; who reads it later pays nothing. Work that left
nothing (a trial that failed, one that was killed) is in no record, and not in here.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from pandas import DataFrame

from orchestrator.formatting import size
from orchestrator.store import ArtifactStore, recorded_locations
from orchestrator.store.inventory import UNKNOWN, Inventory, take_inventory

BY = ("user", "project", "sweep", "stage")
HOURS = ("gpu_hours", "cpu_hours", "unknown_hours")
FIGURES = ("made", *HOURS, "untimed", "bytes")
NOBODY = "(not recorded)"
NAME_WIDTH = 27


def usage(store: ArtifactStore, by: str, since: str | None) -> dict[str, Any]:
    """The contract of `airsweep usage --json`.

    Args:
        by: one of BY.
        since: a date, with a time or without; what was made before does not count, nor what has
            no recorded time.

    Raises:
        ValueError: `by` or `since` is not allowed, or there is no store.
    """
    if by not in BY:
        raise ValueError(f"--by {by}: allowed are {', '.join(BY)}")
    start = None if since is None else _start(since)
    inventory = take_inventory(store)
    frame = DataFrame(_lines(inventory, store), columns=[*BY, "when", *FIGURES]).astype(
        dict.fromkeys(FIGURES, float)
    )
    if start is not None:
        frame = frame[frame["when"].astype(float) >= start.timestamp()]
    rows = frame.groupby(by)[[*FIGURES]].sum().assign(nobody=lambda of: of.index == NOBODY)
    rows = rows.sort_values([*HOURS], ascending=False, kind="stable")
    rows = rows.sort_values("nobody", kind="stable").drop(columns="nobody")
    return {
        "store": inventory.name,
        "by": by,
        "since": None if start is None else start.astimezone().isoformat(),
        "rows": [{by: name, **_rounded(row)} for name, row in rows.to_dict("index").items()],
        "total": _rounded(rows.sum().to_dict()),
    }


def _start(since: str) -> datetime:
    try:
        return datetime.fromisoformat(since)
    except ValueError:
        raise ValueError(
            f"--since {since}: wanted a date such as 2026-03-31, or 2026-03-31T12:00"
        ) from None


def _rounded(row: Mapping[Any, float]) -> dict[str, float]:
    return {name: round(n, 4) if name in HOURS else int(n) for name, n in row.items()}


def usage_screen(found: dict[str, Any]) -> str:
    """The same for people, at most 80 columns."""
    by, total = found["by"], found["total"]
    frame = DataFrame([*found["rows"], {by: "total", **total}]).set_index(by)
    frame.index = frame.index.str.replace(f"^(.{{{NAME_WIDTH - 3}}}).{{4,}}", r"\1...", regex=True)
    shown = {"made": "{:,}".format, **dict.fromkeys(HOURS, _hours), "bytes": size}
    if not total["unknown_hours"]:
        del shown["unknown_hours"]
    titles = {"gpu_hours": "GPU hours", "cpu_hours": "CPU hours", "bytes": "size"}
    frame = frame[[*shown]].transform(shown).rename(columns={**titles, "unknown_hours": "unknown"})
    screen = [frame.rename_axis(index=None, columns=by).to_string()]
    if total["unknown_hours"]:
        screen += ["", "unknown: hours of work whose record does not say on what it ran"]
    if total["untimed"]:
        screen += ["", f"{total['untimed']:,} of these have no recorded time, and count 0 hours"]
    return "\n".join(screen)


def _hours(hours: float) -> str:
    """
    >>> _hours(0), _hours(0.0004), _hours(0.25), _hours(12345.6)
    ('-', '< 0.01', '0.25', '12,345.60')
    """
    if not hours:
        return "-"
    return "< 0.01" if hours < 0.005 else f"{hours:,.2f}"


# ---------------------------------------------------------------- what was made


def _lines(inventory: Inventory, store: ArtifactStore) -> Iterator[dict[str, Any]]:
    """A line for each artifact, and for each block of images that was drawn. The bytes of a row
    belong to the user who began it."""
    holdings = {holding.digest: holding for holding in inventory.holdings}
    blocks: Counter[str] = Counter()
    first: dict[str, tuple[float, str]] = {}  # time, and sweep that had the artifact made first
    for sweep, user, event in _made(store):
        digest, time, facts = event["key"].rpartition("-")[2][:12], event["time"], event["facts"]
        first[digest] = min(first.get(digest, (time, sweep)), (time, sweep))
        # A block that another sweep drew has neither.
        drew = event["stage"] == "images" and (facts.get("drawn") or facts.get("holes"))
        if drew and digest in holdings:
            blocks[digest] += 1
            cpu, gpu = facts.get("cpu"), facts.get("gpu")
            yield _line(user, sweep, "images", time, 0, 1, event["seconds"], cpu, gpu)
    images = {
        _identity(h.record.get("spec")): h.digest for h in holdings.values() if h.stage == "images"
    }
    for digest, holding in holdings.items():
        record, drawn = holding.record, digest
        made, seconds, cpu, gpu = 1, record.get("seconds"), record.get("cpu"), record.get("gpu")
        if holding.stage == "synthetic":  # made while its images were drawn
            drawn = images.get(_identity((record.get("spec") or {}).get("images")), digest)
            made, seconds = 0, 0.0
        elif holding.stage == "images":  # blocks whose sweep is gone
            made = max(0, len(holding.shards) - blocks[digest])
            seconds = None if made else 0.0
        elif cpu is None and gpu is None:  # earlier versions noted the device of a trial alone
            device = str(record.get("info", {}).get("device"))
            cpu, gpu = {"cpu": (1.0, 0.0), "cuda": (None, 1.0)}.get(device, (None, None))
        _, sweep = first.get(drawn, (0.0, ""))
        when, size = record.get("started"), holding.bytes
        yield _line(holding.user, sweep, holding.stage, when, size, made, seconds, cpu, gpu)


def _made(store: ArtifactStore) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """PROJECT/NAME, user and event of all that the sweeps of a store have made."""
    for place in recorded_locations(store):
        sweep, user = f"{place.project}/{place.name}", UNKNOWN
        for event in place.event_log().events():
            if event["event"] == "sweep_started":
                user = str(event.get("user", UNKNOWN))
            elif event["event"] in ("trial_done", "artifact_prepared"):
                yield sweep, user, {"stage": "trials", "facts": {}, **event}


def _identity(spec: Any) -> str:
    return json.dumps(spec, sort_keys=True)


def _line(
    user: str,
    sweep: str,
    stage: str,
    when: float | None,
    size: int,
    made: int,
    seconds: float | None,
    cpu: float | None,
    gpu: float | None,
) -> dict[str, Any]:
    """
    Args:
        when: since the epoch.
        made: how many artifacts or blocks of images it counts as.
        seconds, cpu, gpu: None: not known.
    """
    kind, amount = "unknown_hours", (seconds or 0.0) / 3600
    if seconds is None:
        kind, amount = "untimed", made
    elif gpu:
        kind, amount = "gpu_hours", amount * gpu
    elif cpu is not None:
        kind, amount = "cpu_hours", amount * cpu
    return {
        "user": NOBODY if user == UNKNOWN else user,
        "project": sweep.partition("/")[0] or NOBODY,
        "sweep": sweep or NOBODY,
        "stage": stage,
        "when": when,
        **dict.fromkeys(FIGURES, 0.0),
        "made": made,
        "bytes": size,
        kind: amount,
    }

"""Usage of a store: device hours and bytes of its artifacts by user, project, sweep or stage.

An artifact counts once, for the user and the sweep that built it; reuse by others costs nothing.
Work without a record, such as that of a failed or killed trial, is not counted.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from pandas import DataFrame

from orchestrator.formatting import format_bytes
from orchestrator.planning.plan import STAGE_TITLES, LoggedResults
from orchestrator.store import ArtifactStore, recorded_locations
from orchestrator.store.inventory import UNKNOWN, Inventory, take_inventory

BY = ("user", "project", "sweep", "stage")
HOURS = ("gpu_hours", "cpu_hours", "unknown_hours")
FIGURES = ("made", *HOURS, "untimed", "bytes")
NOT_RECORDED = "(not recorded)"
NAME_WIDTH = 27


def usage(store: ArtifactStore, by: str, since: str | None) -> dict[str, Any]:
    """The output of `airsweep usage --json`; its keys are a contract.

    Args:
        by: one of BY.
        since: an ISO date, with or without a time. Older artifacts are not counted, nor are
            artifacts without a recorded time.

    Raises:
        ValueError: `by` or `since` is not allowed, or there is no store.
    """
    if by not in BY:
        raise ValueError(f"--by {by} is unknown; allowed: {', '.join(BY)}")
    start = None if since is None else _start(since)
    inventory = take_inventory(store)
    frame = DataFrame(_lines(inventory, store), columns=[*BY, "when", *FIGURES]).astype(
        dict.fromkeys(FIGURES, float)
    )
    if start is not None:
        frame = frame[frame["when"].astype(float) >= start.timestamp()]
    rows = frame.groupby(by)[[*FIGURES]].sum()
    rows = rows.sort_values([*HOURS], ascending=False, kind="stable")
    rows = rows.sort_index(key=lambda names: names == NOT_RECORDED, kind="stable")  # as last row
    return {
        "store": store.name,
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
            f"--since {since} is not a date; use a form like 2026-03-31 or 2026-03-31T12:00"
        ) from None


def _rounded(row: Mapping[Any, float]) -> dict[str, float]:
    return {name: round(n, 4) if name in HOURS else int(n) for name, n in row.items()}


def usage_screen(report: dict[str, Any]) -> str:
    """Format the result of `usage` as a table of at most 80 columns."""
    by, total = report["by"], report["total"]
    frame = DataFrame([*report["rows"], {by: "total", **total}]).set_index(by)
    frame = frame.rename(index=STAGE_TITLES)
    frame.index = frame.index.str.replace(f"^(.{{{NAME_WIDTH - 3}}}).{{4,}}", r"\1...", regex=True)
    shown = {"made": "{:,}".format, **dict.fromkeys(HOURS, _hours), "bytes": format_bytes}
    if not total["unknown_hours"]:
        del shown["unknown_hours"]
    titles = {"gpu_hours": "GPU hours", "cpu_hours": "CPU hours", "bytes": "size"}
    frame = frame[[*shown]].transform(shown).rename(columns={**titles, "unknown_hours": "unknown"})
    screen = [
        frame.rename_axis(index=None, columns=by).to_string(),
        "",
        "made: each result counts once, also if it was reused, shared or recovered",
    ]
    if total["unknown_hours"]:
        screen += ["", "unknown: hours of work whose record does not state the device"]
    if total["untimed"]:
        screen += ["", f"{total['untimed']:,} of these have no recorded time and count as 0 hours"]
    return "\n".join(screen)


def _hours(hours: float) -> str:
    """
    >>> _hours(0), _hours(0.0004), _hours(0.25), _hours(12345.6)
    ('-', '< 0.01', '0.25', '12,345.60')
    """
    if not hours:
        return "-"
    return "< 0.01" if hours < 0.005 else f"{hours:,.2f}"


# ---------------------------------------------------------------- artifacts


def _lines(inventory: Inventory, store: ArtifactStore) -> Iterator[dict[str, Any]]:
    """One line for each artifact and for each block of images, features or errors.

    The bytes of a row of images count for the user who started the row.
    """
    holdings = {holding.digest: holding for holding in inventory.holdings}
    blocks: Counter[str] = Counter()
    first: dict[str, tuple[float, str]] = {}  # earliest time and its sweep, by artifact
    for sweep, user, event in _build_events(store):
        digest, time, facts = event["key"].rpartition("-")[2][:12], event["time"], event["facts"]
        first[digest] = min(first.get(digest, (time, sweep)), (time, sweep))
        # The event of a block that another sweep made has no count.
        counted = any(facts.get(name) for name in ("drawn", "holes", "encoded", "pairs"))
        # Blocks of features are removed when the features are complete.
        if counted and (event["stage"] == "encoded" or digest in holdings):
            blocks[digest] += 1
            cpu, gpu = facts.get("cpu"), facts.get("gpu")
            yield _line(user, sweep, event["stage"], time, 0, 1, event["seconds"], cpu, gpu)
    images = {
        _identity(h.record.get("spec")): h.digest for h in holdings.values() if h.stage == "images"
    }
    for digest, holding in holdings.items():
        record, drawn = holding.record, digest
        made, seconds, cpu, gpu = 1, record.get("seconds"), record.get("cpu"), record.get("gpu")
        if holding.stage == "synthetic":  # features, computed while the images were drawn
            drawn = images.get(_identity((record.get("spec") or {}).get("images")), digest)
            made, seconds = 0, 0.0
        elif holding.stage in ("images", "encoded", "evidence"):  # blocks whose sweep was removed
            made = max(0, len(holding.shards) - blocks[digest])
            if holding.stage == "evidence" and blocks[digest]:
                made = 0  # the event of a later draw also counts earlier ones
            seconds = None if made else 0.0
        elif cpu is None and gpu is None:  # earlier versions recorded the device of trials only
            device = str(record.get("info", {}).get("device"))
            cpu, gpu = {"cpu": (1.0, 0.0), "cuda": (None, 1.0)}.get(device, (None, None))
        _, sweep = first.get(drawn, (0.0, ""))
        when, size = record.get("started"), holding.bytes
        yield _line(holding.user, sweep, holding.stage, when, size, made, seconds, cpu, gpu)


def _build_events(store: ArtifactStore) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """PROJECT/NAME, user and event of everything that the sweeps of a store have built."""
    for location in recorded_locations(store):
        sweep, user = location.full_name, UNKNOWN
        results = LoggedResults()
        for event in location.event_log().events():
            if event["event"] == "sweep_started":
                user = str(event.get("user", UNKNOWN))
            is_built = results.read(event) in ("done", "recovered")
            if is_built or event["event"] == "artifact_prepared":
                yield sweep, user, {"stage": "trials", "facts": {}, **event}


def _identity(spec: Any) -> str:
    # Earlier versions recorded no number of images of a dataset.
    return re.sub(r', "images": \d+', "", json.dumps(spec, sort_keys=True))


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
    """One line of the table that `usage` sums up.

    Args:
        when: time of the start, in seconds since the epoch.
        made: number of artifacts or blocks of images.
        seconds, cpu, gpu: duration and devices; None: not recorded.
    """
    kind, amount = "unknown_hours", (seconds or 0.0) / 3600
    if seconds is None:
        kind, amount = "untimed", made
    elif gpu:
        kind, amount = "gpu_hours", amount * gpu
    elif cpu is not None:
        kind, amount = "cpu_hours", amount * cpu
    return {
        "user": NOT_RECORDED if user == UNKNOWN else user,
        "project": sweep.partition("/")[0] or NOT_RECORDED,
        "sweep": sweep or NOT_RECORDED,
        "stage": stage,
        "when": when,
        **dict.fromkeys(FIGURES, 0.0),
        "made": made,
        "bytes": size,
        kind: amount,
    }

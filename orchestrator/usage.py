"""Device hours and bytes of all that lies in a store, by who made it. Knows no tracker.

An artifact counts once, for whoever made it; who reads it later pays nothing. Work that left
nothing (a trial that failed, one that was killed) is in no record, and not in here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from pandas import DataFrame

from orchestrator.inventory import UNKNOWN, Holding, Inventory, size, take_inventory
from orchestrator.place import recorded_places
from orchestrator.store import ArtifactStore

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
    lines = _lines(inventory, makers_of(store))
    frame = DataFrame(lines, columns=[*BY, "when", *FIGURES]).astype(dict.fromkeys(FIGURES, float))
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


# ---------------------------------------------------------------- what lies in the store


def _lines(inventory: Inventory, makers: Makers) -> Iterator[dict[str, Any]]:
    """A line for each artifact, each block of images, and for what lies beside blocks."""
    images = _images_of_rows(inventory)
    for holding in inventory.holdings:
        if holding.stage in ("images", "synthetic"):
            yield from _row(holding, images[holding.digest], makers)
        else:
            yield _artifact(holding, makers)


def _line(
    user: str,
    sweep: str | None,
    stage: str,
    when: float | None,
    bytes: int,
    made: int = 0,
    seconds: float | None = 0.0,
    cpu: float | None = None,
    gpu: float | None = None,
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
        "project": sweep.partition("/")[0] if sweep else NOBODY,
        "sweep": sweep or NOBODY,
        "stage": stage,
        "when": when,
        **dict.fromkeys(FIGURES, 0.0),
        "made": made,
        "bytes": bytes,
        kind: amount,
    }


def _artifact(holding: Holding, makers: Makers) -> dict[str, Any]:
    record = holding.record
    cpu, gpu = record.get("cpu"), record.get("gpu")
    if cpu is None and gpu is None:  # earlier versions noted the device of a trial, and no shares
        device = record.get("info", {}).get("device")
        cpu, gpu = {"cpu": (1.0, 0.0), "cuda": (None, 1.0)}.get(str(device), (None, None))
    seconds, when = record.get("seconds"), record.get("started")
    sweep = makers.sweeps.get(holding.digest)
    return _line(holding.user, sweep, holding.stage, when, holding.bytes, 1, seconds, cpu, gpu)


def _row(holding: Holding, images: str, makers: Makers) -> Iterator[dict[str, Any]]:
    """Blocks of images by who drew them. Their features were made in the same seconds, and count
    bytes alone."""
    sweep, when, stage = makers.sweeps.get(images), holding.record.get("started"), holding.stage
    made, rest = int(stage == "images"), holding.bytes
    for (c, block), name in holding.shards.items():
        count = holding.files[name]
        rest -= count
        drawing = makers.blocks.get((images, c, block))
        if drawing is None:  # its sweep is gone
            seconds = None if made else 0.0
            yield _line(holding.user, sweep, stage, when, count, made, seconds)
        else:
            seconds, shares = made * drawing.seconds, drawing.devices
            cpu, gpu = shares.get("cpu"), shares.get("gpu")
            yield _line(
                drawing.user, drawing.sweep, stage, drawing.time, count, made, seconds, cpu, gpu
            )
    yield _line(holding.user, sweep, stage, when, rest)


def _images_of_rows(inventory: Inventory) -> dict[str, str]:
    """For each row, of images or their features, the digest of the images."""

    def identity(spec: Any) -> str:
        return json.dumps(spec, sort_keys=True)

    rows = [one for one in inventory.holdings if one.stage in ("images", "synthetic")]
    drawn = {identity(r.record.get("spec")): r.digest for r in rows if r.stage == "images"}
    specs = {
        r.digest: (r.record.get("spec") or {}).get("images") for r in rows if r.stage != "images"
    }
    return {r.digest: drawn.get(identity(specs.get(r.digest)), r.digest) for r in rows}


# ---------------------------------------------------------------- what the event logs tell


@dataclass(frozen=True)
class Drawing:
    """A block of images, as its driver recorded it: a block has no record of its own."""

    user: str
    sweep: str  # PROJECT/NAME
    seconds: float
    time: float  # since the epoch, when it was done
    devices: Mapping[str, float]  # cpu, gpu; empty: an earlier version did not note them


@dataclass
class Makers:
    """By the 12 digits of a key that the store finds by."""

    sweeps: dict[str, str] = field(default_factory=dict)  # PROJECT/NAME that had it made first
    blocks: dict[tuple[str, int, int], Drawing] = field(default_factory=dict)  # and class, block


def makers_of(store: ArtifactStore) -> Makers:
    """From the event log of each recorded sweep, each read once."""
    found = Makers()
    first: dict[str, float] = {}
    for place in recorded_places(store):
        sweep, user = f"{place.project}/{place.name}", UNKNOWN
        for event in place.ledger().events():
            match event["event"]:
                case "sweep_started":
                    user = str(event.get("user", UNKNOWN))
                case "trial_done" | "artifact_prepared" as name:
                    digest = event["key"].rpartition("-")[2][:12]
                    if event["time"] < first.get(digest, float("inf")):
                        first[digest] = event["time"]
                        found.sweeps[digest] = sweep
                    if name == "artifact_prepared" and event["stage"] == "images":
                        _note(found, digest, event, user, sweep)
    return found


def _note(found: Makers, digest: str, event: Mapping[str, Any], user: str, sweep: str) -> None:
    facts = event["facts"]
    made_nothing = not facts.get("drawn") and not facts.get("holes")
    if made_nothing or not {"class", "block"} <= facts.keys():  # another sweep drew it
        return
    devices = {name: facts[name] for name in ("cpu", "gpu") if name in facts}
    block = (digest, int(facts["class"]), int(facts["block"]))
    # A block that is drawn again, after damage, belongs to the last who drew it.
    if block not in found.blocks or event["time"] > found.blocks[block].time:
        found.blocks[block] = Drawing(user, sweep, event["seconds"], event["time"], devices)

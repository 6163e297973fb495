"""Screens and JSON of `airsweep cache`: at most 80 columns, the largest artifacts first."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator.formatting import aligned, format_bytes, relative_path
from orchestrator.stages import STAGES
from orchestrator.store.gc import GcPlan, Inventory, StoreRequirements

LARGEST, SHOWN = 10, 20  # lines of a long list that are shown
NAME_WIDTH = 56


# ---------------------------------------------------------------- ls


def listing(inventory: Inventory, requirements: StoreRequirements) -> dict[str, Any]:
    """The JSON of `cache ls`. Sizes are in bytes."""
    root = inventory.store.root
    stages: dict[str, dict[str, int]] = {}
    users: dict[str, dict[str, int]] = {}
    artifacts = []
    for item in sorted(inventory.artifacts, key=lambda item: -item.bytes):
        needed_by = requirements.sweeps_needing(item.digest)
        unneeded_bytes = 0 if needed_by else item.bytes
        figures = {"artifacts": 1, "bytes": item.bytes, "images": item.images or 0}
        more = {"unneeded_artifacts": int(not needed_by), "unneeded_bytes": unneeded_bytes}
        _add(stages, item.path.parent.parent.name, figures | more)
        _add(users, item.user, {"artifacts": 1, "bytes": item.bytes})
        artifacts.append(
            {
                "key": "/".join(item.path.parts[-3:]),
                "bytes": item.bytes,
                "images": item.images,
                "user": item.user,
                "needed_by": needed_by,
                "unneeded_bytes": unneeded_bytes,
            }
        )
    ordered = [stage for stage in STAGES if stage in stages]
    return {
        "store": inventory.store.name,
        "bytes": sum(group["bytes"] for group in stages.values()),
        "stages": {stage: stages[stage] for stage in (*ordered, *sorted({*stages} - {*ordered}))},
        "users": users,
        "sweeps": list(requirements.sweeps),
        "unread": dict(requirements.unreadable),
        "leftovers": [leftover.json(root) for leftover in inventory.leftovers],
        "artifacts": artifacts,
        "unfinished": [
            {
                "path": str(item.path.relative_to(root)),
                "bytes": item.bytes,
                "needed_by": requirements.sweeps_needing(item.digest),
            }
            for item in inventory.unfinished
        ],
    }


def _add(groups: dict[str, dict[str, int]], name: str, figures: dict[str, int]) -> None:
    group = groups.setdefault(name, dict.fromkeys(figures, 0))
    for key, value in figures.items():
        group[key] += value


def listing_screen(contents: dict[str, Any]) -> str:
    """The output of `listing` as text."""
    sweeps = len(contents["sweeps"]) + len(contents["unread"])
    artifacts = f"{len(contents['artifacts']):,} artifacts, {format_bytes(contents['bytes'])}"
    lines = [
        contents["store"] if "://" in contents["store"] else relative_path(Path(contents["store"])),
        f"{artifacts}; recorded sweeps: {sweeps}",
        "",
    ]
    rows = [("stage", "artifacts", "images", "size", "unneeded")]
    for stage, group in contents["stages"].items():
        images = f"{group['images']:,}" if group["images"] else "-"
        unneeded = f"{group['unneeded_artifacts']:,}: {format_bytes(group['unneeded_bytes'])}"
        last = unneeded if group["unneeded_bytes"] else "-"
        rows.append((stage, f"{group['artifacts']:,}", images, format_bytes(group["bytes"]), last))
    lines += [*aligned(rows), "", "largest"]
    for artifact in contents["artifacts"][:LARGEST]:
        lines.append(f"  {format_bytes(artifact['bytes']):>10}  {_shorten_key(artifact['key'])}")
        lines.append(f"{'':14}{artifact['user']}; {_needed_text(artifact['needed_by'])}")
    lines += ["", "by owner"]
    for user, group in sorted(contents["users"].items(), key=lambda item: -item[1]["bytes"]):
        lines.append(
            f"  {format_bytes(group['bytes']):>10}  {user}, {group['artifacts']:,} artifacts"
        )
    for key, title in (
        ("unfinished", "unfinished trainings"),
        ("leftovers", "leftovers of killed processes"),
    ):
        if contents[key]:
            total = sum(item["bytes"] for item in contents[key])
            lines += ["", f"{title}: {len(contents[key])}, {format_bytes(total)}"]
    for sweep, why in contents["unread"].items():
        lines += ["", f"the artifacts that {sweep} needs are unknown: {why}"]
    return "\n".join(lines)


def _needed_text(by: Sequence[str]) -> str:
    if not by:
        return "no sweep needs it"
    names = [name.removeprefix("default/") for name in by]
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return f"needed by {', '.join(names[:2])}{more}"


# ---------------------------------------------------------------- gc


def gc_screen(plan: GcPlan, removed: bool) -> str:
    """The artifacts that were removed, or that `--yes` would remove."""
    lines = []
    for removal in plan.removals[:SHOWN]:
        name = str(removal.path.relative_to(plan.root)).removeprefix("artifacts/")
        lines.append(f"{format_bytes(removal.bytes):>10}  {_shorten_key(name)}")
        lines.append(f"{'':12}{removal.why}; made by {removal.user}")
    if len(plan.removals) > SHOWN:
        lines.append(f"... and {len(plan.removals) - SHOWN:,} more; --json lists all")
    total = f"{format_bytes(plan.bytes)} in {len(plan.removals):,} items"
    if not plan.removals:
        lines.append("nothing to remove")
    elif removed:
        lines.append(f"removed {total}")
    else:
        lines.append(f"nothing was removed; --yes removes {total}")
    if plan.sweep and plan.removals:
        lines += [f"{plan.sweep} keeps its event log; a new run makes the artifacts again"]
        lines += [f"to delete it, remove sweeps/{plan.sweep} in the store, and its MLflow runs"]
    if plan.others:
        total = format_bytes(sum(removal.bytes for removal in plan.others))
        users = textwrap.shorten(", ".join(sorted({removal.user for removal in plan.others})), 30)
        lines += [
            f"{len(plan.others):,} of other users ({users}) stay, {total}:",
            "  --all-users includes them, and removes them with --yes",
        ]
    return "\n".join(lines)


def _shorten_key(name: str) -> str:
    """A key, shortened in the middle; its digest stays."""
    if len(name) <= NAME_WIDTH:
        return name
    return f"{name[: NAME_WIDTH - 16]}...{name[-13:]}"

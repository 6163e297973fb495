"""What `airsweep cache` prints: at most 80 columns, the largest first."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator.formatting import aligned, near, size
from orchestrator.keys import RECIPES
from orchestrator.store.gc import GcPlan, Removal, StoreRequirements, merged
from orchestrator.store.integrity import VerificationReport
from orchestrator.store.inventory import Inventory

LARGEST, SHOWN = 10, 20  # of a list that can be long
NAME_WIDTH = 56
STAGES = tuple(dict.fromkeys(stage for stage, _ in RECIPES.values()))  # in the order of making


# ---------------------------------------------------------------- ls


def listing(inventory: Inventory, requirements: StoreRequirements) -> dict[str, Any]:
    """The contract of `cache ls --json`. Bytes; of a row that is needed in part, parts count."""
    needed = merged(part for one in requirements.sweeps for part in one.artifacts.items())
    stages: dict[str, dict[str, int]] = {}
    users: dict[str, dict[str, int]] = {}
    artifacts = []
    for holding in sorted(inventory.holdings, key=lambda one: -one.bytes):
        by = requirements.sweeps_needing(holding.digest)
        beyond = frozenset(holding.shards) - needed[holding.digest] if by else frozenset()
        unneeded = sum(holding.files[holding.shards[place]] for place in beyond)
        spare = unneeded if by else holding.bytes
        figures = {
            "artifacts": 1,
            "bytes": holding.bytes,
            "images": holding.images or 0,
            "unneeded_artifacts": int(not by),
            "unneeded_bytes": spare,
        }
        _add(stages, holding.stage, figures)
        _add(users, holding.user, {"artifacts": 1, "bytes": holding.bytes})
        artifacts.append(
            {
                "key": holding.name,
                "bytes": holding.bytes,
                "images": holding.images,
                "user": holding.user,
                "needed_by": list(by),
                "unneeded_bytes": spare,
            }
        )
    known = [stage for stage in STAGES if stage in stages]
    return {
        "store": inventory.name,
        "bytes": sum(one["bytes"] for one in stages.values()),
        "stages": {stage: stages[stage] for stage in (*known, *sorted({*stages} - {*known}))},
        "users": users,
        "sweeps": [one.sweep for one in requirements.sweeps],
        "unread": dict(requirements.unreadable),
        "leftovers": [
            {"path": str(one.path.relative_to(inventory.root)), "why": one.why, "bytes": one.bytes}
            for one in inventory.leftovers
        ],
        "artifacts": artifacts,
        "unfinished": [
            {
                "path": str(one.path.relative_to(inventory.root)),
                "bytes": one.bytes,
                "needed_by": list(requirements.sweeps_needing(one.digest)),
            }
            for one in inventory.unfinished
        ],
    }


def _add(groups: dict[str, dict[str, int]], name: str, figures: dict[str, int]) -> None:
    group = groups.setdefault(name, dict.fromkeys(figures, 0))
    for key, value in figures.items():
        group[key] += value


def listing_screen(found: dict[str, Any]) -> str:
    """The same for people."""
    sweeps = len(found["sweeps"]) + len(found["unread"])
    lines = [
        found["store"] if "://" in found["store"] else near(Path(found["store"])),
        f"{len(found['artifacts']):,} artifacts, {size(found['bytes'])}; recorded sweeps: {sweeps}",
        "",
    ]
    stages = [("stage", "artifacts", "images", "size", "no sweep needs")]
    for stage, of in found["stages"].items():
        images = f"{of['images']:,}" if of["images"] else "-"
        spare = f"{of['unneeded_artifacts']:,}: {size(of['unneeded_bytes'])}"
        needless = spare if of["unneeded_bytes"] else "-"
        stages.append((stage, f"{of['artifacts']:,}", images, size(of["bytes"]), needless))
    lines += [*aligned(stages), "", "largest"]
    for one in found["artifacts"][:LARGEST]:
        lines.append(f"  {size(one['bytes']):>10}  {_shortened(one['key'])}")
        lines.append(f"{'':14}{one['user']}; {_needed(one['needed_by'])}")
    lines += ["", "by owner"]
    for user, of in sorted(found["users"].items(), key=lambda item: -item[1]["bytes"]):
        lines.append(f"  {size(of['bytes']):>10}  {user}, {of['artifacts']:,} artifacts")
    for name, what in (
        ("unfinished", "unfinished trainings"),
        ("leftovers", "leftovers of killed processes"),
    ):
        if found[name]:
            total = sum(one["bytes"] for one in found[name])
            lines += ["", f"{what}: {len(found[name])}, {size(total)}"]
    for sweep, why in found["unread"].items():
        lines += ["", f"what {sweep} needs cannot be told: {why}"]
    return "\n".join(lines)


def _needed(by: Sequence[str]) -> str:
    if not by:
        return "no sweep needs it"
    names = [name.removeprefix("default/") for name in by]
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return f"needed by {', '.join(names[:2])}{more}"


# ---------------------------------------------------------------- verify


def verdict_screen(verdict: VerificationReport) -> str:
    """What is damaged, by file, and what to do."""
    label = verdict.inventory.store.backend.label
    lines = []
    for one in verdict.damaged:
        remedy = textwrap.fill(one.remedy, 78, break_long_words=False, break_on_hyphens=False)
        remedy = textwrap.indent(remedy or f"remove {label(one.remove)}", "  ")
        lines += [f"damaged: {label(one.file)}", f"  {one.why}", remedy]
    for left in verdict.inventory.leftovers[:SHOWN]:
        lines += [f"leftover: {label(left.path)}", f"  {left.why}; it counts for nothing"]
    lines += _more(len(verdict.inventory.leftovers))
    count = len(verdict.damaged)
    damaged = f"{count} damaged: do what is named and run again" if count else "none is damaged"
    lines.append(f"{verdict.files:,} files, {size(verdict.bytes)}: {damaged}")
    if verdict.unsealed:
        lines.append(f"{verdict.unsealed:,} of them have no checksum, and can be opened")
    return "\n".join(lines)


# ---------------------------------------------------------------- gc


def gc_screen(plan: GcPlan, removed: bool) -> str:
    """What goes, or would go."""
    lines = []
    for one in plan.removals[:SHOWN]:
        lines.append(f"{size(one.bytes):>10}  {_shortened(_what(one, plan.root))}")
        lines.append(f"{'':12}{one.why}; made by {one.user}")
    lines += _more(len(plan.removals))
    total = f"{size(plan.bytes)} at {len(plan.removals):,} places"
    if not plan.removals:
        lines.append("nothing to remove")
    elif removed:
        lines.append(f"removed {total}")
    else:
        lines.append(f"nothing was removed; --yes removes {total}")
    if plan.sweep and plan.removals:
        lines.append(f"{plan.sweep} keeps its ledger; when it is run again it makes these again")
    if plan.others:
        total = size(sum(one.bytes for one in plan.others))
        users = textwrap.shorten(", ".join(sorted({one.user for one in plan.others})), 30)
        lines += [
            f"{len(plan.others):,} of others ({users}) stay, {total}:",
            "  --all-users lists them too, and with --yes removes them",
        ]
    return "\n".join(lines)


def _what(one: Removal, root: Path) -> str:
    name = str(one.path.relative_to(root)).removeprefix("artifacts/")
    return f"{len(one.files):,} blocks of {name}" if one.files else name


def _more(count: int) -> list[str]:
    return [f"... and {count - SHOWN:,} more; --json has all"] if count > SHOWN else []


def _shortened(name: str) -> str:
    """A key with its digest, without the middle of a long slug."""
    if len(name) <= NAME_WIDTH:
        return name
    return f"{name[: NAME_WIDTH - 16]}...{name[-13:]}"

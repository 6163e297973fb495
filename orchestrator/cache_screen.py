"""What `airsweep cache` prints: at most 80 columns, the largest first."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator.integrity import Verdict
from orchestrator.inventory import Holding, Inventory, size
from orchestrator.keys import RECIPES
from orchestrator.output import aligned, near
from orchestrator.recorded import Needs, merged
from orchestrator.upkeep import Removal, Spoils

LARGEST, SHOWN, OWNERS = 10, 20, 3  # of a list that can be long
NAME_WIDTH = 56
STAGES = tuple(dict.fromkeys(stage for stage, _ in RECIPES.values()))  # in the order of making


# ---------------------------------------------------------------- ls


def listing(inventory: Inventory, needs: Needs) -> dict[str, Any]:
    """The contract of `cache ls --json`. Bytes; of a row that is needed in part, parts count."""
    needed = merged(part for one in needs.asked for part in one.artifacts.items())
    stages: dict[str, dict[str, int]] = {}
    users: dict[str, dict[str, int]] = {}
    artifacts = []
    for holding in sorted(inventory.holdings, key=lambda one: -one.bytes):
        by = needs.by(holding.digest)
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
        artifacts.append(_artifact(holding, by, spare))
    return {
        "store": inventory.name,
        "bytes": sum(one["bytes"] for one in stages.values()),
        "stages": {name: stages[name] for name in sorted(stages, key=_order)},
        "users": users,
        "sweeps": [one.sweep for one in needs.asked],
        "unread": dict(needs.unread),
        "leftovers": [
            {"path": str(one.path.relative_to(inventory.root)), "why": one.why, "bytes": one.bytes}
            for one in inventory.leftovers
        ],
        "artifacts": artifacts,
        "unfinished": [
            {
                "path": str(one.path.relative_to(inventory.root)),
                "bytes": one.bytes,
                "needed_by": list(needs.by(one.digest)),
            }
            for one in inventory.unfinished
        ],
    }


def _artifact(holding: Holding, by: Sequence[str], spare: int) -> dict[str, Any]:
    return {
        "key": holding.name,
        "bytes": holding.bytes,
        "images": holding.images,
        "user": holding.user,
        "needed_by": list(by),
        "unneeded_bytes": spare,
    }


def _add(groups: dict[str, dict[str, int]], name: str, figures: dict[str, int]) -> None:
    group = groups.setdefault(name, dict.fromkeys(figures, 0))
    for key, value in figures.items():
        group[key] += value


def _order(stage: str) -> tuple[int, str]:
    return (STAGES.index(stage) if stage in STAGES else len(STAGES), stage)


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
    lines += aligned(stages)
    lines += ["", "largest"]
    for one in found["artifacts"][:LARGEST]:
        lines.append(f"  {size(one['bytes']):>10}  {shortened(one['key'])}")
        lines.append(f"{'':14}{one['user']}; {_needed(one['needed_by'])}")
    lines += ["", "by owner"]
    for user, of in sorted(found["users"].items(), key=lambda item: -item[1]["bytes"]):
        lines.append(f"  {size(of['bytes']):>10}  {user}, {of['artifacts']:,} artifacts")
    if found["unfinished"]:
        total = sum(one["bytes"] for one in found["unfinished"])
        wanted = sum(bool(one["needed_by"]) for one in found["unfinished"])
        count = len(found["unfinished"])
        lines += ["", f"unfinished trainings: {count}, {size(total)}; sweeps need {wanted} of them"]
    if found["leftovers"]:
        total = sum(one["bytes"] for one in found["leftovers"])
        lines += ["", f"leftovers of killed processes: {len(found['leftovers'])}, {size(total)}"]
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


def verdict_screen(verdict: Verdict) -> str:
    """What is damaged, by file, and what to do."""
    inventory, lines = verdict.inventory, []

    def named(path: Path) -> str:
        bucket = inventory.bucket
        return f"{bucket}/{path.relative_to(inventory.root)}" if bucket else near(path)

    for one in verdict.damaged:
        remedy = _indented(one.remedy) if one.remedy else f"  remove {named(one.remove)}"
        lines += [f"damaged: {named(one.file)}", f"  {one.why}", remedy]
    remedy = "counts for nothing" if inventory.bucket else "`airsweep cache gc` removes it"
    for left in inventory.leftovers[:SHOWN]:
        lines += [f"leftover: {named(left.path)}", f"  {left.why}; {remedy}"]
    lines += _more(len(verdict.inventory.leftovers))
    count = len(verdict.damaged)
    damaged = f"{count} damaged: do what is named and run again" if count else "none is damaged"
    lines.append(f"{verdict.files:,} files, {size(verdict.bytes)}: {damaged}")
    if verdict.unsealed:
        lines.append(
            f"{verdict.unsealed:,} of them have no checksum: whether they can be opened is all "
            "that can\nbe told"
        )
    return "\n".join(lines)


# ---------------------------------------------------------------- gc


def spoils_screen(spoils: Spoils, removed: bool) -> str:
    """What goes, or would go."""
    lines = []
    for one in spoils.removals[:SHOWN]:
        lines.append(f"{size(one.bytes):>10}  {shortened(_what(one, spoils.root))}")
        lines.append(f"{'':12}{one.why}; made by {one.user}")
    lines += _more(len(spoils.removals))
    total = f"{size(spoils.bytes)} at {len(spoils.removals):,} places"
    if not spoils.removals:
        lines.append("nothing to remove")
    elif removed:
        lines.append(f"removed {total}")
    else:
        lines.append(f"nothing was removed; --yes removes {total}")
    if spoils.sweep and spoils.removals:
        lines.append(f"{spoils.sweep} keeps its ledger; when it is run again it makes these again")
    if spoils.others:
        users = [user for user, _ in Counter(one.user for one in spoils.others).most_common()]
        more = f" and {len(users) - OWNERS} more" if len(users) > OWNERS else ""
        total = size(sum(one.bytes for one in spoils.others))
        lines += [
            f"{len(spoils.others):,} of others ({', '.join(users[:OWNERS])}{more}) stay, {total}:",
            "  --all-users lists them too, and with --yes removes them",
        ]
    return "\n".join(lines)


def _what(one: Removal, root: Path) -> str:
    name = str(one.path.relative_to(root)).removeprefix("artifacts/")
    return f"{len(one.files):,} blocks of {name}" if one.files else name


# ---------------------------------------------------------------- words


def _indented(text: str) -> str:
    return textwrap.fill(
        text,
        80,
        initial_indent="  ",
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _more(count: int) -> list[str]:
    return [f"... and {count - SHOWN:,} more; --json has all"] if count > SHOWN else []


def shortened(name: str) -> str:
    """A key with its digest, without the middle of a long slug."""
    if len(name) <= NAME_WIDTH:
        return name
    return f"{name[: NAME_WIDTH - 16]}...{name[-13:]}"

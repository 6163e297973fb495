"""Commands that list and clean up a store. Screens have at most 80 columns and begin with the
largest artifacts."""

from __future__ import annotations

import json
import textwrap
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.cli.common import STORE, JsonOption, StoreOption, location_named
from orchestrator.formatting import aligned, format_bytes, relative_path, show

if TYPE_CHECKING:
    from orchestrator.store.gc import Item, StoreRequirements

app = typer.Typer(no_args_is_help=True, help="List and clean up a store.")

LARGEST, SHOWN = 10, 20  # lines of a long list that are shown
NAME_WIDTH = 56


@app.command("ls")
def cache_ls(store: StoreOption = STORE, as_json: JsonOption = False) -> None:
    """List artifacts with their size, owner, and the sweeps that need them.

    airsweep cache ls

    airsweep cache ls --store /shared/runs --json
    """
    from orchestrator.planning.recorded import all_requirements
    from orchestrator.store import open_store
    from orchestrator.store.gc import contents

    opened = open_store(store)
    found, requirements = contents(opened), all_requirements(opened)
    artifacts = sorted(found.artifacts, key=lambda item: -item.bytes)
    listing = {
        "store": opened.name,
        "bytes": sum(item.bytes for item in artifacts),
        "stages": _stages(artifacts, requirements),
        "users": _users(artifacts),
        "sweeps": list(requirements.sweeps),
        "unread": dict(requirements.unreadable),
        "leftovers": [_plain(item, opened.root, "why", "bytes") for item in found.leftovers],
        "artifacts": [
            {
                "key": "/".join(item.path.parts[-3:]),
                "bytes": item.bytes,
                "images": item.images,
                "user": item.user,
                "needed_by": (needed_by := requirements.sweeps_needing(item.digest)),
                "unneeded_bytes": 0 if needed_by else item.bytes,
            }
            for item in artifacts
        ],
        "unfinished": [
            _plain(item, opened.root, "bytes")
            | {"needed_by": requirements.sweeps_needing(item.digest)}
            for item in found.unfinished
        ],
    }
    show(json.dumps(listing, indent=1) if as_json else _listing_screen(listing))


def _plain(item: Item, root: Path, *names: str) -> dict[str, Any]:
    path = str(item.path.relative_to(root))
    return {"path": path, **{name: getattr(item, name) for name in names}}


def _stages(items: Sequence[Item], requirements: StoreRequirements) -> dict[str, dict[str, int]]:
    """Totals by stage, in the order of their work."""
    from orchestrator.stages import STAGES

    groups: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        groups[item.path.parts[-3]].append(item)
    totals = {}
    for stage in sorted(groups, key=lambda name: ([*STAGES, name].index(name), name)):
        group = groups[stage]
        unneeded = [item for item in group if not requirements.sweeps_needing(item.digest)]
        totals[stage] = {
            "artifacts": len(group),
            "bytes": sum(item.bytes for item in group),
            "images": sum(item.images or 0 for item in group),
            "unneeded_artifacts": len(unneeded),
            "unneeded_bytes": sum(item.bytes for item in unneeded),
        }
    return totals


def _users(items: Sequence[Item]) -> dict[str, dict[str, int]]:
    sizes = Counter[str]()
    for item in items:
        sizes[item.user] += item.bytes
    counts = Counter(item.user for item in items)
    return {user: {"artifacts": counts[user], "bytes": size} for user, size in sizes.items()}


def _listing_screen(listing: dict[str, Any]) -> str:
    name, artifacts = listing["store"], listing["artifacts"]
    sweeps = len(listing["sweeps"]) + len(listing["unread"])
    counts = f"{len(artifacts):,} artifacts, {format_bytes(listing['bytes'])}"
    lines = [name if "://" in name else relative_path(Path(name))]
    lines += [f"{counts}; recorded sweeps: {sweeps}", ""]
    rows = [("stage", "artifacts", "images", "size", "unneeded")]
    for stage, group in listing["stages"].items():
        images = f"{group['images']:,}" if group["images"] else "-"
        unneeded = f"{group['unneeded_artifacts']:,}: {format_bytes(group['unneeded_bytes'])}"
        last = unneeded if group["unneeded_bytes"] else "-"
        rows.append((stage, f"{group['artifacts']:,}", images, format_bytes(group["bytes"]), last))
    lines += [*aligned(rows), "", "largest"]
    for artifact in artifacts[:LARGEST]:
        lines.append(f"  {format_bytes(artifact['bytes']):>10}  {_shorten_key(artifact['key'])}")
        names = [name.removeprefix("default/") for name in artifact["needed_by"]]
        more = f" and {len(names) - 2} more" if len(names) > 2 else ""
        needed = f"needed by {', '.join(names[:2])}{more}" if names else "no sweep needs it"
        lines.append(f"{'':14}{artifact['user']}; {needed}")
    titles = {"unfinished": "unfinished trainings", "leftovers": "leftovers of killed processes"}
    for key, title in titles.items():
        if listing[key]:
            total = sum(item["bytes"] for item in listing[key])
            lines += ["", f"{title}: {len(listing[key])}, {format_bytes(total)}"]
    for sweep, why in listing["unread"].items():
        lines += ["", f"the artifacts that {sweep} needs are unknown: {why}"]
    return "\n".join(lines)


@app.command("gc")
def cache_gc(
    store: StoreOption = STORE,
    yes: Annotated[
        bool, typer.Option("--yes", help="Remove the artifacts instead of listing them.")
    ] = False,
    sweep: Annotated[
        str | None,
        typer.Option(
            "--sweep", metavar="NAME", help="Only artifacts that just this recorded sweep needs."
        ),
    ] = None,
    all_users: Annotated[
        bool, typer.Option("--all-users", help="Include artifacts of other and unknown users.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """List your artifacts that no recorded sweep needs; with --yes, remove them.

    airsweep cache gc

    airsweep cache gc --sweep old_question --yes
    """
    from orchestrator.planning.recorded import all_requirements
    from orchestrator.store import open_store, user_name
    from orchestrator.store.gc import UNKNOWN, contents, removable, remove

    opened, me = open_store(store), user_name()
    name = location_named(sweep, store).full_name if sweep else None
    with opened.locks.exclusive_store():  # no sweep may start before the removal is complete
        requirements = all_requirements(opened)
        found = sorted(
            removable(contents(opened), requirements, me, name), key=lambda item: -item.bytes
        )
        removals = [item for item in found if all_users or item.user == me != UNKNOWN]
        if yes:
            remove(removals)
    others = [item for item in found if item not in removals]
    report = {
        "store": str(opened.root),
        "removed": yes,
        "bytes": sum(item.bytes for item in removals),
        "removals": [_plain(item, opened.root, "why", "bytes", "user") for item in removals],
        "others": [_plain(item, opened.root, "why", "bytes", "user") for item in others],
    }
    show(json.dumps(report, indent=1) if as_json else _gc_screen(report, name))


def _gc_screen(report: dict[str, Any], sweep: str | None) -> str:
    """The artifacts that were removed, or that `--yes` would remove."""
    lines, removals, others = [], report["removals"], report["others"]
    for item in removals[:SHOWN]:
        name = _shorten_key(item["path"].removeprefix("artifacts/"))
        lines += [f"{format_bytes(item['bytes']):>10}  {name}"]
        lines += [f"{'':12}{item['why']}; made by {item['user']}"]
    if len(removals) > SHOWN:
        lines.append(f"... and {len(removals) - SHOWN:,} more; --json lists all")
    total = f"{format_bytes(report['bytes'])} in {len(removals):,} items"
    if not removals:
        lines.append("nothing to remove")
    else:
        was = "removed" if report["removed"] else "nothing was removed; --yes removes"
        lines.append(f"{was} {total}")
    if sweep and removals:
        lines += [f"{sweep} keeps its event log; a new run makes the artifacts again"]
        lines += [f"to delete it, remove sweeps/{sweep} in the store, and its MLflow runs"]
    if others:
        size = format_bytes(sum(item["bytes"] for item in others))
        users = textwrap.shorten(", ".join(sorted({item["user"] for item in others})), 30)
        lines += [f"{len(others):,} of other users ({users}) stay, {size}:"]
        lines += ["  --all-users includes them, and removes them with --yes"]
    return "\n".join(lines)


def _shorten_key(name: str) -> str:
    """A key, shortened in the middle; its digest stays."""
    return name if len(name) <= NAME_WIDTH else f"{name[: NAME_WIDTH - 16]}...{name[-13:]}"

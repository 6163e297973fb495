"""A disk with no room left: how much more a sweep will take, and what to say."""

from __future__ import annotations

import shutil
from pathlib import Path
from statistics import fmean

from orchestrator.formatting import size
from orchestrator.planning.plan import Plan
from orchestrator.store import ArtifactStore


def bytes_left(plan: Plan, store: ArtifactStore) -> int:
    """What is left to make will take so much, judged by its like in the store.

    What has no like there counts nothing, so it can be more.
    """
    found = 0.0
    for requirement in plan.requirements:
        have, total = requirement.have(store), requirement.total()
        if have and have < total:
            found += requirement.bytes(store) / have * (total - have)
        elif not have:
            found += _mean(store.artifacts / requirement.stage) * (requirement.stage != "images")
    left = sum(not store.has(slot.spec) for slot in plan.slots) + plan.total - len(plan.slots)
    return round(found + _mean(store.artifacts / "trials") * left)


def _mean(stage: Path) -> float:
    """Bytes of an artifact of a stage; 0 if there is none."""
    sizes = [sum(file.stat().st_size for file in folder.glob("*")) for folder in stage.glob("*/*")]
    return fmean(sizes) if sizes else 0.0


def full(plan: Plan, store: ArtifactStore, what: str) -> str:
    """What to say of it.

    Args:
        what: what could not be written, or the error that says so.
    """
    there = shutil.disk_usage(store.root)
    left = bytes_left(plan, store)
    needed = f", at least {size(left)} more are needed" if left else ""
    gc = f"airsweep cache gc --store {store.root}"
    return (
        f"no room where the store lies, {store.root} ({what}): {size(there.free)} of "
        f"{size(there.total)} are free without what was half made{needed}; `{gc}` lists what no "
        "sweep needs; with more room the same command goes on where this run stopped"
    )

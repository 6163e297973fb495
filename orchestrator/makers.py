"""Who made what, as the ledgers of a store's sweeps tell: a block of images has no record.

A record says itself who made its artifact. Of a row it says who began it; others may have gone on
with it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.inventory import UNKNOWN, Inventory
from orchestrator.place import recorded_places
from orchestrator.store import ArtifactStore

Block = tuple[str, int, int]  # 12 digits of a row of images, class, block


@dataclass(frozen=True)
class Drawing:
    """One block, as the driver was told of it."""

    user: str
    sweep: str  # PROJECT/NAME
    seconds: float
    time: float  # since the epoch, when it was done
    devices: Mapping[str, float]  # cpu, gpu; empty: from before that was noted


@dataclass
class Makers:
    """By what stores find things by: 12 digits of a key."""

    sweeps: dict[str, str] = field(default_factory=dict)  # PROJECT/NAME that had it made first
    blocks: dict[Block, Drawing] = field(default_factory=dict)


def makers_of(store: ArtifactStore) -> Makers:
    """From every recorded sweep's ledger, each read once."""
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
    if made_nothing or not {"class", "block"} <= facts.keys():  # another sweep's was waited for
        return
    devices = {name: facts[name] for name in ("cpu", "gpu") if name in facts}
    block = (digest, int(facts["class"]), int(facts["block"]))
    # One that is drawn again, after damage, is whose that is.
    if block not in found.blocks or event["time"] > found.blocks[block].time:
        found.blocks[block] = Drawing(user, sweep, event["seconds"], event["time"], devices)


def rows_of_images(inventory: Inventory) -> dict[str, str]:
    """Of each row, images or features, by its digest the one of its images."""
    rows = {
        json.dumps(holding.record.get("spec"), sort_keys=True): holding.digest
        for holding in inventory.holdings
        if holding.stage == "images"
    }
    found = {digest: digest for digest in rows.values()}
    for holding in inventory.holdings:
        if holding.stage == "synthetic":
            spec = json.dumps(holding.record.get("spec", {}).get("images"), sort_keys=True)
            found[holding.digest] = rows.get(spec, holding.digest)
    return found

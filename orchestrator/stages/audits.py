"""Audit cards of a sweep: one for each row of synthetic images that its trials read.

They are kept beside the sweep (`audit-<row>.json` and `.png`) and made again where more images,
other splits or another edition of the audit are asked for. Imports no torch until one has to be
made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from orchestrator.planning.audit_card import (
    AuditCard,
    audited_by,
    card_files,
    known_card,
    ready,
)
from orchestrator.spec import SweepSpec
from orchestrator.store import SweepLocation

if TYPE_CHECKING:
    from orchestrator.stages.auditor import Report


def audit_cards(
    sweep: SweepSpec, location: SweepLocation, report: Callable[[str], Report] | None = None
) -> list[AuditCard]:
    """A card for each row of images that a sweep's trials read; made where it is missing.

    Args:
        report: gives, for the name of a row, what is told of images that were looked at.

    Returns:
        Cards in the order of the cells.

    Raises:
        ValueError: the sweep reads no images, or none is drawn yet.
    """
    found = []
    for row in ready(audited_by(sweep, location), location):
        card = known_card(row, location)
        if card is None:
            from orchestrator.stages.auditor import made  # it needs torch
            from orchestrator.stages.context import WorkerContext

            worker = WorkerContext(location.store, location.data_root)
            card, png = made(row, worker, report(row.name) if report else None)
            for name, content in card_files(card, png).items():
                location.write(name, content)
        found.append(card)
    return found

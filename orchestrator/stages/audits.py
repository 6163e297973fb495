"""Audit cards of a sweep: one for each row of synthetic images that its trials read.

Cards are files in the sweep's folder (`audit-<row>.json` and `.png`). A card is made again when
more images, other splits or another version of the audit are needed. This module imports torch only
when it makes a card.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from orchestrator.planning.audit_card import (
    AuditCard,
    audit_rows_of_sweep,
    card_files,
    complete_rows,
    stored_card,
)
from orchestrator.spec import SweepSpec
from orchestrator.store import SweepLocation

if TYPE_CHECKING:
    from orchestrator.stages.auditor import Report


def audit_cards(
    sweep: SweepSpec, location: SweepLocation, report: Callable[[str], Report] | None = None
) -> list[AuditCard]:
    """The audit card of each row of images that a sweep's trials read. Missing cards are made.

    Args:
        report: returns the progress callback of a row, given the row's name.

    Returns:
        Cards in the order of the cells.

    Raises:
        ValueError: the sweep reads no images, or none are drawn yet.
    """
    cards = []
    for row in complete_rows(audit_rows_of_sweep(sweep, location), location):
        card = stored_card(row, location)
        if card is None:
            from orchestrator.stages.auditor import make_card  # it needs torch
            from orchestrator.stages.context import WorkerContext

            worker = WorkerContext(location.store, location.data_root)
            card, png = make_card(row, worker, report(row.name) if report else None)
            for name, content in card_files(card, png).items():
                location.write(name, content)
        cards.append(card)
    return cards

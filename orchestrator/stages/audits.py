"""Audit cards of a sweep: of each row of synthetic images, and of the classifiers on each pool.

Cards are files in the sweep's folder (`audit-<row>.json`, with a picture `.png` for images). A card
is made again when its inputs, or the version of the audit, are others. This module imports torch
only when it makes a card.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from orchestrator.planning.audit_card import AuditRow
from orchestrator.planning.cards import (
    Card,
    Row,
    card_files,
    complete_rows,
    rows_of_sweep,
    stored_card,
)
from orchestrator.planning.requests import run_command
from orchestrator.spec import SweepSpec
from orchestrator.stages.context import WorkerContext
from orchestrator.store import SweepLocation

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from orchestrator.stages.auditor import Report


def audit_cards(
    sweep: SweepSpec, location: SweepLocation, report: Callable[[str], Report] | None = None
) -> list[Card]:
    """The cards of a sweep whose inputs exist. Missing cards are made.

    Args:
        report: returns the progress callback of a row, given the row's name.

    Returns:
        Cards in the order of the cells.

    Raises:
        ValueError: the sweep uses no diffusion model, or nothing is drawn or scored yet.
    """
    cards, rows = [], rows_of_sweep(sweep, location)
    complete = complete_rows(rows, location)
    if complete != rows:
        log.warning(
            "some images or denoising errors are not made yet, and the audit leaves them out; "
            "`%s --prepare` makes them",
            run_command(location),
        )
    for row in complete:
        card = stored_card(row, location)
        if card is None:
            worker = WorkerContext(location.store, location.data_root)
            card, png = make_card(row, worker, report(row.name) if report else None)
            for name, content in card_files(card, png).items():
                location.write(name, content)
        cards.append(card)
    return cards


def make_card(
    row: Row, worker: WorkerContext, report: Report | None = None
) -> tuple[Card, bytes | None]:
    """The card of a row, and its picture as PNG; None for cards without a picture.

    Raises:
        MissingArtifact: an input is missing.
    """
    from orchestrator.stages import agreement, auditor  # they need torch

    if isinstance(row, AuditRow):
        return auditor.make_card(row, worker, report)
    return agreement.make_agreement_card(row, worker), None

"""Audit cards of a sweep: one for each row of synthetic images that its trials read.

They are kept beside the sweep (`audit-<row>.json` and `.png`) and made again where more images,
other splits or another edition of the audit are asked for. Imports no torch until one has to be
made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from orchestrator.audit_card import AuditCard, Audited, audited, card_files, card_of
from orchestrator.place import Place
from orchestrator.plan import possible_trials
from orchestrator.store import ArtifactStore
from orchestrator.sweep import SweepSpec, cells_of

if TYPE_CHECKING:
    from orchestrator.auditor import Report


def audited_by(sweep: SweepSpec, place: Place) -> list[Audited]:
    """The rows that a sweep's trials read.

    Raises:
        ValueError: none is; or weights or data are not here.
    """
    resolver = place.resolver()
    found = audited(possible_trials(cells_of(sweep), sweep.seeds.assignments(), resolver))
    resolver.save()
    if not found:
        methods = ", ".join(sorted({cell.method for cell in cells_of(sweep)}))
        raise ValueError(
            f"sweep {place.project}/{place.name} reads no synthetic images ({methods}), so there "
            "is nothing to audit; methods that read some are air, air_fpl and air_grip"
        )
    return found


def ready(rows: Sequence[Audited], place: Place) -> list[Audited]:
    """Those whose images are all drawn.

    Raises:
        ValueError: none is.
    """
    whole = [row for row in rows if row.need.have(place.store) == row.need.total()]
    if not whole:
        have, total = (sum(counts) for counts in zip(*map(_drawn(place.store), rows), strict=True))
        raise ValueError(
            f"the images of sweep {place.project}/{place.name} are not drawn yet: {have} of "
            f"{total} blocks are in {place.store.name}; run it, or `airsweep prepare`, first"
        )
    return whole


def _drawn(store: ArtifactStore) -> Callable[[Audited], tuple[int, int]]:
    return lambda row: (row.need.have(store), row.need.total())


def known_card(row: Audited, place: Place) -> AuditCard | None:
    """The card that was kept; None: there is none, or of something else."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        card = card_of((place.folder / f"{row.name}.json").read_text())
        if card.asked == row.asked:
            return card
    return None


def audit_cards(
    sweep: SweepSpec, place: Place, report: Callable[[str], Report] | None = None
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
    for row in ready(audited_by(sweep, place), place):
        card = known_card(row, place)
        if card is None:
            from orchestrator.auditor import made  # it needs torch
            from orchestrator.workshop import Workshop

            shop = Workshop(place.store, place.data_root)
            card, png = made(row, shop, report(row.name) if report else None)
            for name, content in card_files(card, png).items():
                place.write(name, content)
        found.append(card)
    return found

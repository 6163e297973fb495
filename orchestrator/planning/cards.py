"""The audits of a sweep: which there are, their cards in the sweep's folder, and their output.

A row describes what is audited: a row of synthetic images (`audit_card`) or the classifiers on a
pool (`agreement_card`). `orchestrator.stages.audits` makes a card of it. This module imports no
torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

from orchestrator.planning.agreement_card import (
    AgreementCard,
    AgreementRow,
    agreement_rows,
    agreement_screen,
)
from orchestrator.planning.audit_card import AuditCard, AuditRow, audit_rows, audit_screen
from orchestrator.planning.plan import possible_trials
from orchestrator.planning.requests import results_command, run_command
from orchestrator.planning.resolve import Resolver, resolver_of, with_model_defaults
from orchestrator.spec import Cell, SweepSpec, cells_of
from orchestrator.store import ArtifactStore, SweepLocation

Row = AuditRow | AgreementRow
Card = AuditCard | AgreementCard


def rows_of(
    cells: Sequence[Cell], assignments: Sequence[Mapping[str, int]], resolver: Resolver
) -> list[Row]:
    """List what can be audited of the trials of some cells."""
    trials = possible_trials(cells, assignments, resolver)
    return [*agreement_rows(cells, assignments, resolver), *audit_rows(trials)]


def rows_of_sweep(sweep: SweepSpec, location: SweepLocation) -> list[Row]:
    """List what can be audited of a sweep.

    Raises:
        ValueError: no trial uses a diffusion model, or weights or data are missing.
    """
    resolver = resolver_of(location, sweep.folders)
    cells = cells_of(with_model_defaults(sweep, resolver))
    rows = rows_of(cells, sweep.seeds.assignments(), resolver)
    resolver.save()
    if not rows:
        methods = ", ".join(sorted({cell.method for cell in cells}))
        raise ValueError(
            f"sweep {location.full_name} reads no synthetic images and no denoising "
            f"evidence ({methods}), so there is nothing to audit; air and cpl_evidence read some"
        )
    return rows


def is_complete(row: Row, store: ArtifactStore) -> bool:
    """Whether the store has all images, features and denoising errors of a row."""
    return all(each.is_complete(store) for each in row.requirements)


def complete_rows(rows: Sequence[Row], location: SweepLocation) -> list[Row]:
    """Select the rows whose inputs all exist; of a pool, the trials whose inputs all exist.

    Raises:
        ValueError: no row is complete.
    """
    parts = [
        replace(row, trials=row.complete_trials(location.store))
        if isinstance(row, AgreementRow)
        else row
        for row in rows
    ]
    complete = [row for row in parts if row.requirements and is_complete(row, location.store)]
    if not complete:
        needed = {each.key: each for row in rows for each in row.requirements if each.rows}
        have = sum(each.have(location.store) for each in needed.values())
        total = sum(each.total() for each in needed.values())
        raise ValueError(
            f"the images and denoising errors of sweep {location.full_name} are not "
            f"made yet: {have} of {total} blocks are in {location.store.name}; run the sweep, or "
            f"`{run_command(location)} --prepare`, first"
        )
    return complete


# ---------------------------------------------------------------- files


def card_files(card: Card, png: bytes | None) -> dict[str, bytes]:
    """The files of a card by name. The JSON comes last: a card exists once its JSON exists."""
    picture = {} if png is None else {f"{card.name}.png": png}
    return {**picture, f"{card.name}.json": card_json(card).encode()}


def card_json(card: Card) -> str:
    """A card as the text of its file; the file calls the digest `asked`."""
    plain = asdict(card)
    plain["asked"] = plain.pop("inputs_digest")
    return json.dumps(plain, indent=1, sort_keys=True, allow_nan=False)


def card_from_json(text: str, kind: type[Card]) -> Card:
    """Read a card from the text of its file."""
    plain = json.loads(text)
    plain["inputs_digest"] = plain.pop("asked")
    return kind(**plain)


def stored_card(row: Row, location: SweepLocation) -> Card | None:
    """Read the stored card of a row; None if it is missing, damaged or of other inputs."""
    kind = AuditCard if isinstance(row, AuditRow) else AgreementCard
    with suppress(OSError, ValueError, TypeError, KeyError):
        card = card_from_json((location.folder / f"{row.name}.json").read_text(), kind)
        if card.inputs_digest == row.inputs_digest:
            return card
    return None


# ---------------------------------------------------------------- output of `airsweep audit`


def card_as_dict(card: Card) -> dict[str, Any]:
    """The output of `audit --json`; its keys are a contract."""
    plain = asdict(card)
    del plain["inputs_digest"]
    if isinstance(card, AgreementCard):
        return {"kind": "agreement", **plain}
    for name in ("classes", "flagged"):
        plain[name] = [{"class": entry.pop("classname"), **entry} for entry in plain[name]]
    return {"kind": "images", **plain}


def card_screen(card: Card, location: SweepLocation) -> str:
    """Format a card for a terminal of 80 columns."""
    if isinstance(card, AgreementCard):
        return agreement_screen(card)
    return audit_screen(card, results_command("audit", location, "--json"), location.folder)

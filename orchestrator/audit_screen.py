"""What `airsweep audit` prints of a card."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from orchestrator.audit_card import PICTURED, AuditCard, ClassLine, facts_of

WIDTH = 80
LISTED = 12  # flagged images on the screen; --json has all
WEAK = 3  # classes that are named


def audit_screen(card: AuditCard, sweep: str, folder: Path) -> str:
    """A card on at most WIDTH columns.

    Args:
        sweep: its name, for what to type.
        folder: where the card's picture lies.
    """
    lines = [f" {card.title}   {card.dataset}"]
    facts = [*facts_of(card), *_weak_classes(card)]
    labels = max(len(label) for label, _ in facts)
    for label, text in facts:
        lines += _folded(text, f" {label:<{labels}}   ")
    for one in card.flagged[:LISTED]:
        lines += _folded(one.sentence, f"   {one.reason:<13}   ")
    if len(card.flagged) > LISTED:
        more = len(card.flagged) - LISTED
        lines.append(f"   and {more:,} more: airsweep audit {sweep} --json")
    left = [f"`{name}` leaves {count:,}" for name, count in card.kept.items()]
    lines += _folded(f"{'; '.join(left)} of {card.images:,}", f" {'filter':<{labels}}   ")
    lines.append(f" {'look':<{labels}}   {folder / card.name}.png")
    return "\n".join(lines)


def _weak_classes(card: AuditCard) -> Iterator[tuple[str, str]]:
    def share(line: ClassLine) -> float:
        return 1.0 if line.recognised is None else line.recognised

    weak = [line for line in sorted(card.classes, key=share) if share(line) < 1][:WEAK]
    if weak:
        named = ", ".join(f"{line.classname!r} {share(line):.0%}" for line in weak)
        yield "weakest", f"{named}: how many CLIP takes for their class"


def _folded(text: str, lead: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=lead,
        subsequent_indent=" " * len(lead),
        break_long_words=False,
        break_on_hyphens=False,
    )


def card_for_scripts(card: AuditCard) -> dict[str, Any]:
    """The contract of `audit --json`: a card without what only its picture needs."""
    plain = asdict(card)
    for name in (*PICTURED, "asked"):
        del plain[name]
    plain["flagged"] = [
        {"class": one.pop("classname"), **one} for one in map(dict, plain["flagged"])
    ]
    plain["classes"] = [
        {"class": one.pop("classname"), **one} for one in map(dict, plain["classes"])
    ]
    return plain

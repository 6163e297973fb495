"""A sweep as one HTML file: whole, offline, the same bytes for the same data."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from orchestrator.evidence import Evidence
from orchestrator.sections import SECTIONS

TEMPLATE = Path(__file__).with_name("templates") / "report.html"


def page(found: Evidence) -> str:
    """The report: what came out, on what it rests, what it cost.

    Nothing in it tells when it was made; numbers, charts and pictures follow from the sweep's
    ledger and records alone.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    sections = [
        {"id": name, "title": title, "text": text, "groups": groups}
        for name, title, text, make in SECTIONS
        if (groups := list(make(found)))
    ]
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=found.sweep.name,
        question=re.split(r"\n\s*\n", found.sweep.question.strip()),
        sections=sections,
        footer=f"airsweep {_version()}, sweep {found.place.project}/{found.place.name}, "
        f"{len(found.entries)} results.",
    )
    return text + "\n"


def _version() -> str:
    try:
        return version("airsweep")
    except PackageNotFoundError:  # a checkout on the path, without installation
        return "(not installed)"

"""docs/method.md links formulas to the lines that compute them."""

from __future__ import annotations

import os
import re

from orchestrator.files import ROOT

PAGE = ROOT / "docs" / "method.md"
LINK = re.compile(r"\[`([^`]+)`\]\(\.\./(air_core/[\w/]+\.py)#L\d+\)")


def test_golden_links_of_formulas_lead_to_their_lines():
    """The text of a link is in this line of the file alone."""

    def linked(link: re.Match[str]) -> str:
        code, file = link.groups()
        lines = (ROOT / file).read_text().splitlines()
        found = [number for number, line in enumerate(lines, 1) if code in line]
        assert len(found) == 1, f"`{code}` is in {len(found)} lines of {file}"
        return f"[`{code}`](../{file}#L{found[0]})"

    page = LINK.sub(linked, PAGE.read_text())
    if os.environ.get("AIRSWEEP_UPDATE_GOLDEN") == "1":
        PAGE.write_text(page)
    assert page == PAGE.read_text(), "lines have moved; `make golden` writes their numbers"

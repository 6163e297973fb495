"""A plugin for tests: the pseudo-label strategy with a setting of docs/extending.md."""

from __future__ import annotations

from tests.helpers.documents import ROOT, blocks

PAGE = ROOT / "docs" / "extending.md"
MARGIN = next(block.text for block in blocks(PAGE) if block.file == "margin.py")

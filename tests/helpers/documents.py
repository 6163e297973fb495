"""What the documents show in fenced blocks: commands, Python, files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
# The first two make what the others look at.
FIRST = (ROOT / "README.md", ROOT / "docs" / "tutorial.md")
GUIDES = sorted({*(ROOT / "docs").glob("*.md")} - {*FIRST})
PAGES = (*FIRST, *GUIDES, ROOT / "cluster" / "README.md")

FENCE = re.compile(r" *```(\w*) *$")
# A comment above a block says what a reader does with it, or why nobody can run it here.
FILE = re.compile(r"<!-- file: (\S+) -->$")
NOT_RUN = re.compile(r"<!-- not run: (.+) -->$")
# A line of a block without a language is a command where it begins with one of these; anything else
# is what a command prints, or a picture of folders.
PROGRAMS = ("airsweep", "export", "hf", "make", "pip", "pytest", "python", "ray", "source")


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    page: Path
    line: int
    language: str
    text: str
    above: str  # the line before it

    @property
    def file(self) -> str | None:
        """Where a reader would put it."""
        found = FILE.match(self.above)
        return found[1] if found else None

    @property
    def not_run(self) -> str | None:
        """Why it is not run, where the page says so."""
        found = NOT_RUN.match(self.above)
        return found[1] if found else None

    def commands(self) -> list[str]:
        """Command lines, continued ones joined, without comments."""
        if self.language not in ("", "bash", "sh", "console"):
            return []
        joined = re.sub(r"\\\n *", "", self.text)
        # The closing screen has a space before its first word, `airsweep`.
        lines = (re.sub(r"\s+# .*", "", line).rstrip() for line in joined.splitlines())
        return [line for line in lines if line.split(" ", 1)[0] in PROGRAMS]


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    opened: tuple[int, str, str] | None = None  # line, language, what is above
    text: list[str] = []
    above = ""
    for number, line in enumerate(page.read_text().splitlines(), 1):
        fence = FENCE.match(line)
        if opened is None and fence:
            opened, text = (number, fence[1], above), []
        elif opened is not None and fence:
            start, language, before = opened
            yield Block(page, start, language, "\n".join(text) + "\n", before)
            opened = None
        elif opened is not None:
            text.append(line)
        above = line.strip() or above
    assert opened is None, f"{page}: the block of line {number} has no end"


def inline_commands(page: Path) -> list[str]:
    """`airsweep ...` within a sentence, over the end of a line too."""
    prose = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [" ".join(found.split()) for found in re.findall(r"`(airsweep\s[^`]*)`", prose)]


def links(page: Path) -> list[str]:
    """Where a page leads to, but for other sites and places within it."""
    found = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    return [link.partition("#")[0] for link in found if not re.match(r"[a-z]+:|#", link)]

"""Fenced blocks, commands and links of the documentation pages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
# The commands of the first two pages create the stores that the other pages use.
FIRST = (ROOT / "README.md", ROOT / "docs" / "tutorial.md")
GUIDES = sorted({*(ROOT / "docs").glob("*.md")} - {*FIRST})
PAGES = (*FIRST, *GUIDES, *(ROOT / folder / "README.md" for folder in ("benchmarks", "cluster")))

FENCE = re.compile(r" *```(\w*) *$")
# A comment above a block: the file name of the block, or the reason why the block is not run.
FILE = re.compile(r"<!-- file: (\S+) -->$")
NOT_RUN = re.compile(r"<!-- not run: (.+) -->$")
# A line of a block without a language is a command if it begins with one of these. Other lines are
# output or folder trees.
PROGRAMS = ("airsweep", "export", "hf", "make", "pip", "python", "ray", "source")


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    line: int
    language: str
    text: str
    above: str  # the line before the block

    @property
    def file(self) -> str | None:
        """The file name of the block, from the comment above it."""
        match = FILE.match(self.above)
        return match[1] if match else None

    @property
    def not_run(self) -> str | None:
        """Why the block is not run; None: it is run."""
        match = NOT_RUN.match(self.above)
        return match[1] if match else None

    def commands(self) -> list[str]:
        """Command lines without comments, with continued lines joined."""
        if self.language not in ("", "bash", "sh", "console"):
            return []
        joined = re.sub(r"\\\n *", "", self.text)
        # The closing screen has a space before its first word, `airsweep`.
        lines = (re.sub(r"\s+# .*", "", line).rstrip() for line in joined.splitlines())
        return [line for line in lines if line.split(" ", 1)[0] in PROGRAMS]


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    opened: tuple[int, str, str] | None = None  # line, language, line above
    text: list[str] = []
    above = ""
    for number, line in enumerate(page.read_text().splitlines(), 1):
        fence = FENCE.match(line)
        if opened is None and fence:
            opened, text = (number, fence[1], above), []
        elif opened is not None and fence:
            start, language, before = opened
            yield Block(start, language, "\n".join(text) + "\n", before)
            opened = None
        elif opened is not None:
            text.append(line)
        above = line.strip() or above
    assert opened is None, f"{page}: the block of line {number} has no end"


def inline_commands(page: Path) -> list[str]:
    """`airsweep ...` within sentences, also across line ends."""
    prose = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [" ".join(command.split()) for command in re.findall(r"`(airsweep\s[^`]*)`", prose)]


def links(page: Path) -> list[str]:
    """Targets of the links of a page, except other sites and anchors of the same page."""
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    return [link.partition("#")[0] for link in targets if not re.match(r"[a-z]+:|#", link)]

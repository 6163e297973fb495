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

BLOCK = re.compile(r"^ *```(\w*) *\n(.*?)^ *``` *$", re.DOTALL | re.MULTILINE)
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
    file: str | None  # its file name, from the comment above it
    not_run: str | None  # why it is not run, from the comment above it

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
    text = page.read_text()
    for block in BLOCK.finditer(text):
        before = text[: block.start()]
        above = before.rstrip().rpartition("\n")[2].strip()
        comments = (comment and comment[1] for comment in (FILE.match(above), NOT_RUN.match(above)))
        yield Block(before.count("\n") + 1, block[1], block[2], *comments)


def inline_commands(page: Path) -> list[str]:
    """`airsweep ...` within sentences, also across line ends."""
    prose = BLOCK.sub("", page.read_text())
    return [" ".join(command.split()) for command in re.findall(r"`(airsweep\s[^`]*)`", prose)]


def links(page: Path) -> list[str]:
    """Targets of the links of a page, except other sites and anchors of the same page."""
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    return [link.partition("#")[0] for link in targets if not re.match(r"[a-z]+:|#", link)]

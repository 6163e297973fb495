"""Golden files: texts in tests/golden that tests compare and `make golden` rewrites."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

GOLDEN = Path(__file__).parents[1] / "golden"


def check_golden(name: str, text: str) -> None:
    """Fail with a diff if a text differs from a golden file.

    AIRSWEEP_UPDATE_GOLDEN=1 writes the text to the file first.
    """
    file = GOLDEN / name
    if os.environ.get("AIRSWEEP_UPDATE_GOLDEN") == "1":
        file.write_text(text, encoding="utf-8")
    golden = file.read_text(encoding="utf-8")
    if text != golden:
        lines = golden.splitlines(), text.splitlines()
        diff = difflib.unified_diff(*lines, name, "now", n=8, lineterm="")  # 8: the case's name
        pytest.fail("\n".join(diff), pytrace=False)


def check_golden_cases(name: str, cases: Mapping[str, str]) -> None:
    """As `check_golden`, for the text of each case below its name."""
    check_golden(name, "".join(f"== {case}\n{text}\n" for case, text in cases.items()))


SWEEP = "version: 1\nname: x\n"  # two lines, so that what a case adds starts on line 3


def check_sweeps(
    name: str,
    message_of: Callable[[Any], str],
    others: Mapping[str, str | bytes] = {},
    before: str = SWEEP,
) -> None:
    """As `check_golden_cases`, for the message about each of some wrong sweep files.

    Args:
        name: a golden file; a case is what it adds to `before`, and `-> ` with the message.
        message_of: the message about the text of a sweep file.
        others: whole texts by case, which the golden file does not contain.
    """
    sections = f"\n{(GOLDEN / name).read_text(encoding='utf-8')}".split("\n== ")[1:]
    cases = {case: text for case, _, text in (s.partition("\n") for s in sections)}
    lines = {case: f"{text.rstrip()}\n".partition("-> ")[0] for case, text in cases.items()}
    lines |= dict.fromkeys(others, "")
    found = {}
    for case, added in lines.items():
        message = message_of(others.get(case, before + added))
        found[case] = added + "-> " + message.replace("\n", "\n-> ")
    check_golden_cases(name, found)


def check_refusals(
    name: str,
    run: Callable[..., tuple[int, str, str]],
    *cases: tuple[str | Path, ...],
    **folders: Path,
) -> None:
    """As `check_golden_cases`, for the message about each of some wrong arguments.

    Args:
        run: runs a command with arguments; returns its exit code, which must be 2 or 3, stdout,
            which must be empty, and stderr. The file has an exit code of 3.
        folders: replaced by `<name>`; a folder inside another one comes first.
    """
    found = {}
    for words in cases:
        done = run(*words)
        assert done[:2] in ((2, ""), (3, "")), (words, done)
        code = "exit code 3: " if done[0] == 3 else ""
        text = f"{' '.join(map(str, words))}\n{code}{done[2].rstrip()}"
        for folder, path in folders.items():
            text = text.replace(str(path), f"<{folder}>")
        case, found[case] = text.split("\n", 1)
    check_golden_cases(name, found)

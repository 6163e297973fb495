"""Golden files: texts in tests/golden that tests compare and `make golden` rewrites."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping
from pathlib import Path

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
        pytest.fail("\n".join(difflib.unified_diff(*lines, name, "now", n=4, lineterm="")))


def check_golden_cases(name: str, cases: Mapping[str, str]) -> None:
    """As `check_golden`, for the text of each case below its name."""
    check_golden(name, "".join(f"== {case}\n{text}\n" for case, text in cases.items()))


def golden_cases(name: str) -> dict[str, str]:
    """The lines of each case of a golden file."""
    sections = f"\n{(GOLDEN / name).read_text(encoding='utf-8')}".split("\n== ")[1:]
    return {case: f"{text.strip()}\n" for case, _, text in (s.partition("\n") for s in sections)}


def check_refusals(
    name: str,
    run: Callable[..., tuple[int, str, str]],
    *cases: tuple[str | Path, ...],
    code: int = 2,
    **folders: Path,
) -> None:
    """As `check_golden_cases`, for the message about each of some wrong arguments.

    Args:
        run: runs a command with arguments; returns its exit code, stdout and stderr.
        code: the exit code that each command must have; stdout must be empty.
        folders: replaced by `<name>`; a folder inside another one comes first.
    """
    found = {}
    for words in cases:
        done = run(*words)
        assert done[:2] == (code, ""), (words, done)
        text = f"{' '.join(map(str, words))}\n{done[2].rstrip()}"
        for folder, path in folders.items():
            text = text.replace(str(path), f"<{folder}>")
        case, found[case] = text.split("\n", 1)
    check_golden_cases(name, found)

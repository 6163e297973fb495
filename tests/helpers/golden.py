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
        diff = difflib.unified_diff(*lines, name, "now", n=4, lineterm="")  # 4: the case's name
        pytest.fail("\n".join(diff), pytrace=False)


def check_golden_cases(name: str, cases: Mapping[str, str]) -> None:
    """As `check_golden`, for the text of each case below its name."""
    check_golden(name, "".join(f"== {case}\n{text}\n" for case, text in cases.items()))


def golden_cases(name: str) -> dict[str, str]:
    """The lines of each case of a golden file."""
    sections = f"\n{(GOLDEN / name).read_text(encoding='utf-8')}".split("\n== ")[1:]
    return {case: f"{text.rstrip()}\n" for case, _, text in (s.partition("\n") for s in sections)}


def check_refusals(
    name: str,
    run: Callable[..., tuple[int, str, str]],
    *cases: tuple[str | Path, ...],
    **folders: Path,
) -> None:
    """As `check_golden_cases`, for the message about each of some wrong arguments.

    Args:
        run: runs a command with arguments; returns its exit code, which must be 2, stdout, which
            must be empty, and stderr.
        folders: replaced by `<name>`; a folder inside another one comes first.
    """
    found = {}
    for words in cases:
        done = run(*words)
        assert done[:2] == (2, ""), (words, done)
        text = f"{' '.join(map(str, words))}\n{done[2].rstrip()}"
        for folder, path in folders.items():
            text = text.replace(str(path), f"<{folder}>")
        case, found[case] = text.split("\n", 1)
    check_golden_cases(name, found)

"""Random edits of the shipped sweep files: `plan` plans each, or refuses it with a position."""

from __future__ import annotations

import re
from collections import Counter
from copy import deepcopy
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from orchestrator.spec import SpecError
from orchestrator.spec.marked_yaml import parse
from tests.helpers.sweeps import in_this_process

SHIPPED = [
    file.read_text() for file in sorted((Path(__file__).parents[2] / "sweeps").rglob("*.yaml"))
]
WITH_DATA = [text for text in SHIPPED if "digits" in text]

NUMBERS = st.one_of(
    st.sampled_from([0, -1, 1.5, 2**31, 2**32, 2**63, 10**17, 10**40, 1e308, 5e-324, -0.0]),
    st.integers(),
    st.floats(),
)
WORDS = ["", "~", "~nosuchuser/x", "folder:~nosuchuser/x", "{}", "AIR", "digts", "1e999", "12h"]
LONG = ["\x00", "\u202e", "\U0010ffff", "x" * 300, "folder:" + "x" * 300, "[" * 90 + "]" * 90]
# Not all names: a further setting would change the examples.
NAMES = ["method", "dataset", "lora", "lora.rank", "train.steps", "seed", "iterations"]
TEXTS = st.sampled_from([*WORDS, *LONG]) | st.sampled_from(NAMES) | st.text(max_size=20)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=12,
)


def edit_value(draw: st.DrawFn, text: str) -> str:
    """Delete, duplicate, replace or rename one value."""
    try:
        document = parse(text, "")
    except SpecError:
        return text
    paths = [keys for keys in document.positions if keys]
    if not paths:
        return text
    *above, last = draw(st.sampled_from(paths))
    parent = document.value_at(tuple(above))
    kind = draw(st.sampled_from(("delete", "duplicate", "replace", "copy", "number", "rename")))
    value = parent[last]
    if kind == "replace":
        parent[last] = draw(VALUES)
    elif kind == "copy":
        parent[last] = deepcopy(document.value_at(draw(st.sampled_from(paths))))
    elif kind == "number":
        parent[last] = draw(st.integers(0, 40) | st.floats(0, 1))
    elif kind == "duplicate" and isinstance(parent, list):
        parent += [value] * draw(st.integers(1, 40))
    else:
        del parent[last]
        if kind != "delete" and isinstance(parent, dict):
            parent[draw(TEXTS)] = value
    return yaml.safe_dump(document.value, sort_keys=False, allow_unicode=True)


def edit_text(draw: st.DrawFn, text: str) -> str:
    """Insert some characters anywhere."""
    at = draw(st.integers(0, len(text)))
    pieces = [*"[]{}:,#&*!|>'\"%@`?-~\\ \t\n", "<<: ", "---", '"\\U00110000"', "!!int "]
    return text[:at] + draw(st.sampled_from(pieces) | st.text(max_size=3)) + text[at:]


@st.composite
def edited_sweeps(draw: st.DrawFn) -> str:
    text = draw(st.sampled_from(SHIPPED) | st.sampled_from(WITH_DATA))
    for _ in range(draw(st.sampled_from((1, 1, 1, 2, 3)))):
        text = draw(st.sampled_from((edit_value, edit_value, edit_text)))(draw, text)
    return text


@pytest.mark.parametrize("edits", [150, pytest.param(2_000, marks=pytest.mark.exhaustive)])
def test_an_edited_sweep_file_is_planned_or_refused_with_a_position(edits, tmp_path):
    file, codes = tmp_path / "x.yaml", Counter[int]()

    @settings(
        max_examples=edits,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(edited_sweeps())
    def check(text: str) -> None:
        file.write_text(text, encoding="utf-8", errors="surrogatepass")
        words = ["--debug", "plan", str(file), "--store", str(tmp_path / "runs")]
        try:
            done = in_this_process(words)
            code, error = done.returncode, done.stderr
        except SpecError as problem:  # --debug shows the traceback of everything else
            code, error = 2, str(problem)
        codes[code] += 1
        assert code in (0, 2), error
        if code == 2:
            assert re.match(rf"{re.escape(str(file))}:\d+:\d+: .", error), error

    check()
    assert min(codes[0], codes[2]) > 0

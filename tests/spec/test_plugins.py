"""Plugins: what a file can add, what its code changes, and how mistakes are reported."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from air_core.settings import Ref
from air_core.settings.components import STRATEGIES
from air_core.settings.flat import from_flat, to_flat, trial_keys
from air_core.settings.normal import normalised
from orchestrator.plugins import use_plugins
from orchestrator.spec import SpecError, cells_of, load_sweep, sweep_schema
from tests.helpers.golden import SWEEP, check_sweeps
from tests.helpers.plugins import MARGIN, TIP_ADAPTER
from tests.helpers.sweeps import write_sweep

REFS = {name: Ref(name=name, digest=name) for name in ("dataset", "backbone", "generator")}
BODY = """plugins: [margin.py]
fixed: {method: pseudo, pseudo_labels.margin.tau: 0.3}
grid: {pseudo_labels.kind: [margin, threshold]}
"""


@pytest.fixture(autouse=True)
def no_plugin_left():
    yield
    use_plugins([])


@pytest.fixture
def spec(tmp_path) -> Path:
    (tmp_path / "margin.py").write_text(MARGIN)
    return write_sweep(tmp_path, "small", BODY)


def test_a_plugin_adds_a_choice_with_its_settings(spec):
    sweep = load_sweep(spec)
    assert [cell.flat["pseudo_labels.kind"] for cell in cells_of(sweep)] == ["margin", "threshold"]
    assert trial_keys()["pseudo_labels.margin.tau"].default == 0.2
    settings = sweep_schema()["properties"]["fixed"]["properties"]
    assert settings["pseudo_labels.margin.tau"]["maximum"] == 1
    assert "margin" in settings["pseudo_labels.kind"]["enum"]
    load_sweep(write_sweep(spec.parent, "plain", "fixed: {method: fpl}\n"))
    assert "margin" not in STRATEGIES
    assert "pseudo_labels.margin.tau" not in trial_keys()
    settings = sweep_schema()["properties"]["fixed"]["properties"]
    assert "pseudo_labels.margin.tau" not in settings
    assert "margin" not in settings["pseudo_labels.kind"]["enum"]


def test_settings_of_a_plugin_are_complete_where_it_is_used_and_absent_elsewhere(spec):
    load_sweep(spec)
    margin = normalised(from_flat({"pseudo_labels.kind": "margin"}, REFS))
    assert to_flat(margin)["pseudo_labels.margin.tau"] == 0.2
    assert from_flat({**to_flat(margin), "lora": None}, REFS).pseudo_labels.own == (
        ("margin.tau", 0.2),
    )
    other = from_flat({"pseudo_labels.margin.tau": 0.9}, REFS)
    assert normalised(other) == normalised(from_flat({}, REFS))
    # The number of images per class matters to it.
    fixed = {"pseudo_labels.kind": "margin", "pseudo_labels.growth": "fixed"}
    few, many = (from_flat({**fixed, "pseudo_labels.k": k}, REFS) for k in (4, 8))
    assert normalised(few).pseudo_labels.k == 4
    assert normalised(few) != normalised(many)


def test_messages_about_mistakes_in_a_plugin_equal_the_golden_ones(tmp_path):
    """They name both files and lines, of which the first imports."""
    imports = "from air_core.settings.components import *\n"

    def message(text):
        (tmp_path / "mine.py").write_text(imports + text.removeprefix(SWEEP))
        spec = write_sweep(tmp_path, "small", "plugins: [mine.py]\nfixed: {method: fpl}\n")
        with pytest.raises(SpecError) as error:
            load_sweep(spec)
        return str(error.value).replace(f"{tmp_path}/", "")

    check_sweeps("messages/plugins.txt", message)


def test_two_plugins_must_exist_and_cannot_add_the_same_component(spec):
    again = spec.parent / "again.py"
    spec.write_text(spec.read_text().replace("[margin.py]", "[margin.py, again.py]"))
    with pytest.raises(SpecError, match=r"again\.py is not a \.py file that exists"):
        load_sweep(spec)
    again.write_text(MARGIN + "\n")
    with pytest.raises(ValueError, match=r"'margin' is added twice: by .*margin\.py:margin and by"):
        load_sweep(spec)


def test_plugin_check_runs_the_contract(command, spec):
    file = spec.parent / "margin.py"
    (spec.parent / "tip.py").write_text(
        TIP_ADAPTER.replace("self.keys.to(", "self.keys.detach().to(")
    )
    code, _, err = command("plugin", "check", spec.parent / "tip.py")
    assert code == 2
    assert "modality 'tip_adapter': `logits` must be differentiable in `prompt`" in err
    code, out, _ = command("plugin", "check", file)
    assert code == 0
    assert "pseudo_labels.margin.tau: 0.2  (a number >= 0 and <= 1)" in out
    for right, wrong, message in (
        ("PseudoLabels(chosen,", "PseudoLabels(chosen * 0,", f"{file}: .*distinct images"),
        ("one_hot(labels, scores.shape[1])", "one_hot(labels, 9)", r"must be \(M, C\)"),
        ("topk(2,", "topk(200,", rf"{file}:\d+: .*out of range"),
    ):
        file.write_text(MARGIN.replace(right, wrong))
        code, _, err = command("plugin", "check", file)
        assert code == 2
        assert re.search(message, err)

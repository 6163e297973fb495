"""Which code a stage reaches, and what happens to what other code has made."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from air_core.specs import FeaturesSpec
from orchestrator.freshness import accept, remedy, stale
from orchestrator.reached import code_of, reached
from orchestrator.store import ArtifactStore

ROOT = Path(__file__).parents[2]
METHOD = "air_core.method.learn"


def names(*entries: str) -> set[str]:
    return {one.name for one in reached(entries, None)}


def test_the_method_reaches_its_parts_through_tables_classes_and_what_passes_them_on():
    assert names(METHOD) >= {
        "air_core.training.fit",
        "air_core.pseudo_labels.candidates.candidates",  # a row of a table
        "air_core.prompts.visual.VisualPrompt",
        "air_core.backbone.clip.Backbone",  # an annotation, through a package that passes it on
        "air_core.backbone.blocks.run_block",
        "air_core.method.FADED",  # a constant
    }


def test_the_method_knows_no_diffusion_and_no_files():
    assert not [name for name in names(METHOD) if ".diffusion." in name or ".datasets." in name]


def test_the_method_stays_small():
    assert sum(one.lines for one in reached([METHOD], None)) < 2000  # specs and types beside it


def test_only_rows_that_a_spec_names_count(trial):
    growing, fixed = code_of(trial("air_grip")), code_of(trial("air"))
    assert "air_core.pseudo_labels.candidates.candidates" in fixed.parts
    assert "air_core.pseudo_labels.candidates.candidates" not in growing.parts
    digits = code_of(trial("air").features)
    assert "air_core.datasets.digits.DATASET" in digits.parts
    assert "air_core.datasets.cub.DATASET" not in digits.parts


# ---------------------------------------------------------------- edits, in a copy of the code


COMMAND = """
from orchestrator.reached import _code
words = frozenset({"digits", "candidates", "cc", "ul"})
print(*(_code(stage, words).digest for stage in ("features", "labels", "trials")))
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("copy")
    for package in ("air_core", "orchestrator"):
        shutil.copytree(
            ROOT / package,
            folder / package,
            ignore=shutil.ignore_patterns("weights", "__pycache__"),
        )
    return folder


def digests(folder: Path) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", COMMAND], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


EDITS = [
    # file, old, new, which of features, labels, trials change
    ("training.py", "MOMENTUM = 0.9", "MOMENTUM = 0.8", [False, False, True]),
    ("training.py", "MOMENTUM = 0.9", "MOMENTUM  =  0.9  # a comment", [False] * 3),
    ("classifiers.py", '"""Blend the text', '"""Mix the text', [False] * 3),
    ("classifiers.py", ".softmax(", ".mul(1.0).softmax(", [False, True, True]),
    ("datasets/digits.py", "16", "17", [True, True, False]),
    ("datasets/cub.py", '"1": "train"', '"2": "train"', [False] * 3),
    ("pseudo_labels/threshold.py", ">=", ">", [False] * 3),
    ("specs.py", "ge=1", "ge=2", [False] * 3),
]


@pytest.mark.parametrize(("file", "old", "new", "expected"), EDITS)
def test_an_edit_changes_the_stages_that_reach_it_and_no_other(copy, file, old, new, expected):
    path = copy / "air_core" / file
    text = path.read_text()
    assert old in text
    before = digests(copy)
    try:
        path.write_text(text.replace(old, new))
        after = digests(copy)
    finally:
        path.write_text(text)
    assert [a != b for a, b in zip(before, after, strict=True)] == expected


# ---------------------------------------------------------------- artifacts of other code


@pytest.fixture
def made(trial, tmp_path, monkeypatch) -> tuple[FeaturesSpec, ArtifactStore]:
    """Features that code with another constant has made."""
    from orchestrator import reached as module

    spec, store = trial("cpl").features, ArtifactStore(tmp_path)
    today = module.code_of(spec)
    parts = {**today.parts, "air_core.datasets.digits.DATASET": "0" * 12}
    other = replace(today, parts=parts, digest="0" * 12)
    monkeypatch.setattr("orchestrator.store.code_of", lambda spec: other)
    store.get_or_build(spec, lambda folder: {})
    monkeypatch.undo()
    return spec, store


def test_what_other_code_made_is_named_with_stage_file_and_definition(made):
    spec, store = made
    (found,) = stale([spec], store)
    assert str(found) == (
        "features: code changed since 1 was made (air_core/datasets/digits.py: DATASET)"
    )
    assert "--accept-code features" in remedy([found])


def test_what_was_accepted_counts_until_the_code_changes_again(made, monkeypatch):
    spec, store = made
    accept(stale([spec], store), "default/x", store)
    assert stale([spec], store) == ()
    third = replace(code_of(spec), digest="1" * 12)
    monkeypatch.setattr("orchestrator.freshness.code_of", lambda spec: third)
    assert len(stale([spec], store)) == 1


def test_what_this_code_made_is_fresh(trial, tmp_path):
    spec, store = trial("cpl").features, ArtifactStore(tmp_path)
    store.get_or_build(spec, lambda folder: {})
    assert store.code(spec) == code_of(spec).digest
    assert stale([spec], store) == ()

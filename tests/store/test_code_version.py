"""Code versions: which edits change the keys of a stage."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from air_core.datasets import DATASETS
from orchestrator.keys import artifact_key
from orchestrator.stages import STAGES
from orchestrator.stages.trial import reader_of
from orchestrator.store.code_version import (
    COMPONENTS,
    PARTS,
    RECORDED,
    imported,
    part_version,
    stage_version,
)

ROOT = Path(__file__).parents[2]
READERS = sorted({reader_of(name) for name in DATASETS} | {reader_of("folder:x")})


def test_golden_every_version_is_that_of_its_recipe():
    """Fails when the code of a stage has changed. If results may differ, increase `recipe` of its
    spec (for a dataset, that of features), so that its artifacts get new keys; then, or if results
    are the same, `make golden` records the version."""
    now = {name: stage_version(spec) for name, spec in STAGES.items()}
    now |= {part: part_version(part) for part in (*PARTS, *READERS)}
    if os.environ.get("AIRSWEEP_UPDATE_GOLDEN"):
        RECORDED.write_text(json.dumps(now, indent=1, sort_keys=True) + "\n")
    assert json.loads(RECORDED.read_text()) == now


@pytest.mark.parametrize("part", PARTS)
def test_modules_imported_by_a_part_belong_to_it_or_to_the_stage_that_uses_it(part):
    stage = "lora" if part.startswith("family:") else "trials"
    counted = imported(STAGES[stage].modules)
    module = PARTS[part].partition(":")[0]
    assert imported([module]).keys() <= {module, *counted}


def test_a_stage_counts_no_component_that_it_does_not_name():
    """A component is found through its registry; it would change the keys of all trials."""
    named = {"TextPrompt"}  # `logits_together` names it
    for target in COMPONENTS.values():
        module, _, name = target.partition(":")
        assert name in named or name not in imported(STAGES["trials"].modules).get(module, ())


# ---------------------------------------------------------------- edits, in a copy of the code

EDITED = (
    *("features", "lora", "images", "labels", "trials", "datasets.digits"),
    *("pseudo_labels.kind:threshold", "auxiliary.kind:lda", "modality:visual"),
    "family:FluxPipeline",
)
COMMAND = f"""
from orchestrator.stages import STAGES
from orchestrator.store.code_version import part_version, stage_version
for part in {EDITED}:
    print(stage_version(STAGES[part]) if part in STAGES else part_version(part))
"""
EDITS = [
    # file, old, new, which of EDITED change
    ("training.py", "MOMENTUM = 0.9", "MOMENTUM = 0.8", {"trials"}),
    ("training.py", "MOMENTUM = 0.9", "MOMENTUM  =  0.9  # a comment", set()),
    ("pseudo_labels.py", "confidence >= min", "confidence > min", {"pseudo_labels.kind:threshold"}),
    ("pseudo_labels.py", "all images of at least this", "images of this", set()),
    ("pseudo_labels.py", "choice[proposing] = -1", "choice[proposing] = -2", {"labels", "trials"}),
    ("prompts.py", "-0.5", "-0.4", {"modality:visual"}),
    ("auxiliary.py", "SHRINKAGE = 0.2", "SHRINKAGE = 0.3", {"auxiliary.kind:lda"}),
    ("classifiers.py", "Gives logits for", "Makes logits of", set()),
    ("datasets/digits.py", "16", "17", {"datasets.digits"}),
    ("diffusion/lora.py", "WARMUP = 0.1", "WARMUP = 0.2", {"lora"}),
    ("diffusion/families/flux.py", "GUIDANCE = 1.0", "GUIDANCE = 2.0", {"family:FluxPipeline"}),
    ("diffusion/pipeline.py", "thrift: int", "thrift: float", {"lora", "images"}),
    (
        "backbone/clip.py",
        "import torch\n",
        "import torch\nX = 1\n",
        {"features", "labels", "trials"},
    ),
    ("settings/__init__.py", "ge=1", "ge=2", set()),
]


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("copy")
    for package in ("air_core", "orchestrator"):
        ignored = shutil.ignore_patterns("weights", "__pycache__")
        shutil.copytree(ROOT / package, folder / package, ignore=ignored)
    return folder


@pytest.fixture(scope="module")
def before(copy) -> dict[str, str]:
    return versions(copy)


def versions(folder: Path) -> dict[str, str]:
    command = [sys.executable, "-c", COMMAND]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return dict(zip(EDITED, done.stdout.split(), strict=True))


@pytest.mark.parametrize(("file", "old", "new", "expected"), EDITS)
def test_an_edit_changes_the_parts_that_contain_its_module(copy, before, file, old, new, expected):
    path = copy / "air_core" / file
    text = path.read_text()
    assert old in text
    try:
        path.write_text(text.replace(old, new))
        after = versions(copy)
    finally:
        path.write_text(text)
    assert {part for part in EDITED if before[part] != after[part]} == expected


def test_renaming_a_module_changes_no_version(copy, before, tmp_path):
    renamed = shutil.copytree(copy, tmp_path / "renamed")
    (renamed / "air_core" / "training.py").rename(renamed / "air_core" / "fitting.py")
    for file in (*renamed.rglob("air_core/**/*.py"), *renamed.rglob("orchestrator/stages/*.py")):
        file.write_text(file.read_text().replace("air_core.training", "air_core.fitting"))
    assert versions(renamed) == before


def test_a_changed_version_changes_the_keys_of_its_stage_and_later_stages(trial):
    """Trials change alone; a LoRA also changes the images and trials that use it."""
    spec = trial("air")
    keys = _keys(spec)
    edited = _keys(replace(spec, versions=(("trials", "0" * 12),)))
    assert {name for name in keys if keys[name] != edited[name]} == {"trials"}
    lora = (("lora", "0" * 12),)
    edited = _keys(replace(spec, versions=lora))
    assert {name for name in keys if keys[name] != edited[name]} == {"lora", "images", "trials"}
    assert artifact_key(trial("fpl")) == artifact_key(replace(trial("fpl"), versions=lora))


def _keys(spec):
    specs = {"features": spec.features, "lora": spec.lora_adapter, "images": spec.images}
    return {name: artifact_key(stage) for name, stage in {**specs, "trials": spec}.items()}

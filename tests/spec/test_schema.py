"""The JSON schema for editors accepts the same files as the reader and refuses common mistakes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from orchestrator.spec import sweep_schema
from orchestrator.spec._trial_values import trial_names
from orchestrator.spec.marked_yaml import parse, read
from orchestrator.spec.sweep_file import sweep_from_document
from tests.helpers.spec_reference import refresh_tables
from tests.spec.test_sweep_file import BAD, FULL

ROOT = Path(__file__).parents[2]
SCHEMA = sweep_schema()
VALIDATOR = jsonschema.Draft7Validator(SCHEMA)
SETTINGS = SCHEMA["properties"]["fixed"]["properties"]
AIR = "version: 1\nname: x\nfixed: {method: air}\n"


def errors_of(text: str) -> list[str]:
    value = parse(text, "x.yaml").value
    return [error.message for error in VALIDATOR.iter_errors(value)]


@pytest.mark.parametrize("file", sorted((ROOT / "sweeps").rglob("*.yaml")), ids=lambda f: f.stem)
def test_the_schema_accepts_every_shipped_sweep(file):
    assert list(VALIDATOR.iter_errors(read(file).value)) == []


@pytest.mark.parametrize(
    "more",
    [
        "",
        "search: {points: 3, space: {iterations: {values: [1, 2]}}}\n",
        "resources: {wait: 90s}\n",
        "resources: {wait: 5400}\n",
        "seeds: {values: [[1, 301], 2], vary: [seed, split_seed]}\n",
        "resources: {generator: {actors: null}}\n",
        "overrides: [{when: {lora: true, method: [air, air_fpl]}, set: {lora.rank: 2}}]\n",
        "project: team\ntracking: {uri: none}\ndata_root: /data\n",
    ],
)
def test_the_schema_accepts_files_that_the_reader_accepts(more):
    for text in (FULL, AIR + more):
        sweep_from_document(parse(text, "x.yaml"))
        assert errors_of(text) == []


@pytest.mark.parametrize(
    "name",
    [
        *("no version", "version 2", "name with a slash", "no method", "unknown part"),
        *("unknown key", "unknown word", "over the limit", "grid without a list"),
        *("seeds that are not a list", "seeds without values", "empty space", "half a range"),
        *("images in space", "method in space", "range of words"),
        *("duration without unit", "unknown resource"),
        *("override of an unknown key", "override of the method"),
    ],
)
def test_the_schema_refuses_invalid_keys_and_values(name):
    assert errors_of(BAD[name])


def test_the_schema_is_valid_and_describes_every_key():
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    assert list(SETTINGS) == list(trial_names())
    assert [path for path, part in _properties(SCHEMA, "") if not part.get("description")] == []


# Keys without a description: their names suffice.
UNDESCRIBED = ("seeds.values", "search.space.")


def _properties(schema: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for option in (schema, *(s for s in schema.get("anyOf", ()) if "type" in s)):
        for name, part in option.get("properties", {}).items():
            inner = f"{path}.{name}".strip(".")
            if not inner.startswith(("grid.", *UNDESCRIBED)):
                yield inner, part
            yield from _properties(part, inner)


def test_golden_the_spec_reference_matches_the_schema():
    file = ROOT / "docs" / "spec_reference.md"
    page = refresh_tables(file.read_text())
    if os.environ.get("AIRSWEEP_UPDATE_GOLDEN") == "1":
        file.write_text(page)
    assert page == file.read_text()
    for name in trial_names():
        assert f"| `{name}` |" in page


def test_the_modeline_of_an_editor_is_not_part_of_the_question():
    line = "# yaml-language-server: $schema=airsweep.schema.json\n"
    assert (
        sweep_from_document(parse(line + FULL, "x")).question
        == sweep_from_document(parse(FULL, "x")).question
    )

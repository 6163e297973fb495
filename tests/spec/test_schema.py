"""The JSON schema for editors accepts the same files as the reader and refuses common mistakes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema

from orchestrator.spec import sweep_schema
from orchestrator.spec._trial_values import trial_names
from tests.helpers.spec_reference import refresh_tables

ROOT = Path(__file__).parents[2]
SCHEMA = sweep_schema()
VALIDATOR = jsonschema.Draft7Validator(SCHEMA)
SETTINGS = SCHEMA["properties"]["fixed"]["properties"]
AIR = "version: 1\nname: x\nfixed: {method: air}\n"


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

"""The JSON schema for editors, and the reference that is made from it."""

from __future__ import annotations

import jsonschema

from orchestrator.spec import sweep_schema
from orchestrator.spec._trial_values import trial_names
from tests.helpers.documents import ROOT
from tests.helpers.golden import check_golden
from tests.helpers.spec_reference import refresh_tables


def test_the_schema_is_valid_and_describes_every_key():
    schema = sweep_schema()
    jsonschema.Draft7Validator.check_schema(schema)
    settings = schema["properties"]["fixed"]["properties"]
    assert list(settings) == list(trial_names())
    assert all(part["description"] for part in settings.values())


def test_golden_the_spec_reference_matches_the_schema():
    page = (ROOT / "docs" / "spec_reference.md").read_text()
    check_golden("../../docs/spec_reference.md", refresh_tables(page))

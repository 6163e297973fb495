"""The notebook runs from top to bottom in a separate kernel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.helpers.sweeps import TIMEOUT, environment

FILE = Path(__file__).parents[1] / "docs" / "notebook.ipynb"


def test_the_notebook_is_stored_without_outputs():
    text = FILE.read_text()
    notebook = json.loads(text)
    assert text == json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    for cell in notebook["cells"]:
        assert cell["metadata"] == {}
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None


@pytest.mark.integration
@pytest.mark.ray
def test_every_cell_runs_and_the_last_shows_the_table_of_three_seeds(tmp_path, monkeypatch):
    for name, value in environment(IPYTHONDIR=str(tmp_path / "ipython")).items():
        monkeypatch.setenv(name, value)
    for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    notebook = nbformat.read(FILE, as_version=4)
    waits = {"timeout": TIMEOUT, "startup_timeout": TIMEOUT}
    resources = {"metadata": {"path": tmp_path}}
    client = NotebookClient(notebook, kernel_name="python3", resources=resources, **waits)
    client.execute()
    outputs = {cell["id"]: _output(cell) for cell in notebook.cells if cell.cell_type == "code"}
    last = outputs[notebook.cells[-1]["id"]]
    assert "zero_shot" in last["text/html"]
    assert last["text/html"].count("<tr") == 1 + 5
    assert any("image/png" in output for output in outputs.values())
    assert outputs["cell-05"]["text/plain"] == "0"  # the exit code
    # Reused trials and trials to run; zero_shot does not depend on the seed.
    assert outputs["cell-13"]["text/plain"] == "(10, 4)"


def _output(cell: Any) -> dict[str, str]:
    """The last output of a cell, by MIME type."""
    data: dict[str, str] = {}
    for output in cell.outputs:
        assert output.output_type != "error"
        data |= output.get("data", {})
    return data

"""The notebook runs from top to bottom in a kernel of its own, as its readers run it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.helpers.sweeps import TIMEOUT, environment

FILE = Path(__file__).parents[1] / "docs" / "notebook.ipynb"


def test_it_is_kept_without_what_a_run_has_left():
    text = FILE.read_text()
    found = json.loads(text)
    assert text == json.dumps(found, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    for cell in found["cells"]:
        assert cell["metadata"] == {}
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None


@pytest.mark.integration
@pytest.mark.ray
def test_every_cell_runs_and_the_last_has_the_table_of_three_seeds(tmp_path, monkeypatch):
    for name, value in environment(IPYTHONDIR=str(tmp_path / "ipython")).items():
        monkeypatch.setenv(name, value)
    for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    notebook = nbformat.read(FILE, as_version=4)
    client = NotebookClient(
        notebook, timeout=TIMEOUT, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    shown = {cell["id"]: _shown(cell) for cell in notebook.cells if cell.cell_type == "code"}
    last = shown[notebook.cells[-1]["id"]]
    assert "zero_shot" in last["text/html"]
    assert last["text/html"].count("<tr") == 1 + 5
    assert any("image/png" in cell for cell in shown.values())
    assert shown["cell-05"]["text/plain"] == "0"  # the exit code
    assert shown["cell-13"]["text/plain"] == "(10, 4)"  # kept, and to run: zero-shot has no seed


def _shown(cell: Any) -> dict[str, str]:
    """The last thing that a cell displays, by its form."""
    found: dict[str, str] = {}
    for output in cell.outputs:
        assert output.output_type != "error"
        found |= output.get("data", {})
    return found

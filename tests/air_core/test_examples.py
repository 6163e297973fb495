"""The examples of docs/python.md that use air_core alone, run with fewer steps."""

from __future__ import annotations

import contextlib
import io
from typing import Any

from tests.helpers.documents import ROOT, blocks

FEWER = {
    '"train.steps": 100': '"train.steps": 2, "iterations": 2',
    '"lora.steps": 300': '"lora.steps": 2, "lora.batch": 2',
    '"generation.num_inference_steps": 10': '"generation.num_inference_steps": 2',
}


def test_examples_of_a_trial_and_of_all_of_air_run(tmp_path):
    page = ROOT / "docs" / "python.md"
    examples = [block for block in blocks(page) if "air_core" in block.text]
    assert len(examples) == 2
    text = "\n".join(block.text for block in examples)
    for full, fewer in FEWER.items():
        assert full in text
        text = text.replace(full, fewer)
    names: dict[str, Any] = {}
    with contextlib.chdir(tmp_path), contextlib.redirect_stdout(io.StringIO()):
        exec(compile(text, page.name, "exec"), names)
    assert names["result"].inference.keys() == {"text", "fused", "auxiliary"}
    assert len(names["drawn"]) == 80

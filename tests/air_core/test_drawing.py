"""Defaults of generation from the configuration files of published models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from air_core.models.families import drawing_defaults

KL = {"block_out_channels": [128, 256, 512, 512]}  # the scale is 8
FEW = {"num_inference_steps": 4, "guidance_scale": 0.0}
TRAILING = {"timestep_spacing": "trailing"}
FLUX: dict[str, Any] = {"kind": "FluxPipeline", "vae": KL}


def write(
    folder: Path, kind: str = "StableDiffusionPipeline", scheduler: Any = None, **parts: Any
) -> Path:
    """A diffusers folder without weights."""
    index = {"_class_name": kind, **{part: ["diffusers", "Part"] for part in parts}}
    (folder / "model_index.json").write_text(json.dumps(index))
    files = {f"{part}/config.json": config for part, config in parts.items()}
    files["scheduler/scheduler_config.json"] = scheduler or {"timestep_spacing": "leading"}
    for name, config in files.items():
        (folder / name).parent.mkdir()
        (folder / name).write_text(json.dumps(config))
    return folder


DC = {"encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024]}
SD3 = {"kind": "StableDiffusion3Pipeline", "transformer": {"sample_size": 128}, "vae": KL}
MODELS: dict[str, tuple[dict[str, Any], dict[str, float]]] = {
    "SD 1.5": ({"unet": {"sample_size": 64}, "vae": KL}, {"size": 512}),
    "SD 2.1": ({"unet": {"sample_size": 96}, "vae": KL}, {"size": 768}),
    "SD 3.5": (SD3, {"size": 1024, "num_inference_steps": 28, "guidance_scale": 7.0}),
    "SD Turbo": (
        {"unet": {"sample_size": 64}, "vae": KL, "scheduler": TRAILING},
        {"size": 512, **FEW},
    ),
    "SANA": ({"transformer": {"sample_size": 32}, "vae": DC}, {"size": 1024}),
    "FLUX.1-dev": (
        {**FLUX, "transformer": {"guidance_embeds": True}},
        {"size": 1024, "num_inference_steps": 28, "guidance_scale": 3.5},
    ),
    "FLUX.1-schnell": (
        {**FLUX, "transformer": {"guidance_embeds": False}},
        {"size": 1024, **FEW},
    ),
    "not square": ({"unet": {"sample_size": [64, 96]}, "vae": KL}, {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_files_of_a_model_determine_size_steps_and_guidance(tmp_path, name):
    model, expected = MODELS[name]
    assert drawing_defaults(write(tmp_path, **model)) == expected

"""Defaults of generation from the configuration files of published models."""

from __future__ import annotations

import json
from typing import Any

import pytest

from air_core.models.families import drawing_defaults

SD, SD3, FLUX = "StableDiffusionPipeline", "StableDiffusion3Pipeline", "FluxPipeline"
KL = {"block_out_channels": [128, 256, 512, 512]}  # the scale is 8
DC = {"encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024]}
FEW = {"num_inference_steps": 4, "guidance_scale": 0.0}
MANY = {"num_inference_steps": 28, "guidance_scale": 3.5}
# By model: pipeline, configurations of network and autoencoder, and the defaults.
MODELS: dict[str, tuple[str, Any, Any, dict[str, float]]] = {
    "SD 1.5": (SD, {"sample_size": 64}, KL, {"size": 512}),
    "SD 2.1": (SD, {"sample_size": 96}, KL, {"size": 768}),
    "SD 3.5": (SD3, {"sample_size": 128}, KL, {"size": 1024, **MANY, "guidance_scale": 7.0}),
    "SD Turbo": (SD, {"sample_size": 64}, KL, {"size": 512, **FEW}),
    "SANA": ("SomePipeline", {"sample_size": 32}, DC, {"size": 1024}),
    "FLUX.1-dev": (FLUX, {"guidance_embeds": True}, KL, {"size": 1024, **MANY}),
    "FLUX.1-schnell": (FLUX, {"guidance_embeds": False}, KL, {"size": 1024, **FEW}),
    "not square": (SD, {"sample_size": [64, 96]}, KL, {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_files_of_a_model_determine_size_steps_and_guidance(tmp_path, name):
    kind, network, vae, expected = MODELS[name]
    part = "unet" if kind == SD else "transformer"
    index = {"_class_name": kind, part: ["diffusers", "Part"], "vae": ["diffusers", "Part"]}
    spacing = {"timestep_spacing": "trailing" if name == "SD Turbo" else "leading"}
    files = {f"{part}/config.json": network, "vae/config.json": vae, "model_index.json": index}
    for file, content in (files | {"scheduler/scheduler_config.json": spacing}).items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(json.dumps(content))
    assert drawing_defaults(tmp_path) == expected

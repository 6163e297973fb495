"""How a diffusion model draws by default, read from the configuration files of its folder.

Imports no torch and reads no weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from air_core.models.configs import json_object, pipeline_index
from air_core.models.families import family_of
from air_core.models.weights import is_distilled, scheduler_config

FEW_STEPS = {"num_inference_steps": 4, "guidance_scale": 0.0}  # of distilled models
# FLUX.1: the configuration of its transformer has no size; diffusers' pipeline has this number.
FLUX, FLUX_LATENT = "FluxPipeline", 128


def drawing_defaults(folder: Path) -> dict[str, Any]:
    """Settings of generation that a diffusers folder determines, by their names in
    `GenerationSettings`: size, and steps and guidance of distilled models and of some families.

    The size is that of the training images: the side of a latent times the scale of the VAE.
    FLUX.1-dev has the guidance as an input of its transformer; FLUX.1-schnell has not, and is
    distilled.

    Raises:
        ValueError: a file cannot be read.
    """
    is_flux = pipeline_index(folder)["_class_name"] == FLUX
    denoiser = _config(folder, "unet") or _config(folder, "transformer")
    vae = _config(folder, "vae")
    found: dict[str, Any] = {}
    latent = denoiser.get("sample_size", FLUX_LATENT if is_flux else None)
    levels = vae.get("block_out_channels") or vae.get("encoder_block_out_channels")
    if isinstance(latent, int) and isinstance(levels, list):
        found["size"] = latent * 2 ** (len(levels) - 1)
    is_guided = bool(denoiser.get("guidance_embeds"))
    if is_distilled(scheduler_config(folder)) or (is_flux and not is_guided):
        return found | FEW_STEPS
    if (family := family_of(folder)) is not None and family.steps is not None:
        found |= {"num_inference_steps": family.steps, "guidance_scale": family.guidance}
    return found


def _config(folder: Path, part: str) -> dict[str, Any]:
    """Configuration of a part of the pipeline; empty if it has none."""
    file = folder / part / "config.json"
    return json_object(file) if file.is_file() else {}

"""Families of diffusion models, and how a model draws by default. Imports no torch.

Models of a family can be fine-tuned and used as evidence; a pipeline of another class can only
draw. A new family is a subclass of `air_core.diffusion.denoiser.Denoiser` in a module of
`air_core/diffusion/families`, and a line below.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from air_core.models.configs import json_object, read_index
from air_core.models.weights import is_distilled, scheduler_config

PREDICTIONS = ("epsilon", "v_prediction")
FEW_STEPS = {"num_inference_steps": 4, "guidance_scale": 0.0}  # of distilled models
# FLUX.1: the configuration of its transformer has no size; diffusers' pipeline has this number.
FLUX, FLUX_LATENT = "FluxPipeline", 128


@dataclass(frozen=True)
class Family:
    """A class of pipelines in diffusers.

    Args:
        name: of its models, for messages.
        target: its Denoiser, `module:class`.
        steps: of drawing, by default; None: those of the sweep.
        guidance: by default; None: that of the sweep.
    """

    name: str
    target: str
    steps: int | None = None
    guidance: float | None = None

    @property
    def module(self) -> str:
        return self.target.partition(":")[0]


_FAMILIES = "air_core.diffusion.families"
# Steps and guidance are the defaults of the pipelines of diffusers; of Qwen-Image, of its README.
FAMILIES = {
    "StableDiffusionPipeline": Family(
        "Stable Diffusion 1 and 2", f"{_FAMILIES}.stable_diffusion:StableDiffusion"
    ),
    "StableDiffusionXLPipeline": Family(
        "Stable Diffusion XL", f"{_FAMILIES}.stable_diffusion:StableDiffusionXL"
    ),
    "StableDiffusion3Pipeline": Family(
        "Stable Diffusion 3", f"{_FAMILIES}.stable_diffusion_3:StableDiffusion3", 28, 7.0
    ),
    "FluxPipeline": Family("FLUX.1", f"{_FAMILIES}.flux:Flux", 28, 3.5),
    "PixArtSigmaPipeline": Family("PixArt-Sigma", f"{_FAMILIES}.pixart:PixArt", 20, 4.5),
    "SanaPipeline": Family("SANA", f"{_FAMILIES}.sana:Sana", 20, 4.5),
    "QwenImagePipeline": Family("Qwen-Image", f"{_FAMILIES}.qwen_image:QwenImage", 50, 4.0),
}


def check_denoiser(folder: Path, remedy: str = "") -> None:
    """Check that LoRA and evidence can use the pipeline in a diffusers folder.

    Args:
        remedy: what to do otherwise, for the message.

    Raises:
        ValueError: its class or its noise levels are not supported, or a file cannot be read.
    """
    scheduler, kind = scheduler_config(folder), read_index(folder).kind
    name, prediction = scheduler.get("_class_name", ""), scheduler.get("prediction_type", "epsilon")
    if kind not in FAMILIES:
        names = ", ".join(each.name for each in FAMILIES.values())
        problem = f"is a {kind}, which can only draw; LoRA and evidence support {names}"
    elif name.startswith("FlowMatch") or scheduler.get("use_flow_sigmas"):
        return
    elif "beta_start" not in scheduler:
        problem = (
            f"has the scheduler {name or 'of no name'}, whose noise levels LoRA and evidence do "
            "not know; they know those of DDPM and of flow matching"
        )
    elif prediction not in PREDICTIONS:
        problem = (
            f"predicts {prediction!r}; LoRA and evidence know {', '.join(PREDICTIONS)} and flow "
            "matching"
        )
    else:
        return
    raise ValueError(f"{folder} {problem}{remedy and f'; {remedy}'}")


def drawing_defaults(folder: Path) -> dict[str, Any]:
    """Settings of generation that a diffusers folder determines, by their names in
    `GenerationSettings`: size, and steps and guidance of distilled models and of some families.

    The size is that of the training images: the side of a latent times the scale of the VAE.
    FLUX.1-dev has the guidance as an input of its transformer; FLUX.1-schnell has not, and is
    distilled.

    Raises:
        ValueError: a file cannot be read.
    """
    kind = read_index(folder).kind
    denoiser = _config(folder, "unet") or _config(folder, "transformer")
    vae = _config(folder, "vae")
    found: dict[str, Any] = {}
    latent = denoiser.get("sample_size", FLUX_LATENT if kind == FLUX else None)
    levels = vae.get("block_out_channels") or vae.get("encoder_block_out_channels")
    if isinstance(latent, int) and isinstance(levels, list):
        found["size"] = latent * 2 ** (len(levels) - 1)
    is_guided = bool(denoiser.get("guidance_embeds"))
    if is_distilled(scheduler_config(folder)) or (kind == FLUX and not is_guided):
        return found | FEW_STEPS
    if (family := FAMILIES.get(kind)) is not None and family.steps is not None:
        found |= {"num_inference_steps": family.steps, "guidance_scale": family.guidance}
    return found


def _config(folder: Path, part: str) -> dict[str, Any]:
    """Configuration of a part of the pipeline; empty if it has none."""
    file = folder / part / "config.json"
    return json_object(file) if file.is_file() else {}

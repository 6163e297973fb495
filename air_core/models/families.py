"""Families of diffusion models that can be fine-tuned and used as evidence. Imports no torch.

A pipeline of another class can only draw. A new family is a subclass of
`air_core.diffusion.denoiser.Denoiser` in `air_core/diffusion/families` and a line below.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from air_core.models.configs import pipeline_index
from air_core.models.weights import scheduler_config

PREDICTIONS = ("epsilon", "v_prediction")


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


def family_of(folder: Path) -> Family | None:
    """The family of the pipeline in a diffusers folder; None: it can only draw.

    Raises:
        ValueError: its index cannot be read.
    """
    return FAMILIES.get(pipeline_index(folder)["_class_name"])


def check_denoiser(folder: Path, remedy: str = "") -> None:
    """Check that LoRA and evidence can use the pipeline in a diffusers folder.

    Args:
        remedy: what to do otherwise, for the message.

    Raises:
        ValueError: its class or its noise levels are not supported, or a file cannot be read.
    """
    remedy = remedy and f"; {remedy}"
    if family_of(folder) is None:
        kind = pipeline_index(folder)["_class_name"]
        names = ", ".join(family.name for family in FAMILIES.values())
        raise ValueError(
            f"{folder} is a {kind}, which can only draw; LoRA and evidence support {names}{remedy}"
        )
    scheduler = scheduler_config(folder)
    name, prediction = scheduler.get("_class_name", ""), scheduler.get("prediction_type", "epsilon")
    if name.startswith("FlowMatch") or scheduler.get("use_flow_sigmas"):
        return
    if "beta_start" not in scheduler:
        raise ValueError(
            f"{folder} has the scheduler {name or 'of no name'}, whose noise levels LoRA and "
            f"evidence do not know; they know those of DDPM and of flow matching{remedy}"
        )
    if prediction not in PREDICTIONS:
        raise ValueError(
            f"{folder} predicts {prediction!r}; LoRA and evidence know "
            f"{', '.join(PREDICTIONS)} and flow matching{remedy}"
        )

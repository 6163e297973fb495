"""The network of a diffusion model that predicts noise, with what it reads.

Drawing, LoRA and evidence treat models of all families alike through a `Denoiser`. A family is a
module in `air_core.diffusion.families` and a line in `air_core.models.families`.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from air_core.diffusion.noise import noise_of
from air_core.models.families import FAMILIES
from air_core.settings import GenerationSettings

# N images, B of a pass, H height, W width, L tokens, D text width; latents are (c, h, w).

CHUNK = 16  # images per pass of the autoencoder
CAPTIONS = 256  # per pass of the text encoders
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # its projections
# Of transformers in which image and text attend to each other.
JOINT = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
# Otherwise some pipelines draw in a size of their own and scale the image.
OWN_SIZE = {"use_resolution_binning": False}


@dataclass(frozen=True)
class Latents:
    """Encoded images. With a `std`, each is a distribution, from which every step samples."""

    mean: Tensor  # (N, c, h, w)
    std: Tensor | None

    def sample(self, noise: Tensor | None) -> Tensor:
        """(N, c, h, w) a sample of the distribution of each image."""
        return self.mean if self.std is None or noise is None else self.mean + self.std * noise

    def cpu(self) -> Latents:
        return Latents(self.mean.cpu(), None if self.std is None else self.std.cpu())


@dataclass(frozen=True)
class Texts:
    """Encoded captions. Each distinct caption is encoded once."""

    tables: dict[str, Tensor]  # (captions + 1, ...) each; the last row is the empty caption
    rows: Tensor  # (N,) row of each image

    def conditions(self, batch: Tensor, dropped: Tensor) -> dict[str, Tensor]:
        """Conditions of the images at positions `batch`; no caption where dropped."""
        table = next(iter(self.tables.values()))
        rows = torch.where(dropped, len(table) - 1, self.rows[batch])
        return self.of(rows.to(table.device))

    def of(self, rows: Tensor) -> dict[str, Tensor]:
        """Conditions for rows of the tables, (B,) on their device."""
        return {name: table[rows] for name, table in self.tables.items()}


class Denoiser(ABC):
    """The denoiser of a pipeline. Subclasses are families.

    Attributes:
        targets: names of the layers that get LoRA adapters.
        drawing: more arguments of the pipeline's call.
        empty: caption without content, for guidance.
        noise: the levels with which the model was trained.
    """

    targets: Sequence[str] = ATTENTION
    drawing: Mapping[str, Any] = {}
    empty = ""

    def __init__(self, pipeline: Any, size: int) -> None:
        """
        Args:
            pipeline: on its device.
            size: side of the images, in pixels.
        """
        self.pipeline, self.size = pipeline, size
        self.noise = noise_of(pipeline.scheduler, size, pipeline.device)

    @property
    def network(self) -> Any:
        return network(self.pipeline)

    @classmethod
    def arguments(cls, settings: GenerationSettings, count: int) -> dict[str, Any]:
        """Arguments of the pipeline's call for `count` images, beside texts and random numbers."""
        return {
            "height": settings.size,
            "width": settings.size,
            "num_inference_steps": settings.num_inference_steps,
            "guidance_scale": settings.guidance_scale,
            **cls.drawing,
        }

    @abstractmethod
    def conditions(self, captions: list[str]) -> dict[str, Tensor]:
        """What the network reads of M captions: tensors (M, ...)."""

    def encoded(self, captions: list[str], **more: Any) -> Any:
        """What the pipeline's text encoders make of captions."""
        return self.pipeline.encode_prompt(captions, device=self.pipeline.device, **more)

    def predict(self, noisy: Tensor, t: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        """The prediction (B, c, h, w), whose target is `noise.target`.

        Args:
            noisy: (B, c, h, w) latents.
            t: (B,) noise levels.
            conditions: of each image, from `Texts`.
        """
        return self.output(noisy, self.noise.times[t], **conditions)

    def output(self, latents: Tensor, times: Tensor, **conditions: Any) -> Tensor:
        """What the network makes of latents at times (B,)."""
        found: Tensor = self.network(latents, timestep=times, **conditions).sample
        return found

    @torch.no_grad()
    def encode_captions(self, captions: Sequence[str]) -> Texts:
        """Encode captions as the pipeline does when it draws."""
        distinct = list(dict.fromkeys(captions))
        where = {caption: row for row, caption in enumerate(distinct)}
        texts = [*distinct, self.empty]
        parts = [
            self.conditions(texts[first : first + CAPTIONS])
            for first in range(0, len(texts), CAPTIONS)
        ]
        tables = {
            name: torch.cat(_same_length([part[name] for part in parts])) for name in parts[0]
        }
        return Texts(tables, torch.tensor([where[caption] for caption in captions]))

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Latents:
        """(N, size, size, 3) uint8 -> latents on the autoencoder's device, in float32.

        Supports autoencoders with `latent_dist` (AutoencoderKL), `latents` (AutoencoderTiny) and
        `latent` (AutoencoderDC).
        """
        assert images.shape[1:3] == (self.size, self.size)
        vae = self.pipeline.vae
        means, stds = [], []
        for chunk in images.split(CHUNK):
            pixels = chunk.permute(0, 3, 1, 2).float() / 127.5 - 1  # (B, 3, H, W) in [-1, 1]
            encoded = vae.encode(self._pixels(pixels).to(vae.device, vae.dtype))
            if hasattr(encoded, "latent_dist"):
                means.append(encoded.latent_dist.mean.float())
                stds.append(encoded.latent_dist.std.float())
            else:
                means.append((encoded.latents if "latents" in encoded else encoded.latent).float())
        return self._scaled(Latents(torch.cat(means), torch.cat(stds) if stds else None))

    def _pixels(self, images: Tensor) -> Tensor:
        """Input of the autoencoder for images (B, 3, H, W) in [-1, 1]."""
        return images

    def _scaled(self, latents: Latents) -> Latents:
        """Latents as the network reads them."""
        config = self.pipeline.vae.config
        scale, shift = config.scaling_factor, config.get("shift_factor") or 0.0
        std = None if latents.std is None else latents.std * scale
        return Latents((latents.mean - shift) * scale, std)


def network(pipeline: Any) -> Any:
    """The network of a pipeline that predicts noise."""
    return getattr(pipeline, network_name(pipeline))


def network_name(pipeline: Any) -> str:
    """Name of the part of a pipeline that predicts noise."""
    return "unet" if "unet" in pipeline.components else "transformer"


def denoiser_class(pipeline: Any) -> type[Denoiser]:
    """The family of a pipeline; `Denoiser` itself, with arguments only, if it has none."""
    family = FAMILIES.get(type(pipeline).__name__)
    if family is None:
        return Denoiser
    name = family.target.rpartition(":")[2]
    found: type[Denoiser] = getattr(importlib.import_module(family.module), name)
    return found


def packed(latents: Tensor) -> Tensor:
    """(B, c, h, w) -> (B, h/2 w/2, 4c): squares of four become one token."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `packed` for latents (B, c, height, width)."""
    squares = tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2))
    return F.pixel_shuffle(squares, 2)


def _same_length(tables: list[Tensor]) -> list[Tensor]:
    """Tables (M, L, ...), padded by zeros to the longest L."""
    if tables[0].ndim < 2:
        return tables
    longest = max(table.shape[1] for table in tables)
    return [
        F.pad(table, (*[0, 0] * (table.ndim - 2), 0, longest - table.shape[1])) for table in tables
    ]

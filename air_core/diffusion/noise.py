"""The noise levels with which diffusion models are trained, whatever sampler draws with them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# B images, T noise levels; clean and noisy latents and noise are (B, c, h, w), levels `t` (B,).

GAMMA = 5.0  # min-SNR
TOKEN = 16  # pixels: side of an image token where the shift depends on the number of tokens
FLOW = "flow_prediction"


@dataclass(frozen=True)
class Noise:
    """T noise levels, from the lowest: those of DDPM (arXiv:2006.11239), or of flow matching on
    straight lines from the image to noise (arXiv:2209.03003)."""

    signal: Tensor  # (T,) factor of the clean latents
    spread: Tensor  # (T,) factor of the noise
    times: Tensor  # (T,) inputs of the network, from 0 to 1000
    weights: Tensor  # (T,) of squared errors in training
    prediction: str  # epsilon, v_prediction or FLOW

    def __len__(self) -> int:
        return len(self.times)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Levels (count,) of a training step; of flow matching they are logit-normal
        (arXiv:2403.03206, section 3.1)."""
        if self.prediction == FLOW:
            return (torch.randn(count, generator=generator).sigmoid() * len(self)).long()
        return torch.randint(len(self), (count,), generator=generator)

    def noisy(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return _each(self.signal[t]) * clean + _each(self.spread[t]) * noise

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The correct prediction."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == FLOW:
            return noise - clean
        return _each(self.signal[t]) * noise - _each(self.spread[t]) * clean


def _each(factors: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1)"""
    return factors.view(-1, 1, 1, 1)


def noise_of(scheduler: Any, size: int, device: torch.device) -> Noise:
    """The noise of a model, from the scheduler of its pipeline.

    Args:
        size: side of the images, in pixels. Some models shift levels to more noise in large ones.
    """
    from diffusers import DDPMScheduler

    config = scheduler.config
    if "beta_start" in config and not config.get("use_flow_sigmas"):
        ddpm: Any = DDPMScheduler.from_config(config)
        alphas, prediction = ddpm.alphas_cumprod.to(device), ddpm.config.prediction_type
        levels = torch.arange(len(alphas), device=device)
        snr = alphas / (1 - alphas)
        # min-SNR (arXiv:2303.09556)
        weights = snr.clamp(max=GAMMA) / (snr if prediction == "epsilon" else snr + 1)
        return Noise(alphas.sqrt(), (1 - alphas).sqrt(), levels, weights, prediction)
    count = config["num_train_timesteps"]
    sigmas = torch.arange(1, count + 1, device=device) / count
    shift = _shift(config, size)
    sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    return Noise(1 - sigmas, sigmas, sigmas * 1000, torch.ones_like(sigmas), FLOW)


def _shift(config: Any, size: int) -> float:
    """The factor between noise and image by which levels are shifted."""
    if not config.get("use_dynamic_shifting"):
        return float(config.get("flow_shift") or config.get("shift") or 1.0)
    # Linear in the number of tokens, as FluxPipeline of diffusers computes it.
    first, last = config["base_image_seq_len"], config["max_image_seq_len"]
    share = ((size // TOKEN) ** 2 - first) / (last - first)
    mu = config["base_shift"] + share * (config["max_shift"] - config["base_shift"])
    return float(mu if config.get("time_shift_type") == "linear" else math.exp(mu))

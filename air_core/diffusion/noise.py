"""The noise levels with which diffusion models are trained, whatever sampler draws with them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

# B images, T noise levels; clean and noisy latents and noise are (B, c, h, w), levels `t` (B,).

GAMMA = 5.0  # min-SNR
TOKEN = 16  # pixels: side of an image token where the shift depends on the number of tokens


class Noise(Protocol):
    """T noise levels, from the lowest."""

    def __len__(self) -> int: ...

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Levels (count,) of a training step."""
        ...

    def times(self, t: Tensor) -> Tensor:
        """The network's inputs (B,) for levels, from 0 to 1000."""
        ...

    def noisy(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor: ...

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The correct prediction."""
        ...

    def weight(self, t: Tensor) -> Tensor:
        """Weights (B,) of squared errors in training."""
        ...


@dataclass(frozen=True)
class Diffusion:
    """Noise of DDPM (arXiv:2006.11239), with min-SNR weights (arXiv:2303.09556)."""

    alphas: Tensor  # (T,) share of the signal in the variance
    prediction: str  # epsilon or v_prediction

    def __len__(self) -> int:
        return len(self.alphas)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.randint(len(self), (count,), generator=generator)

    def times(self, t: Tensor) -> Tensor:
        return t

    def noisy(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        signal, spread = self._mix(t)
        return signal * clean + spread * noise

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        if self.prediction == "epsilon":
            return noise
        signal, spread = self._mix(t)
        return signal * noise - spread * clean

    def weight(self, t: Tensor) -> Tensor:
        snr = self.alphas[t] / (1 - self.alphas[t])
        divisor = snr if self.prediction == "epsilon" else snr + 1
        return snr.clamp(max=GAMMA) / divisor

    def _mix(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha = self.alphas[t].view(-1, 1, 1, 1)
        return alpha.sqrt(), (1 - alpha).sqrt()


@dataclass(frozen=True)
class Flow:
    """Flow matching on straight lines from the image to noise (arXiv:2209.03003).

    Levels of training steps are logit-normal (arXiv:2403.03206, section 3.1).
    """

    sigmas: Tensor  # (T,) share of the noise, ascending

    def __len__(self) -> int:
        return len(self.sigmas)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        return (torch.randn(count, generator=generator).sigmoid() * len(self)).long()

    def times(self, t: Tensor) -> Tensor:
        return self.sigmas[t] * 1000

    def noisy(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        sigma = self.sigmas[t].view(-1, 1, 1, 1)
        return (1 - sigma) * clean + sigma * noise

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise - clean

    def weight(self, t: Tensor) -> Tensor:
        return torch.ones(len(t), device=t.device)


def noise_of(scheduler: Any, size: int, device: torch.device) -> Noise:
    """The noise of a model, from the scheduler of its pipeline.

    Args:
        size: side of the images, in pixels. Some models shift levels to more noise in large ones.
    """
    from diffusers import DDPMScheduler

    config = scheduler.config
    if "beta_start" in config and not config.get("use_flow_sigmas"):
        ddpm: Any = DDPMScheduler.from_config(config)
        return Diffusion(ddpm.alphas_cumprod.to(device), ddpm.config.prediction_type)
    levels = config["num_train_timesteps"]
    sigmas = torch.arange(1, levels + 1, device=device) / levels
    shift = _shift(config, size)
    return Flow(shift * sigmas / (1 + (shift - 1) * sigmas))


def _shift(config: Any, size: int) -> float:
    """The factor between noise and image by which levels are shifted."""
    if not config.get("use_dynamic_shifting"):
        return float(config.get("flow_shift") or config.get("shift") or 1.0)
    # Linear in the number of tokens, as FluxPipeline of diffusers computes it.
    first, last = config["base_image_seq_len"], config["max_image_seq_len"]
    share = ((size // TOKEN) ** 2 - first) / (last - first)
    mu = config["base_shift"] + share * (config["max_shift"] - config["base_shift"])
    return float(mu if config.get("time_shift_type") == "linear" else math.exp(mu))

"""Qwen-Image (arXiv:2508.02324): a transformer on packed latents of a video autoencoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from air_core.diffusion.denoiser import JOINT, Denoiser, Latents, packed, unpacked
from air_core.settings import GenerationSettings


class QwenImage(Denoiser):
    targets = JOINT
    empty = " "  # as in the published example; the template around it has words

    @classmethod
    def arguments(cls, settings: GenerationSettings, count: int) -> dict[str, Any]:
        # `guidance_scale` is for distilled models; this one is guided by the empty caption.
        found = super().arguments(settings, count)
        guidance = found.pop("guidance_scale")
        return {**found, "true_cfg_scale": guidance, "negative_prompt": [cls.empty] * count}

    def conditions(self, captions: list[str]) -> dict[str, Tensor]:
        table, mask = self.encoded(captions)
        if mask is None:  # all captions have the same length
            mask = table.new_ones(table.shape[:2], dtype=torch.long)
        return {"encoder_hidden_states": table, "encoder_hidden_states_mask": mask}

    def predict(self, noisy: Tensor, t: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        count, _, height, width = noisy.shape
        predicted = self.output(
            packed(noisy),
            self.noise.times[t] / 1000,
            img_shapes=[[(1, height // 2, width // 2)]] * count,
            **conditions,
        )
        return unpacked(predicted, height, width)

    def _pixels(self, images: Tensor) -> Tensor:
        return images[:, :, None]  # one frame

    def _scaled(self, latents: Latents) -> Latents:
        config, like = self.pipeline.vae.config, latents.mean
        mean, std = (
            torch.tensor(values, device=like.device).view(1, -1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        spread = None if latents.std is None else latents.std[:, :, 0] / std
        return Latents((like[:, :, 0] - mean) / std, spread)

"""FLUX.1 dev and schnell (github.com/black-forest-labs/flux): a transformer on packed latents."""

from __future__ import annotations

import torch
from torch import Tensor

from air_core.diffusion.denoiser import JOINT, Denoiser, packed, unpacked

# FLUX.1-dev reads the guidance. In training 1 is usual, as in diffusers' README of
# train_dreambooth_lora_flux; that evidence uses it too is inferred.
GUIDANCE = 1.0


class Flux(Denoiser):
    targets = JOINT

    def conditions(self, captions: list[str]) -> dict[str, Tensor]:
        table, pooled, _ = self.encoded(captions, prompt_2=None)
        return {"encoder_hidden_states": table, "pooled_projections": pooled}

    def predict(self, noisy: Tensor, t: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        count, _, height, width = noisy.shape
        guidance = None
        if self.network.config.guidance_embeds:
            guidance = torch.full((count,), GUIDANCE, device=noisy.device)
        predicted = self.output(
            packed(noisy),
            self.noise.times[t] / 1000,
            guidance=guidance,
            txt_ids=noisy.new_zeros(conditions["encoder_hidden_states"].shape[1], 3),
            img_ids=self.pipeline._prepare_latent_image_ids(
                count, height // 2, width // 2, noisy.device, noisy.dtype
            ),
            **conditions,
        )
        return unpacked(predicted, height, width)

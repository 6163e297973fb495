"""Stable Diffusion 3 and 3.5 (arXiv:2403.03206): a transformer, trained by flow matching."""

# mypy: allow-untyped-calls

from __future__ import annotations

from torch import Tensor

from air_core.diffusion.denoiser import JOINT, Denoiser


class StableDiffusion3(Denoiser):
    targets = JOINT

    def conditions(self, captions: list[str]) -> dict[str, Tensor]:
        table, _, pooled, _ = self.pipeline.encode_prompt(
            captions, None, None, device=self.pipeline.device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": table, "pooled_projections": pooled}

    def predict(self, noisy: Tensor, t: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        predicted: Tensor = self.network(
            hidden_states=noisy, timestep=self.noise.times(t), **conditions
        ).sample
        return predicted

"""PixArt-Sigma (arXiv:2403.04692): a transformer that predicts noise and its variance."""

# mypy: allow-untyped-calls

from __future__ import annotations

from typing import Any

from torch import Tensor

from air_core.diffusion.denoiser import Denoiser
from air_core.settings import GenerationSettings


class PixArt(Denoiser):
    @staticmethod
    def arguments(settings: GenerationSettings, count: int) -> dict[str, Any]:
        # Otherwise the pipeline draws in a size of its own and scales the image.
        return {**Denoiser.arguments(settings, count), "use_resolution_binning": False}

    def conditions(self, captions: list[str]) -> dict[str, Tensor]:
        table, mask, _, _ = self.pipeline.encode_prompt(
            captions, do_classifier_free_guidance=False, device=self.pipeline.device
        )
        return {"encoder_hidden_states": table, "encoder_attention_mask": mask}

    def predict(self, noisy: Tensor, t: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        predicted: Tensor = self.network(
            noisy,
            timestep=self.noise.times(t),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            **conditions,
        ).sample
        return predicted[:, : noisy.shape[1]]

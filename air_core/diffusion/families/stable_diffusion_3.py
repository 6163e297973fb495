"""Stable Diffusion 3 and 3.5 (arXiv:2403.03206): a transformer, trained by flow matching."""

from __future__ import annotations

from torch import Tensor

from air_core.diffusion.denoiser import JOINT, Denoiser


class StableDiffusion3(Denoiser):
    targets = JOINT

    def conditions(self, captions: list[str]) -> dict[str, Tensor]:
        table, _, pooled, _ = self.encoded(
            captions, prompt_2=None, prompt_3=None, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": table, "pooled_projections": pooled}

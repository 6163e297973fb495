"""PixArt-Sigma (arXiv:2403.04692): a transformer that predicts noise and its variance."""

from __future__ import annotations

from torch import Tensor

from air_core.diffusion.denoiser import OWN_SIZE, Denoiser


class PixArt(Denoiser):
    drawing = OWN_SIZE

    def conditions(self, captions: list[str]) -> dict[str, Tensor]:
        table, mask, _, _ = self.encoded(captions, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": table, "encoder_attention_mask": mask}

    def predict(self, noisy: Tensor, t: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        added = {"resolution": None, "aspect_ratio": None}
        predicted = self.output(noisy, self.noise.times[t], added_cond_kwargs=added, **conditions)
        return predicted[:, : noisy.shape[1]]

"""Stable Diffusion 1 and 2 (arXiv:2112.10752) and XL (arXiv:2307.01952): a U-Net."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from air_core.diffusion.denoiser import Denoiser, Texts


class StableDiffusion(Denoiser):
    """Versions 1 and 2."""

    def conditions(self, captions: list[str]) -> dict[str, Tensor]:
        table, _ = self.encoded(
            captions, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": table}  # (M, L, D)


class StableDiffusionXL(Denoiser):
    """Version XL, with a pooled text and sizes as further conditions."""

    def conditions(self, captions: list[str]) -> dict[str, Tensor]:
        table, _, pooled, _ = self.encoded(captions, do_classifier_free_guidance=False)
        # Original size, crop corner and target size: the pipeline's defaults when it draws, so
        # that training and drawing use the same values.
        sizes = [self.size, self.size, 0, 0, self.size, self.size]
        times = torch.tensor([sizes] * len(captions), dtype=table.dtype, device=table.device)
        return {"encoder_hidden_states": table, "text_embeds": pooled, "time_ids": times}

    def encode_captions(self, captions: Sequence[str]) -> Texts:
        texts = super().encode_captions(captions)
        if self.pipeline.config.force_zeros_for_empty_prompt:
            # These pipelines use zeros instead of the encoded empty text for guidance.
            for name in ("encoder_hidden_states", "text_embeds"):
                texts.tables[name][-1] = 0
        return texts

    def predict(self, noisy: Tensor, t: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        added = {name: conditions[name] for name in ("text_embeds", "time_ids")}
        table = conditions["encoder_hidden_states"]
        times = self.noise.times[t]
        return self.output(noisy, times, encoder_hidden_states=table, added_cond_kwargs=added)

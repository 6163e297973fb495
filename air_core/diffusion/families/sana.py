"""SANA (arXiv:2410.10629): a transformer with linear attention on latents of a 32nd of the side."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from air_core.diffusion.denoiser import OWN_SIZE, Denoiser

INSTRUCTION = "complex_human_instruction"  # stands before a caption, not before the empty one


class Sana(Denoiser):
    drawing = OWN_SIZE

    def conditions(self, captions: list[str]) -> dict[str, Tensor]:
        standard = inspect.signature(type(self.pipeline).__call__).parameters[INSTRUCTION].default
        parts = []
        for caption in captions:
            instruction = {INSTRUCTION: None if caption == self.empty else standard}
            table, mask, _, _ = self.encoded(
                [caption], do_classifier_free_guidance=False, **instruction
            )
            parts.append((table, mask))
        tables, masks = zip(*parts, strict=True)
        return {
            "encoder_hidden_states": torch.cat(tables),
            "encoder_attention_mask": torch.cat(masks),
        }

    def predict(self, noisy: Tensor, t: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        scale = self.network.config.timestep_scale
        return self.output(noisy, self.noise.times[t] * scale, **conditions)

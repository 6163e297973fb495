"""SANA (arXiv:2410.10629): a transformer with linear attention on latents of a 32nd of the side."""

# mypy: allow-untyped-calls

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from air_core.diffusion.denoiser import Denoiser
from air_core.settings import GenerationSettings

INSTRUCTION = "complex_human_instruction"  # stands before a caption, not before the empty one


class Sana(Denoiser):
    @staticmethod
    def arguments(settings: GenerationSettings, count: int) -> dict[str, Any]:
        # Otherwise the pipeline draws in a size of its own and scales the image.
        return {**Denoiser.arguments(settings, count), "use_resolution_binning": False}

    def conditions(self, captions: list[str]) -> dict[str, Tensor]:
        call = inspect.signature(type(self.pipeline).__call__)
        parts = [
            self.pipeline.encode_prompt(
                [caption],
                do_classifier_free_guidance=False,
                device=self.pipeline.device,
                complex_human_instruction=(
                    None if caption == self.empty else call.parameters[INSTRUCTION].default
                ),
            )[:2]
            for caption in captions
        ]
        tables, masks = zip(*parts, strict=True)
        return {
            "encoder_hidden_states": torch.cat(tables),
            "encoder_attention_mask": torch.cat(masks),
        }

    def predict(self, noisy: Tensor, t: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        times = self.noise.times(t) * self.network.config.timestep_scale
        predicted: Tensor = self.network(noisy, timestep=times, **conditions).sample
        return predicted

"""Scores real images by the error of a diffusion model that denoises them, class by class.

A text-to-image model is a classifier: it denoises an image best under the caption of the image's
class (Li et al., arXiv:2303.16203; Clark and Jaini, arXiv:2303.15233). With the LoRA of AiR the
model knows the images of the target domain. No label is read.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from air_core.diffusion import hashed_seed
from air_core.diffusion.denoiser import Denoiser, denoiser_class
from air_core.diffusion.pipeline import shared_pipeline
from air_core.models.families import check_denoiser
from air_core.settings import EvidenceScoring
from air_core.tools.captions import text_of

# B images, C classes, M pairs of an image and a class; latents are (c, h, w).

PAIRS = 64  # in a pass of the network; a GPU needs many to be busy


class DenoisingScorer:
    """Computes denoising errors with a pipeline in a diffusers folder."""

    def __init__(
        self,
        model: Path,
        settings: EvidenceScoring,
        classnames: Sequence[str],
        size: int,
        *,
        adapter: Path | None = None,
        scale: float = 1.0,
        device: str = "cpu",
        thrift: int = 0,
    ) -> None:
        """
        Args:
            model: folder of the pipeline.
            classnames: of the C classes.
            size: side of the square to which images are scaled, in pixels.
            adapter: folder of the LoRA.
            scale: weight of the LoRA.
            thrift: how often to halve the number of pairs in a pass.

        Raises:
            ValueError: the folder contains no pipeline, or one that is not supported.
        """
        check_denoiser(model)
        self.settings = settings
        self.pairs = max(1, PAIRS >> thrift)
        self.shared = shared_pipeline(model, settings.precision, device)
        self.lora = adapter, scale
        self._denoiser = denoiser_class(self.shared.pipeline)(self.shared.pipeline, size)
        captions = [text_of(settings.template, name) for name in classnames]
        self.texts = self.denoiser.encode_captions(captions)

    @property
    def denoiser(self) -> Denoiser:
        """The denoiser with the LoRA of this scorer."""
        self.shared.use(*self.lora)
        return self._denoiser

    @torch.inference_mode()
    def latents(self, images: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 -> (B, c, h, w), the mean of the autoencoder's distribution."""
        self.shared.pipeline.vae.disable_slicing()
        return self.denoiser.encode_images(images).mean

    @torch.inference_mode()
    def errors(
        self,
        latents: Tensor,
        positions: Sequence[int],
        draw: int,
        candidates: Tensor,
        report: Callable[[int, int], None] = lambda done, total: None,
    ) -> Tensor:
        """Mean squared error of the prediction of one draw, for each pair of image and class.

        All classes of an image share the time step and the noise of the draw. The number of pairs
        in a pass of the network changes no error beyond rounding.

        Args:
            latents: (B, c, h, w) from `latents`.
            positions: (B,) of the images in their dataset; determine the noise.
            draw: number of the draw, from 0.
            candidates: (B, C) bool; pairs that are computed.
            report: called with the finished and all pairs.

        Returns:
            (B, C) float32 on the CPU; NaN where not computed.
        """
        device = latents.device
        denoiser = self.denoiser
        t = time_step(draw, self.settings.low, self.settings.high, len(denoiser.noise))
        noise = torch.stack([_noise(p, draw, latents.shape[1:]) for p in positions]).to(device)
        steps = torch.full((len(latents),), t, device=device)
        target = denoiser.noise.target(latents, noise, steps)
        noisy = denoiser.noise.noisy(latents, noise, steps).to(denoiser.network.dtype)
        rows, classes = candidates.to(device).nonzero(as_tuple=True)  # (M,), (M,)
        found = [torch.empty(0, device=device)]
        for image, c in zip(rows.split(self.pairs), classes.split(self.pairs), strict=True):
            predicted = denoiser.predict(noisy[image], steps[image], self.texts.of(c))
            found.append((predicted.float() - target[image]).square().mean(dim=(1, 2, 3)))
            report(sum(map(len, found)), len(rows))
        errors = torch.full(candidates.shape, torch.nan)
        errors[candidates] = torch.cat(found).cpu()  # one copy for all pairs
        return errors


def time_step(draw: int, low: float, high: float, steps: int) -> int:
    """Time step of a draw: stratified, so that any first draws spread evenly over the range.

    Args:
        draw: from 0.
        low: first time step of the range, as a share of the model's steps.
        high: end of the range.
        steps: number of time steps that the model was trained with.

    The shares are the van der Corput sequence of base 2.

    >>> [time_step(draw, 0.4, 0.8, 1000) for draw in range(4)]
    [600, 500, 700, 450]
    """
    share, width, rest = 0.0, 0.5, draw + 1
    while rest:
        share, width, rest = share + width * (rest % 2), width / 2, rest // 2
    return min(steps - 1, int((low + (high - low) * share) * steps))


def _noise(position: int, draw: int, shape: Sequence[int]) -> Tensor:
    """Noise of one draw of an image; equal on all devices."""
    generator = torch.Generator("cpu").manual_seed(hashed_seed("evidence", 0, position, draw))
    return torch.randn(*shape, generator=generator)


def candidate_classes(
    logits: Tensor, top: int | None, earlier: np.ndarray | None, prune_to: int
) -> Tensor:
    """Classes of each image whose errors are computed in a draw.

    Args:
        logits: (B, C) of zero-shot CLIP.
        top: number of classes that CLIP nominates; None: all.
        earlier: (draws, B, C) errors of the draws before the pruning; None: no pruning yet.
        prune_to: number of classes that pruning keeps, those of the smallest mean error.

    Returns:
        (B, C) bool.
    """
    chosen = torch.ones_like(logits, dtype=torch.bool)
    if top is not None and top < logits.shape[1]:
        chosen = _best(logits, top)
    if earlier is not None and prune_to < logits.shape[1]:
        means = torch.from_numpy(earlier).mean(dim=0)  # NaN for a class that is no candidate
        chosen = chosen & _best(-means.nan_to_num(torch.inf), prune_to)
    return chosen


def _best(scores: Tensor, count: int) -> Tensor:
    best = scores.argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, best, True)

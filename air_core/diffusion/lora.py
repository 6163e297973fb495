"""Fine-tunes a diffusion model to a domain: LoRA (arXiv:2106.09685) on pseudo-labelled images.

Supports Stable Diffusion 1, 2 and XL (arXiv:2307.01952), with noise or v prediction. The attention
projections of the U-Net get adapters; everything else is frozen. The loss is the prediction error
with min-SNR weights (arXiv:2303.09556). AiR (arXiv:2504.11930) trains one LoRA for all classes,
with the class in the caption.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn import Parameter
from torch.nn.attention import SDPBackend, sdpa_kernel

from air_core.diffusion.pipeline import ADAPTER, autocast, load_pipeline
from air_core.models.weights import check_lora_fits
from air_core.seal import BLANK, intact, sealed
from air_core.specs import LoraTraining, Precision

# N training images, B images per step, H height, W width, L tokens, D text width, E width of a
# pooled text; latents are (c, h, w).

log = logging.getLogger(__name__)

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
CAPTION_DROPOUT = 0.1  # share of images without caption, which guidance needs
GAMMA = 5.0  # min-SNR
WARMUP = 0.1  # share of steps
WEIGHT_DECAY = 1e-2
CLIP = 1.0  # largest norm of the gradient
KEEP_EVERY = 120.0  # seconds between checkpoints
CHUNK = 16  # images per pass of the autoencoder


def square(image: Image.Image, size: int) -> np.ndarray:
    """Scale the shorter side to `size` and crop the centre: (size, size, 3) uint8."""
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def train_lora(
    images: Tensor,
    captions: Sequence[str],
    model: Path,
    training: LoraTraining,
    size: int,
    out: Path,
    seed: int = 0,
    device: str = "cpu",
    report: Callable[[int, int, float], None] | None = None,
    kept: Path | None = None,
    keep_every: float = KEEP_EVERY,
) -> dict[str, float]:
    """Train adapters and write them to `out/pytorch_lora_weights.safetensors`.

    Args:
        images: (N, H, W, 3) uint8.
        captions: N texts that contain the class.
        model: diffusers folder of a Stable Diffusion pipeline.
        training: rank, steps and other settings, except for `caption`.
        size: side of the square to which images are scaled and cropped, in pixels.
        out: folder; created if necessary.
        seed: of the initial adapters, the batches and the noise; equal on all devices.
        device: on which to train.
        report: called after each step with (finished steps, steps, loss).
        kept: checkpoint file. If it exists, training resumes from it.
        keep_every: seconds between checkpoints.

    Returns:
        `loss_first` and `loss_last`, the mean losses of the first and the last tenth of the steps,
        and `seconds`.

    Raises:
        ValueError: there are no images, captions are missing, or the model is not supported.
        FloatingPointError: the loss is not finite.
    """
    if not len(images) or len(images) != len(captions):
        raise ValueError(f"LoRA needs images with a caption each: {len(images)}, {len(captions)}")
    start = time.perf_counter()
    check_lora_fits(model)
    pipeline = load_pipeline(model)
    parameters = add_adapters(pipeline.unet, training.rank, seed)
    pipeline.to(device)
    if training.flip:  # the mirrored images follow, in the same order
        images = torch.cat([images, images.flip(2)])
    latents = encode_images(pipeline.vae, images, size)
    texts = encode_captions(pipeline, captions, size)
    losses: list[float] = []
    for loss in fit(pipeline, parameters, latents, texts, training, seed, losses, kept, keep_every):
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the LoRA's loss is {loss} at step {len(losses)}; lower lora.learning_rate"
            )
        if report is not None:
            report(len(losses), training.steps_on(len(captions)), loss)
    save_adapters(pipeline, out)
    tenth = max(1, len(losses) // 10)
    return {
        "loss_first": math.fsum(losses[:tenth]) / tenth,
        "loss_last": math.fsum(losses[-tenth:]) / tenth,
        "seconds": time.perf_counter() - start,
    }


def fit(
    pipeline: Any,
    parameters: list[Parameter],
    latents: Latents,
    texts: Texts,
    training: LoraTraining,
    seed: int,
    losses: list[float],
    kept: Path | None = None,
    keep_every: float = KEEP_EVERY,
) -> Iterator[float]:
    """Optimise the adapters in place; yields the loss of each step.

    Args:
        latents: of N images; with `training.flip` also of the N mirrored ones.
        losses: receives the losses of all steps, including those before a resume.
        kept: see `train_lora`.
    """
    unet, device = pipeline.unet, latents.mean.device
    draws = torch.Generator("cpu").manual_seed(seed)  # on the CPU, so equal on all devices
    optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=WEIGHT_DECAY)
    count = len(texts.rows)
    steps = training.steps_on(count)
    factor = _warmup_cosine(steps)
    noise_schedule = NoiseSchedule.of(pipeline.scheduler.config, device)
    unet.train()
    if kept is not None and kept.exists():
        if intact(kept.read_bytes()):
            losses += _go_on(kept, parameters, optimizer, draws)
        else:
            log.warning("%s is damaged: the LoRA is trained from its first step", kept)
    written = time.monotonic()
    for step in range(len(losses), steps):
        optimizer.param_groups[0]["lr"] = training.learning_rate * factor(step)
        batch = torch.randint(count, (training.batch,), generator=draws)
        t = torch.randint(len(noise_schedule.alphas), (training.batch,), generator=draws)
        dropped = torch.rand(training.batch, generator=draws) < CAPTION_DROPOUT
        views = batch
        if training.flip:
            views = batch + count * torch.randint(2, (training.batch,), generator=draws)
        clean = latents.sample(views.to(device), draws)  # (B, c, h, w)
        noise = torch.randn(clean.shape, generator=draws).to(device)
        t = t.to(device)
        with _attention(device.type, training.precision):
            with autocast(device.type, training.precision):
                predicted = unet(
                    noise_schedule.noisy(clean, noise, t), t, **texts.conditions(batch, dropped)
                ).sample
            error = predicted.float() - noise_schedule.target(clean, noise, t)
            loss = (error.square().mean(dim=(1, 2, 3)) * noise_schedule.weight(t)).mean()
            optimizer.zero_grad()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        losses.append(float(loss.detach()))
        yield losses[-1]
        if kept is not None and time.monotonic() - written >= keep_every:
            _keep(kept, parameters, optimizer, draws, losses)
            written = time.monotonic()


def _keep(
    file: Path,
    parameters: list[Parameter],
    optimizer: torch.optim.Optimizer,
    draws: torch.Generator,
    losses: list[float],
) -> None:
    """Write a checkpoint atomically: everything on which the next step depends."""
    state = {"draws": draws.get_state(), "losses": torch.tensor(losses, dtype=torch.float64)}
    for i, parameter in enumerate(parameters):
        state[f"{i}"] = parameter.detach()
        state |= {f"{i}.{name}": value for name, value in optimizer.state[parameter].items()}
    temporary = file.with_name(f".{file.name}")
    # Files of save_file are readable by their user only, but another user may resume the training.
    plain = {name: value.cpu().contiguous() for name, value in state.items()}
    temporary.write_bytes(sealed(save(plain, {"seal": BLANK})))
    temporary.replace(file)


def _go_on(
    file: Path,
    parameters: list[Parameter],
    optimizer: torch.optim.Optimizer,
    draws: torch.Generator,
) -> list[float]:
    """Restore a checkpoint; return its losses."""
    state = load_file(file)
    draws.set_state(state.pop("draws"))
    losses: list[float] = state.pop("losses").tolist()
    for i, parameter in enumerate(parameters):
        parameter.data.copy_(state[f"{i}"])
        own = {n: v for n, v in state.items() if n.startswith(f"{i}.")}
        # Adam's step counter is a tensor on the CPU.
        optimizer.state[parameter] = {
            name.partition(".")[2]: value if value.ndim == 0 else value.to(parameter.device)
            for name, value in own.items()
        }
    return losses


def _warmup_cosine(steps: int) -> Callable[[int], float]:
    warmup = max(1, round(WARMUP * steps))
    return lambda step: min(1, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


@contextmanager
def _attention(device: str, precision: Precision) -> Iterator[None]:
    """On a CPU, use the plain kernel: its backward pass is faster, several times so in bf16."""
    with sdpa_kernel(SDPBackend.MATH) if device == "cpu" else nullcontext():
        yield


# ---------------------------------------------------------------- adapters


def add_adapters(unet: Any, rank: int, seed: int) -> list[Parameter]:
    """Freeze a U-Net and add adapters without effect; return the parameters to train."""
    from peft import LoraConfig

    unet.requires_grad_(False)
    # Alpha equals the rank, so the scale is 1 even for a reader that ignores alpha.
    config = LoraConfig(
        r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(TARGETS)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet.add_adapter(config, adapter_name=ADAPTER)
    return [p for p in unet.parameters() if p.requires_grad]


def save_adapters(pipeline: Any, out: Path) -> None:
    """Write the adapters with their configuration, which contains alpha."""
    from peft import get_peft_model_state_dict

    config = pipeline.unet.peft_config[ADAPTER].to_dict()
    config["target_modules"] = sorted(config["target_modules"])  # a set has no stable order
    out.mkdir(parents=True, exist_ok=True)
    type(pipeline).save_lora_weights(
        str(out),
        unet_lora_layers=get_peft_model_state_dict(pipeline.unet, adapter_name=ADAPTER),
        unet_lora_adapter_metadata=config,
    )


# ---------------------------------------------------------------- inputs of a step


@dataclass(frozen=True)
class Latents:
    """Scaled latents of the images, encoded once and sampled at every step."""

    mean: Tensor  # (N, c, h, w)
    std: Tensor | None  # same shape, if the autoencoder returns a distribution

    def sample(self, batch: Tensor, draws: torch.Generator) -> Tensor:
        """Sample latents (B, c, h, w) of the images at positions `batch`."""
        mean = self.mean[batch]
        if self.std is None:
            return mean
        return mean + self.std[batch] * torch.randn(mean.shape, generator=draws).to(mean.device)


@torch.no_grad()
def encode_images(vae: Any, images: Tensor, size: int) -> Latents:
    """(N, H, W, 3) uint8 -> latents on the autoencoder's device.

    Supports autoencoders with `latent_dist` (AutoencoderKL) and `latents` (AutoencoderTiny).
    """
    means, stds = [], []
    for chunk in images.split(CHUNK):
        encoded = vae.encode(_square(chunk, size).to(vae.device))
        if hasattr(encoded, "latent_dist"):
            means.append(encoded.latent_dist.mean)
            stds.append(encoded.latent_dist.std)
        else:
            means.append(encoded.latents)
    scale = vae.config.scaling_factor
    shift = vae.config.get("shift_factor") or 0.0
    mean = (torch.cat(means) - shift) * scale
    return Latents(mean, torch.cat(stds) * scale if stds else None)


def _square(images: Tensor, size: int) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, size, size) in [-1, 1]: the central square, resized."""
    _, height, width, _ = images.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = images[:, top : top + side, left : left + side].permute(0, 3, 1, 2).float()
    if side != size:
        square = F.interpolate(square, (size, size), mode="bicubic", antialias=True)
    return square.clamp(0, 255) / 127.5 - 1


@dataclass(frozen=True)
class Texts:
    """Encoded captions. Each distinct caption is encoded once."""

    table: Tensor  # (captions + 1, L, D); the last row is the empty caption
    rows: Tensor  # (N,) row of each image
    pooled: Tensor | None = None  # (captions + 1, E), for Stable Diffusion XL
    sizes: Tensor | None = None  # (1, 6), for Stable Diffusion XL

    def conditions(self, batch: Tensor, dropped: Tensor) -> dict[str, Any]:
        """Inputs of the U-Net for the images at positions `batch`; no caption where dropped."""
        rows = torch.where(dropped, len(self.table) - 1, self.rows[batch]).to(self.table.device)
        conditions: dict[str, Any] = {"encoder_hidden_states": self.table[rows]}  # (B, L, D)
        if self.pooled is not None and self.sizes is not None:
            sizes = self.sizes.expand(len(rows), -1)
            conditions["added_cond_kwargs"] = {"text_embeds": self.pooled[rows], "time_ids": sizes}
        return conditions


@torch.no_grad()
def encode_captions(pipeline: Any, captions: Sequence[str], size: int) -> Texts:
    """Encode captions as the pipeline does when it draws images of this size."""
    distinct = list(dict.fromkeys(captions))
    table, _, *pooled = pipeline.encode_prompt(
        prompt=[*distinct, ""],
        device=pipeline.device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
    )
    where = {caption: row for row, caption in enumerate(distinct)}
    rows = torch.tensor([where[caption] for caption in captions])
    if not pooled:
        return Texts(table, rows)
    if pipeline.config.force_zeros_for_empty_prompt:
        # These pipelines use zeros instead of the encoded empty text for guidance.
        table[-1], pooled[0][-1] = 0, 0
    # Original size, crop corner and target size: the pipeline's defaults when it draws, so that
    # training and drawing use the same values.
    sizes = torch.tensor([[size, size, 0, 0, size, size]], dtype=table.dtype, device=table.device)
    return Texts(table, rows, pooled[0], sizes)


@dataclass(frozen=True)
class NoiseSchedule:
    """The noise levels with which a model was trained, and the kind of its prediction."""

    alphas: Tensor  # (T,) share of the signal in the variance
    prediction: str

    @staticmethod
    def of(config: Any, device: torch.device) -> NoiseSchedule:
        """Read the schedule from the configuration of a pipeline's scheduler, whatever its sampler.

        Raises:
            ValueError: the model predicts neither noise nor v.
        """
        from diffusers import DDPMScheduler

        scheduler = DDPMScheduler.from_config(config)
        prediction = scheduler.config.prediction_type
        if prediction not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"the model predicts {prediction!r}; LoRA knows epsilon and v_prediction"
            )
        return NoiseSchedule(scheduler.alphas_cumprod.to(device), prediction)

    def noisy(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        signal, spread = self._mix(t)
        return signal * clean + spread * noise

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The correct prediction."""
        if self.prediction == "epsilon":
            return noise
        signal, spread = self._mix(t)
        return signal * noise - spread * clean

    def weight(self, t: Tensor) -> Tensor:
        """Min-SNR weights (B,) for this kind of prediction."""
        snr = self.alphas[t] / (1 - self.alphas[t])
        divisor = snr if self.prediction == "epsilon" else snr + 1
        return snr.clamp(max=GAMMA) / divisor

    def _mix(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha = self.alphas[t].view(-1, 1, 1, 1)
        return alpha.sqrt(), (1 - alpha).sqrt()

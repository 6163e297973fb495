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
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn import Parameter
from torch.nn.attention import SDPBackend, sdpa_kernel

from air_core.ahead import computed_ahead
from air_core.diffusion.pipeline import ADAPTER, DTYPES, load_pipeline
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
KEPT = 8192  # training images whose latents stay in memory; at 512 pixels, 1 GB
AHEAD = 4  # steps whose images are read before they are needed


def square(image: Image.Image, size: int) -> np.ndarray:
    """Scale the shorter side to `size` and crop the centre: (size, size, 3) uint8."""
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


class Images(Protocol):
    """N arrays or tensors (H, W, 3) uint8."""

    def __len__(self) -> int: ...

    def __getitem__(self, at: int, /) -> Any: ...


def train_lora(
    images: Images,
    captions: Sequence[str],
    model: Path,
    training: LoraTraining,
    size: int,
    out: Path,
    seed: int = 0,
    device: str = "cpu",
    thrift: int = 0,
    report: Callable[[int, int, float], None] | None = None,
    kept: Path | None = None,
    keep_every: float = KEEP_EVERY,
) -> dict[str, float]:
    """Train adapters and write them to `out/pytorch_lora_weights.safetensors`.

    Args:
        images: N images, read on a thread when a step needs them.
        captions: N texts that contain the class.
        model: diffusers folder of a Stable Diffusion pipeline.
        training: rank, steps and other settings, except for `caption`.
        size: side of the square to which images are scaled and cropped, in pixels.
        out: folder; created if necessary.
        seed: of the initial adapters, the batches and the noise; equal on all devices.
        device: on which to train.
        thrift: trades speed for memory: 1 computes activations again for the gradient, each number
            above also halves the images of a pass. Changes no result beyond rounding.
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
    pipeline = load_pipeline(model, DTYPES[training.precision])
    parameters = add_adapters(pipeline.unet, training.rank, seed)
    if thrift:
        pipeline.unet.enable_gradient_checkpointing()
    pipeline.to(device)
    latents = TrainingLatents(pipeline.vae, images, size)
    texts = encode_captions(pipeline, captions, size)
    losses: list[float] = []
    parts = 2 ** max(0, thrift - 1)
    steps = fit(
        pipeline, parameters, latents, texts, training, seed, losses, parts, kept, keep_every
    )
    for loss in steps:
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
    latents: TrainingLatents,
    texts: Texts,
    training: LoraTraining,
    seed: int,
    losses: list[float],
    parts: int = 1,
    kept: Path | None = None,
    keep_every: float = KEEP_EVERY,
) -> Iterator[float]:
    """Optimise the adapters in place; yields the loss of each step.

    Args:
        losses: receives the losses of all steps, including those before a resume.
        parts: passes into which the images of a step are split.
        kept: see `train_lora`.
    """
    unet, device = pipeline.unet, pipeline.unet.device
    draws = torch.Generator("cpu").manual_seed(seed)  # on the CPU, so equal on all devices
    optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=WEIGHT_DECAY)
    steps = training.steps_on(len(texts.rows))
    factor = _warmup_cosine(steps)
    noise_schedule = NoiseSchedule.of(pipeline.scheduler.config, device)
    unet.train()
    if kept is not None and kept.exists():
        if intact(kept.read_bytes()):
            losses += _go_on(kept, parameters, optimizer, draws)
        else:
            log.warning("%s is damaged: the LoRA is trained from its first step", kept)
    written = time.monotonic()
    orders = _random_steps(training, draws, len(texts.rows), latents, len(noise_schedule.alphas))
    for drawn, encoded in latents.read(islice(orders, steps - len(losses))):
        optimizer.param_groups[0]["lr"] = training.learning_rate * factor(len(losses))
        clean = encoded.sample(drawn.spread).to(device)  # (B, c, h, w)
        noise, t = drawn.noise.to(device), drawn.t.to(device)
        optimizer.zero_grad()
        loss = torch.zeros((), device=device)
        for part in torch.arange(training.batch).chunk(parts):
            of_part = part.to(device)
            x, e, at = clean[of_part], noise[of_part], t[of_part]
            conditions = texts.conditions(drawn.batch[part], drawn.dropped[part])
            with _attention(device.type):
                with _autocast(device.type, training.precision):
                    predicted = unet(noise_schedule.noisy(x, e, at), at, **conditions).sample
                error = predicted.float() - noise_schedule.target(x, e, at)
                weighted = error.square().mean(dim=(1, 2, 3)) * noise_schedule.weight(at)
                share = weighted.sum() / training.batch
                share.backward()
            loss += share.detach()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        losses.append(float(loss))
        yield losses[-1]
        if kept is not None and time.monotonic() - written >= keep_every:
            _keep(kept, parameters, optimizer, drawn.state, losses)
            written = time.monotonic()


@dataclass(frozen=True)
class _RandomStep:
    """What is drawn at random for a step."""

    batch: Tensor  # (B,) positions of images
    views: Tensor  # (B,) the same, or N more for a mirrored image
    t: Tensor  # (B,) time steps
    dropped: Tensor  # (B,) bool, whether the caption is left out
    spread: Tensor | None  # (B, c, h, w) noise of the autoencoder's distribution
    noise: Tensor  # (B, c, h, w)
    state: Tensor  # of the generator afterwards


def _random_steps(
    training: LoraTraining,
    draws: torch.Generator,
    count: int,
    latents: TrainingLatents,
    levels: int,
) -> Iterator[_RandomStep]:
    """Draw steps without end, for `count` images and a model with `levels` noise levels."""
    like = latents.first()
    shape = (training.batch, *like.mean.shape[1:])
    while True:
        batch = torch.randint(count, (training.batch,), generator=draws)
        t = torch.randint(levels, (training.batch,), generator=draws)
        dropped = torch.rand(training.batch, generator=draws) < CAPTION_DROPOUT
        views = batch
        if training.flip:
            views = batch + count * torch.randint(2, (training.batch,), generator=draws)
        spread = None if like.std is None else torch.randn(shape, generator=draws)
        noise = torch.randn(shape, generator=draws)
        yield _RandomStep(batch, views, t, dropped, spread, noise, draws.get_state())


def _keep(
    file: Path,
    parameters: list[Parameter],
    optimizer: torch.optim.Optimizer,
    draws: Tensor,
    losses: list[float],
) -> None:
    """Write a checkpoint atomically: everything on which the next step depends."""
    state = {"draws": draws, "losses": torch.tensor(losses, dtype=torch.float64)}
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
def _attention(device: str) -> Iterator[None]:
    """On a CPU, use the plain kernel: its backward pass is faster, several times so in bf16."""
    with sdpa_kernel(SDPBackend.MATH) if device == "cpu" else nullcontext():
        yield


def _autocast(device: str, precision: Precision) -> torch.autocast:
    """Compute in bf16 where that is safe, though adapters and their gradients are float32."""
    return torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bf16")


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
    parameters = [p for p in unet.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()  # small steps vanish in half precision
    return parameters


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
    """Scaled latents of images."""

    mean: Tensor  # (N, c, h, w) float32
    std: Tensor | None  # same shape, if the autoencoder returns a distribution

    def sample(self, noise: Tensor | None) -> Tensor:
        """(N, c, h, w) a sample of the distribution of each image."""
        return self.mean if self.std is None or noise is None else self.mean + self.std * noise

    def cpu(self) -> Latents:
        return Latents(self.mean.cpu(), None if self.std is None else self.std.cpu())


@dataclass
class TrainingLatents:
    """Latents of training images on the CPU, encoded when a step first needs them.

    Those of KEPT images stay in memory. A thread reads images while the device computes.
    """

    vae: Any
    images: Images
    size: int
    _encoded: dict[int, Latents] = field(default_factory=dict)  # by view

    def first(self) -> Latents:
        """Latents of the first image."""
        return self._latents([0], {} if 0 in self._encoded else {0: self._pixels(0)})

    def read(self, steps: Iterator[_RandomStep]) -> Iterator[tuple[_RandomStep, Latents]]:
        """Each step with the latents of its B views."""
        seen = set(self._encoded)

        def read(step: _RandomStep) -> tuple[_RandomStep, dict[int, Tensor]]:
            """The step, and the pixels of its views whose latents will not be in memory."""
            lacking = [view for view in dict.fromkeys(step.views.tolist()) if view not in seen]
            seen.update(lacking[: max(0, KEPT - len(seen))])
            return step, {view: self._pixels(view) for view in lacking}

        for step, pixels in computed_ahead(read, steps, threads=1, ahead=AHEAD):
            yield step, self._latents(step.views.tolist(), pixels)

    def _pixels(self, view: int) -> Tensor:
        image = torch.tensor(np.asarray(self.images[view % len(self.images)]))
        return image.flip(1) if view >= len(self.images) else image

    def _latents(self, views: Sequence[int], pixels: dict[int, Tensor]) -> Latents:
        # One by one, so that latents do not depend on what is in memory.
        new = {
            view: encode_images(self.vae, image[None], self.size).cpu()
            for view, image in pixels.items()
        }
        self._encoded |= dict(islice(new.items(), max(0, KEPT - len(self._encoded))))
        found = [new.get(view) or self._encoded[view] for view in views]
        stds = [each.std for each in found if each.std is not None]
        return Latents(torch.cat([each.mean for each in found]), torch.cat(stds) if stds else None)


@torch.no_grad()
def encode_images(vae: Any, images: Tensor, size: int) -> Latents:
    """(N, H, W, 3) uint8 -> latents on the autoencoder's device, in float32.

    Supports autoencoders with `latent_dist` (AutoencoderKL) and `latents` (AutoencoderTiny).
    """
    means, stds = [], []
    for chunk in images.split(CHUNK):
        encoded = vae.encode(_square(chunk, size).to(vae.device, vae.dtype))
        if hasattr(encoded, "latent_dist"):
            means.append(encoded.latent_dist.mean.float())
            stds.append(encoded.latent_dist.std.float())
        else:
            means.append(encoded.latents.float())
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
        rows = torch.where(dropped, len(self.table) - 1, self.rows[batch])
        return self.of(rows.to(self.table.device))

    def of(self, rows: Tensor) -> dict[str, Any]:
        """Inputs of the U-Net for rows of the table, (B,) on its device."""
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

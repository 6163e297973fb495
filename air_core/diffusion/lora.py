"""Fine-tunes a diffusion model to a domain: LoRA (arXiv:2106.09685) on pseudo-labelled images.

Supports the families of `air_core.models.families`. The attention projections of the network get
adapters; everything else is frozen. The loss is the prediction error, weighted as
`air_core.diffusion.noise` says. AiR (arXiv:2504.11930) trains one LoRA for all classes, with the
class in the caption.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Parameter
from torch.nn.attention import SDPBackend, sdpa_kernel

from air_core.diffusion.denoiser import (
    Denoiser,
    Latents,
    Texts,
    denoiser_class,
    network,
    network_name,
)
from air_core.diffusion.noise import Noise
from air_core.diffusion.pipeline import ADAPTER, DTYPES, LORA_FILE, load_pipeline
from air_core.models.families import check_denoiser
from air_core.settings import LoraTraining
from air_core.tools.ahead import computed_ahead

# N training images, B images per step, H height, W width; latents are (c, h, w).

SEED = 0  # of the initial adapters, the batches and the noise
CAPTION_DROPOUT = 0.1  # share of images without caption, which guidance needs
WARMUP = 0.1  # share of steps
WEIGHT_DECAY = 1e-2
CLIP = 1.0  # largest norm of the gradient
ADAM = ("step", "exp_avg", "exp_avg_sq")  # its state of a parameter
KEPT = 8192  # training images whose latents stay in memory; at 512 pixels, 1 GB
AHEAD = 4  # steps whose images are read before they are needed


def square(image: Image.Image, size: int) -> np.ndarray:
    """Scale the shorter side to `size` and crop the centre: (size, size, 3) uint8."""
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


@dataclass(frozen=True)
class LoraState:
    """Everything on which the next step of a training depends."""

    arrays: Mapping[str, np.ndarray]
    losses: Sequence[float]  # of the finished steps


def train_lora(
    images: Sequence[Any] | Tensor,
    captions: Sequence[str],
    model: Path,
    training: LoraTraining,
    size: int,
    out: Path,
    device: str = "cpu",
    thrift: int = 0,
    report: Callable[[int, int, Callable[[], LoraState]], None] = lambda *step: None,
    resume_from: LoraState | None = None,
) -> dict[str, float]:
    """Train adapters and write them to `out/pytorch_lora_weights.safetensors`.

    Args:
        images: N squares (H, W, 3) uint8, read on a thread when a step needs them.
        captions: N texts that contain the class.
        model: diffusers folder.
        training: rank, steps and other settings, except for `caption`.
        size: side of the images, in pixels.
        out: folder; created if necessary.
        device: on which to train.
        thrift: trades speed for memory: 1 computes activations again for the gradient, each number
            above also halves the images of a pass. Changes no result beyond rounding.
        report: called after each step with (finished steps, steps, function that returns the
            state).
        resume_from: a state that `report` got; the training continues as if it had never stopped.

    Returns:
        `loss_first` and `loss_last`, the mean losses of the first and the last tenth of the steps,
        and `seconds`.

    Raises:
        ValueError: the model is not supported.
        FloatingPointError: the loss is not finite.
    """
    assert 0 < len(images) == len(captions)
    start = time.perf_counter()
    check_denoiser(model)
    pipeline = load_pipeline(model, DTYPES[training.precision])
    parameters = add_adapters(pipeline, training.rank)
    pipeline.to(device)
    denoiser = denoiser_class(pipeline)(pipeline, size)
    denoiser.network.train()
    if thrift:
        denoiser.network.enable_gradient_checkpointing()
    parts = 2 ** max(0, thrift - 1)
    latents, texts = TrainingLatents(denoiser, images), denoiser.encode_captions(captions)
    optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=WEIGHT_DECAY)
    draws = torch.Generator("cpu").manual_seed(SEED)  # on the CPU, so equal on all devices
    losses: list[float] = []
    if resume_from is not None:
        losses += resume_from.losses
        _restore(resume_from.arrays, parameters, optimizer, draws)
    steps = training.steps_on(len(images))
    factor = _warmup_cosine(steps)
    drawn = _random_steps(training, draws, len(images), latents, denoiser.noise)
    for step, encoded in latents.read(islice(drawn, steps - len(losses))):
        optimizer.param_groups[0]["lr"] = training.learning_rate * factor(len(losses))
        optimizer.zero_grad()
        loss = _backward(denoiser, step, encoded, texts, training, parts)
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        losses.append(float(loss))  # the host waits for the device here only
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(
                f"the LoRA's loss is {losses[-1]} at step {len(losses)}; lower lora.learning_rate"
            )
        report(len(losses), steps, partial(_state, parameters, optimizer, step.state, losses))
    save_adapters(pipeline, out)
    tenth = max(1, len(losses) // 10)
    return {
        "loss_first": math.fsum(losses[:tenth]) / tenth,
        "loss_last": math.fsum(losses[-tenth:]) / tenth,
        "seconds": time.perf_counter() - start,
    }


def _backward(
    denoiser: Denoiser,
    step: _RandomStep,
    encoded: Latents,
    texts: Texts,
    training: LoraTraining,
    parts: int,
) -> Tensor:
    """Add the gradients of a step, in `parts` passes, and return its loss."""
    noise, device = denoiser.noise, denoiser.network.device
    clean = encoded.sample(step.spread).to(device)  # (B, c, h, w)
    noises, t = step.noise.to(device), step.t.to(device)
    loss = torch.zeros((), device=device)
    for part in torch.arange(training.batch).chunk(parts):
        of_part = part.to(device)
        x, e, at = clean[of_part], noises[of_part], t[of_part]
        conditions = texts.conditions(step.batch[part], step.dropped[part])
        # On a CPU the backward pass of the plain kernel is faster, several times so in bf16.
        with sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext():
            # In bf16 where that is safe, though adapters and their gradients are float32.
            with torch.autocast(device.type, torch.bfloat16, training.precision == "bf16"):
                predicted = denoiser.predict(noise.noisy(x, e, at), at, conditions)
            error = predicted.float() - noise.target(x, e, at)
            weighted = error.square().mean(dim=(1, 2, 3)) * noise.weights[at]
            share = weighted.sum() / training.batch
            share.backward()
        loss += share.detach()
    return loss


@dataclass(frozen=True)
class _RandomStep:
    """What is drawn at random for a step."""

    batch: Tensor  # (B,) positions of images
    views: Tensor  # (B,) the same, or N more for a mirrored image
    t: Tensor  # (B,) noise levels
    dropped: Tensor  # (B,) bool, whether the caption is left out
    spread: Tensor | None  # (B, c, h, w) noise of the autoencoder's distribution
    noise: Tensor  # (B, c, h, w)
    state: Tensor  # of the generator afterwards


def _random_steps(
    training: LoraTraining,
    draws: torch.Generator,
    count: int,
    latents: TrainingLatents,
    noise_levels: Noise,
) -> Iterator[_RandomStep]:
    """Draw steps without end, for `count` images."""
    like = latents.first()
    shape = (training.batch, *like.mean.shape[1:])
    while True:
        batch = torch.randint(count, (training.batch,), generator=draws)
        t = noise_levels.draw(training.batch, draws)
        dropped = torch.rand(training.batch, generator=draws) < CAPTION_DROPOUT
        views = batch
        if training.flip:
            views = batch + count * torch.randint(2, (training.batch,), generator=draws)
        spread = None if like.std is None else torch.randn(shape, generator=draws)
        noise = torch.randn(shape, generator=draws)
        yield _RandomStep(batch, views, t, dropped, spread, noise, draws.get_state())


def _state(
    parameters: list[Parameter],
    optimizer: torch.optim.Optimizer,
    draws: Tensor,
    losses: list[float],
) -> LoraState:
    tensors = {"draws": draws}
    for i, parameter in enumerate(parameters):
        tensors[f"{i}"] = parameter
        tensors |= {f"{i}.{name}": optimizer.state[parameter][name] for name in ADAM}
    arrays = {name: tensor.numpy(force=True).copy() for name, tensor in tensors.items()}
    return LoraState(arrays, [*losses])


def _restore(
    arrays: Mapping[str, np.ndarray],
    parameters: list[Parameter],
    optimizer: torch.optim.Optimizer,
    draws: torch.Generator,
) -> None:
    tensors = {name: torch.tensor(array) for name, array in arrays.items()}
    draws.set_state(tensors["draws"])
    adam = {}
    for i, parameter in enumerate(parameters):
        parameter.data.copy_(tensors[f"{i}"])
        adam[i] = {name: tensors[f"{i}.{name}"] for name in ADAM}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": adam})


def _warmup_cosine(steps: int) -> Callable[[int], float]:
    warmup = max(1, round(WARMUP * steps))
    return lambda step: min(1, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


# ---------------------------------------------------------------- adapters


def add_adapters(pipeline: Any, rank: int) -> list[Parameter]:
    """Freeze a network and add adapters without effect; return the parameters to train."""
    from peft import LoraConfig, inject_adapter_in_model

    adapted, targets = network(pipeline), [*denoiser_class(pipeline).targets]
    # Alpha equals the rank, so the scale is 1 even for a reader that ignores alpha.
    config = LoraConfig(
        r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets
    )
    adapted.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        inject_adapter_in_model(config, adapted, ADAPTER)
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()  # small steps vanish in half precision
    return parameters


def save_adapters(pipeline: Any, out: Path) -> None:
    """Write the adapters with their configuration, which contains alpha, as diffusers does."""
    part, adapted = network_name(pipeline), network(pipeline)
    layers = {
        f"{part}.{name.replace(f'.{ADAPTER}.', '.')}": parameter.detach().cpu().contiguous()
        for name, parameter in adapted.named_parameters()
        if f".{ADAPTER}." in name
    }
    config = adapted.peft_config[ADAPTER].to_dict()
    config["target_modules"] = sorted(config["target_modules"])  # a set has no stable order
    metadata = {f"{part}.{name}": value for name, value in config.items()}
    out.mkdir(parents=True, exist_ok=True)
    save_file(
        layers,
        out / LORA_FILE,
        {"format": "pt", "lora_adapter_metadata": json.dumps(metadata, indent=2, sort_keys=True)},
    )


# ---------------------------------------------------------------- inputs of a step


@dataclass
class TrainingLatents:
    """Latents of training images on the CPU, encoded when a step first needs them.

    Those of KEPT images stay in memory. A thread reads images while the device computes.
    """

    denoiser: Denoiser
    images: Sequence[Any] | Tensor
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
            view: self.denoiser.encode_images(image[None]).cpu() for view, image in pixels.items()
        }
        self._encoded |= dict(islice(new.items(), max(0, KEPT - len(self._encoded))))
        found = [new.get(view) or self._encoded[view] for view in views]
        stds = [each.std for each in found if each.std is not None]
        return Latents(torch.cat([each.mean for each in found]), torch.cat(stds) if stds else None)

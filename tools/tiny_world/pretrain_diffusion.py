"""Pretrain the tiny text-to-image pipeline.

Trains a latent diffusion model (arXiv:2112.10752) in three steps: an autoencoder from 32x32 pixels
to 8x8 latents, the latents of all source images, and a U-Net that predicts noise for a caption,
with min-SNR weights (arXiv:2303.09556) and classifier-free guidance (arXiv:2207.12598). The text
encoder starts from the text tower of the final CLIP (`work/clip-final.safetensors`), so run
`pretrain_clip` first.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", DIFFUSERS_VERBOSITY="error")

import numpy as np
import torch
from diffusers import (
    AutoencoderTiny,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from numpy.typing import NDArray
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tools.tiny_world import scores
from tools.tiny_world.pretrain_clip import (
    CONTEXT,
    TEXT,
    exact_attention,
    load_tokenizer,
    write_merges,
)
from tools.tiny_world.render import DIGITS, Source, caption, source

# B images in a batch, N images, S side in pixels, L tokens, W text width.

LATENT_NOISE = 0.05  # makes the decoder robust against small errors of the U-Net
SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class VaeTraining:
    """The autoencoder: AdamW, one cycle."""

    steps: int = 1300
    batch: int = 64
    learning_rate: float = 2e-3
    seed: int = 1


@dataclass(frozen=True, kw_only=True)
class UnetTraining:
    """U-Net and text encoder: AdamW, warm-up, constant, then linearly down to 5 %."""

    steps: int = 2000
    batch: int = 64
    learning_rate: float = 1e-3
    text_share: float = 0.3  # learning rate of the text encoder relative to the U-Net's
    warmup: int = 100
    constant: float = 0.6  # share of the steps before the learning rate decreases
    caption_dropout: float = 0.1
    digit_weight: int = 4  # factor by which digits are sampled more often
    gamma: float = 5.0  # min-SNR
    ema: float = 0.998
    seed: int = 2


# ---------------------------------------------------------------- autoencoder


def pretrain_vae(work: Path, images: int, training: VaeTraining) -> None:
    """Train the autoencoder and encode all source images; write both to `work`."""
    everything = source(work, images)
    seen, held_out = everything.split()
    vae = build_vae(training.seed)
    start = time.process_time()
    for step, loss in fit_vae(vae, seen.images, training):
        if step % 50 == 0 or step == training.steps:
            print(f"vae {step} loss {loss:.4f} {time.process_time() - start:.0f} CPU-s", flush=True)
    scale = float(1 / encode(vae, held_out.images).std())
    vae.register_to_config(scaling_factor=scale)
    print(
        f"vae scaling_factor {scale:.4f} "
        f"held_out_mse {scores.vae_error(vae, held_out.images):.4f} "
        f"handwritten_mse {scores.vae_error(vae, scores.handwritten()[0]):.4f}",
        flush=True,
    )
    vae.save_pretrained(work / "vae")
    np.save(work / "latents.npy", (encode(vae, everything.images) * scale).half().numpy())


def build_vae(seed: int) -> Any:
    """An autoencoder that reduces each side by 4, with 4 channels and equal widths."""
    torch.manual_seed(seed)
    vae: Any = AutoencoderTiny(
        encoder_block_out_channels=(32, 32, 32),
        decoder_block_out_channels=(32, 32, 32),
        num_encoder_blocks=(1, 2, 2),
        num_decoder_blocks=(2, 2, 1),
        latent_channels=4,
        upsampling_scaling_factor=2,
    )
    return vae.to(memory_format=torch.channels_last)


def fit_vae(
    vae: Any, images: NDArray[np.uint8], training: VaeTraining
) -> Iterator[tuple[int, float]]:
    """Train in place; yield (finished steps, loss)."""
    rng = np.random.default_rng([training.seed, 1])
    noise = torch.Generator().manual_seed(training.seed)
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=training.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, training.learning_rate, total_steps=training.steps, pct_start=0.05
    )
    vae.train()
    for step in range(training.steps):
        pixels = scores.vae_input(images[rng.integers(len(images), size=training.batch)])
        latents = vae.encode(pixels).latents
        shaken = latents + LATENT_NOISE * torch.randn(latents.shape, generator=noise)
        error = vae.decode(shaken).sample - pixels
        # A diffusion model expects latents of mean 0 and standard deviation 1 in each channel.
        shape = (latents.mean(dim=(0, 2, 3)) ** 2 + (latents.std(dim=(0, 2, 3)) - 1) ** 2).mean()
        loss = (error**2).mean() + 0.25 * error.abs().mean() + 0.01 * shape
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield step + 1, float(loss.detach())


@torch.no_grad()
def encode(vae: Any, images: NDArray[np.uint8]) -> Tensor:
    """Latents (N, 4, S/4, S/4), not scaled."""
    vae.eval()
    parts = [vae.encode(pixels).latents for pixels in scores.vae_batches(images)]
    return torch.cat(parts).contiguous()


# ---------------------------------------------------------------- U-Net and text encoder


def pretrain_unet(work: Path, out: Path, images: int, training: UnetTraining) -> None:
    """Train U-Net and text encoder on `work/latents.npy`; write the pipeline to `out/diffusion`."""
    folder = out / "diffusion"
    folder.mkdir(parents=True, exist_ok=True)
    write_merges(work / "merges.txt.gz")
    tokenizer = load_tokenizer(work / "merges.txt.gz")
    seen, _ = source(work, images).split()
    latents = torch.from_numpy(np.load(work / "latents.npy")[: len(seen)])
    unet = build_unet(training.seed)
    text_encoder = build_text_encoder(load_file(work / "clip-final.safetensors"))
    ema = Averages(unet, text_encoder, decay=training.ema)
    start, recent = time.process_time(), 0.0
    for step, loss in fit_unet(unet, text_encoder, tokenizer, seen, latents, training):
        ema.update(step)
        recent = loss if step == 1 else 0.98 * recent + 0.02 * loss
        if step % 50 == 0 or step == training.steps:
            print(
                f"unet {step} loss {recent:.4f} {time.process_time() - start:.0f} CPU-s", flush=True
            )
    ema.copy_to_models()
    vae = AutoencoderTiny.from_pretrained(work / "vae", local_files_only=True)
    vae.register_to_config(_name_or_path="")  # otherwise the shipped file names `work`
    save(folder, vae, text_encoder, unet, tokenizer)


def build_unet(seed: int) -> Any:
    """A U-Net of two levels with cross-attention; attention_head_dim is the number of heads."""
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 96),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT["width"],
        attention_head_dim=2,
        norm_num_groups=16,
    )


def build_text_encoder(clip: dict[str, Tensor]) -> CLIPTextModel:
    """Convert the text tower of an open_clip CLIP to transformers."""
    model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=TEXT["vocab_size"],
            hidden_size=TEXT["width"],
            intermediate_size=4 * TEXT["width"],
            num_hidden_layers=TEXT["layers"],
            num_attention_heads=TEXT["heads"],
            max_position_embeddings=CONTEXT,
            hidden_act="gelu",
            bos_token_id=TEXT["vocab_size"] - 2,
            eos_token_id=TEXT["vocab_size"] - 1,
            pad_token_id=0,
        )
    )
    state = {
        "embeddings.token_embedding.weight": clip["token_embedding.weight"],
        "embeddings.position_embedding.weight": clip["positional_embedding"],
        "final_layer_norm.weight": clip["ln_final.weight"],
        "final_layer_norm.bias": clip["ln_final.bias"],
    }
    for layer in range(TEXT["layers"]):
        theirs, ours = f"transformer.resblocks.{layer}", f"encoder.layers.{layer}"
        for kind in ("weight", "bias"):
            fused = clip[f"{theirs}.attn.in_proj_{kind}"].chunk(3)
            for name, part in zip("qkv", fused, strict=True):
                state[f"{ours}.self_attn.{name}_proj.{kind}"] = part
            state[f"{ours}.self_attn.out_proj.{kind}"] = clip[f"{theirs}.attn.out_proj.{kind}"]
            state[f"{ours}.layer_norm1.{kind}"] = clip[f"{theirs}.ln_1.{kind}"]
            state[f"{ours}.layer_norm2.{kind}"] = clip[f"{theirs}.ln_2.{kind}"]
            state[f"{ours}.mlp.fc1.{kind}"] = clip[f"{theirs}.mlp.c_fc.{kind}"]
            state[f"{ours}.mlp.fc2.{kind}"] = clip[f"{theirs}.mlp.c_proj.{kind}"]
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert all("position_ids" in name for name in missing), missing
    return model


class Averages:
    """Exponential moving averages of the weights, which give better images than the weights."""

    def __init__(self, *models: torch.nn.Module, decay: float) -> None:
        self.live = [p for model in models for p in model.parameters()]
        self.shadow = [p.detach().clone() for p in self.live]
        self.decay = decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, step / (step + 9))  # short memory at the start
        for average, live in zip(self.shadow, self.live, strict=True):
            average.lerp_(live, 1 - decay)

    @torch.no_grad()
    def copy_to_models(self) -> None:
        for average, live in zip(self.shadow, self.live, strict=True):
            live.copy_(average)


def fit_unet(
    unet: Any,
    text_encoder: CLIPTextModel,
    tokenizer: SimpleTokenizer,
    seen: Source,
    latents: Tensor,
    training: UnetTraining,
) -> Iterator[tuple[int, float]]:
    """Train in place on scaled latents (N, 4, 8, 8); yield (finished steps, loss)."""
    rng = np.random.default_rng([training.seed, 1])
    noises = torch.Generator().manual_seed(training.seed)
    alphas = scheduler().alphas_cumprod  # (T,)
    weights = np.where(seen.concepts < len(DIGITS), training.digit_weight, 1).astype(np.float64)
    cumulative = np.cumsum(weights) / weights.sum()
    groups = [
        {"params": list(unet.parameters()), "share": 1.0},
        {"params": list(text_encoder.parameters()), "share": training.text_share},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=training.learning_rate, betas=(0.9, 0.99), weight_decay=0.01
    )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    unet.train()
    text_encoder.train()
    for step in range(training.steps):
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * group["share"] * _rate(step, training)
        batch = np.searchsorted(cumulative, rng.random(training.batch), side="right")
        texts = [
            "" if rng.random() < training.caption_dropout else caption(seen.attributes[i], rng)
            for i in batch
        ]
        clean = latents[batch].float()
        noise = torch.randn(clean.shape, generator=noises)
        t = torch.randint(len(alphas), (len(clean),), generator=noises)
        alpha = alphas[t].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        with exact_attention():
            states = text_encoder(tokenizer(texts)).last_hidden_state  # (B, L, W)
            predicted = unet(noisy, t, states).sample
            snr = alphas[t] / (1 - alphas[t])
            error = (predicted - noise).square().mean(dim=(1, 2, 3))  # (B,)
            loss = (error * snr.clamp(max=training.gamma) / snr).mean()
            optimizer.zero_grad()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        yield step + 1, float(loss.detach())


def _rate(step: int, training: UnetTraining) -> float:
    if step < training.warmup:
        return (step + 1) / training.warmup
    share = step / training.steps
    if share < training.constant:
        return 1.0
    return 1 - 0.95 * (share - training.constant) / (1 - training.constant)


# ---------------------------------------------------------------- shipped folder


def save(
    folder: Path,
    vae: Any,
    text_encoder: CLIPTextModel,
    unet: Any,
    tokenizer: SimpleTokenizer,
) -> None:
    """Write a diffusers folder in half precision."""
    pipeline: Any = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=diffusers_tokenizer(tokenizer),
        unet=unet,
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(folder)


def scheduler() -> Any:
    """DPM-Solver++ (arXiv:2211.01095) with the noise schedule of the training."""
    return DPMSolverMultistepScheduler(
        **SCHEDULE, algorithm_type="dpmsolver++", solver_order=2, steps_offset=1
    )


def diffusers_tokenizer(tokenizer: SimpleTokenizer) -> CLIPTokenizer:
    """Convert the tokenizer to transformers, with its special tokens and '!' as padding."""
    specials = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    return CLIPTokenizer(
        vocab={specials.get(token, token): i for token, i in tokenizer.encoder.items()},
        merges=sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__),
        pad_token="!",
        model_max_length=CONTEXT,
    )

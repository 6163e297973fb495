"""Diffusers folders with the parts and shapes of published models, but narrow and random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from air_core.tiny import WEIGHTS

SIZE = 64  # pixels; 8 of them are one latent
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def stable_diffusion_1(folder: Path, prediction: str = "epsilon") -> Path:
    """As Stable Diffusion 1.5: four levels, its safety checker named in the index."""
    scheduler = diffusers.PNDMScheduler(
        **NOISE, skip_prk_steps=True, steps_offset=1, prediction_type=prediction
    )
    _save(folder, scheduler, attention_head_dim=2)
    index = folder / "model_index.json"
    checker = '["stable_diffusion", "StableDiffusionSafetyChecker"]'
    index.write_text(
        index.read_text().replace(
            '"safety_checker": [\n    null,\n    null\n  ]', '"safety_checker": ' + checker
        )
    )
    return folder


def stable_diffusion_2(folder: Path) -> Path:
    """As Stable Diffusion 2.1: linear projections, heads by level, v prediction."""
    scheduler = diffusers.DDIMScheduler(
        **NOISE, prediction_type="v_prediction", clip_sample=False, steps_offset=1,
        set_alpha_to_one=False,
    )  # fmt: skip
    return _save(folder, scheduler, attention_head_dim=(2, 2, 4, 4), use_linear_projection=True)


def _save(folder: Path, scheduler: Any, **unet: Any) -> Path:
    torch.manual_seed(0)
    diffusers.StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=CLIPTextModel(text_config(32)),
        tokenizer=tokenizer(),
        unet=diffusers.UNet2DConditionModel(
            block_out_channels=(16, 16, 32, 32), cross_attention_dim=32, norm_num_groups=8,
            sample_size=SIZE // 8, **unet,
        ),
        scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def stable_diffusion_xl(folder: Path) -> Path:
    """As Stable Diffusion XL: two text encoders, the pooled text and sizes as conditions."""
    torch.manual_seed(0)
    diffusers.StableDiffusionXLPipeline(
        vae=autoencoder(scaling_factor=0.13025, force_upcast=True),
        text_encoder=CLIPTextModel(text_config(16)),
        tokenizer=tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(text_config(32)),
        tokenizer_2=tokenizer(),
        unet=diffusers.UNet2DConditionModel(
            block_out_channels=(16, 32, 32), cross_attention_dim=16 + 32, norm_num_groups=8,
            attention_head_dim=(2, 4, 4), use_linear_projection=True, sample_size=SIZE // 8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 1, 2), addition_embed_type="text_time",
            addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 32,
        ),
        scheduler=diffusers.EulerDiscreteScheduler(**NOISE, steps_offset=1),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def stable_diffusion_3(folder: Path) -> Path:
    """As Stable Diffusion 3 without its T5: a transformer trained by flow matching."""
    torch.manual_seed(0)
    diffusers.StableDiffusion3Pipeline(
        vae=autoencoder(latent_channels=16, shift_factor=0.0609),
        text_encoder=CLIPTextModelWithProjection(text_config(16)),
        tokenizer=tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(text_config(16)),
        tokenizer_2=tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=SIZE // 8, patch_size=2, in_channels=16, num_layers=2,
            attention_head_dim=8, num_attention_heads=2, joint_attention_dim=48,
            caption_projection_dim=16, pooled_projection_dim=32, out_channels=16,
            pos_embed_max_size=16,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def image_to_image(folder: Path) -> Path:
    """A pipeline that needs an image in addition to a text."""
    index = stable_diffusion_1(folder) / "model_index.json"
    index.write_text(
        index.read_text().replace("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
    )
    return folder


def tokenizer() -> Any:
    return CLIPTokenizer.from_pretrained(WEIGHTS / "diffusion" / "tokenizer", local_files_only=True)


def text_config(width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=2014, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=24, bos_token_id=2012, eos_token_id=2013,
        pad_token_id=0, projection_dim=width,
    )  # fmt: skip


def autoencoder(**changes: Any) -> diffusers.AutoencoderKL:
    config = {"latent_channels": 4, "block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4}
    levels = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "sample_size": SIZE,
    }
    return diffusers.AutoencoderKL(**(config | levels | changes))

"""Diffusers folders with the parts and shapes of published models, but narrow and random."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from air_core.models.weights import generator_folder

SIZE = 64  # pixels; 8 of them are one latent
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def stable_diffusion_1(folder: Path) -> Path:
    """As Stable Diffusion 1.5: four levels, its safety checker named in the index."""
    scheduler = diffusers.PNDMScheduler(**NOISE, skip_prk_steps=True, steps_offset=1)
    _save(folder, scheduler, attention_head_dim=2)
    index = folder / "model_index.json"
    checker = '["stable_diffusion", "StableDiffusionSafetyChecker"]'
    none = "[\n    null,\n    null\n  ]"
    index.write_text(index.read_text().replace(f'_checker": {none}', f'_checker": {checker}'))
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
            block_out_channels=(16, 16, 32, 32), layers_per_block=1, cross_attention_dim=32,
            norm_num_groups=8, sample_size=SIZE // 8, **unet,
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
            block_out_channels=(16, 32, 32), layers_per_block=1, cross_attention_dim=16 + 32,
            norm_num_groups=8, attention_head_dim=(2, 4, 4), use_linear_projection=True,
            sample_size=SIZE // 8,
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


def stable_diffusion_3(folder: Path, t5_width: int | None = None) -> Path:
    """As Stable Diffusion 3, with its T5 or without: a transformer trained by flow matching."""
    torch.manual_seed(0)
    diffusers.StableDiffusion3Pipeline(
        vae=autoencoder(latent_channels=16, shift_factor=0.0609),
        text_encoder=CLIPTextModelWithProjection(text_config(16)),
        tokenizer=tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(text_config(16)),
        tokenizer_2=tokenizer(),
        text_encoder_3=t5_width and t5(t5_width),
        tokenizer_3=t5_width and t5_tokenizer(),
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=SIZE // 8, patch_size=2, in_channels=16, num_layers=2,
            attention_head_dim=8, num_attention_heads=2, joint_attention_dim=48,
            caption_projection_dim=16, pooled_projection_dim=32, out_channels=16,
            pos_embed_max_size=16,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def stable_diffusion_35(folder: Path) -> Path:
    """As Stable Diffusion 3.5: with T5."""
    return stable_diffusion_3(folder, t5_width=48)


def flux_dev(folder: Path, *, guided: bool = True) -> Path:
    """As FLUX.1-dev: packed latents, the guidance as an input, levels shifted by the size."""
    torch.manual_seed(0)
    diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            shift=3.0 if guided else 1.0, use_dynamic_shifting=guided
        ),
        vae=autoencoder(
            latent_channels=16, shift_factor=0.1159, scaling_factor=0.3611, use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=CLIPTextModel(text_config(32)),
        tokenizer=tokenizer(),
        text_encoder_2=t5(32),
        tokenizer_2=t5_tokenizer(),
        transformer=diffusers.FluxTransformer2DModel(
            in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
            guidance_embeds=guided, axes_dims_rope=(4, 4, 8),
        ),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def flux_schnell(folder: Path) -> Path:
    """As FLUX.1-schnell: without the guidance."""
    return flux_dev(folder, guided=False)


def pixart_sigma(folder: Path) -> Path:
    """As PixArt-Sigma: a transformer that predicts noise and its variance, and a T5."""
    torch.manual_seed(0)
    diffusers.PixArtSigmaPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5(32),
        vae=autoencoder(scaling_factor=0.13025),
        transformer=_reading_captions(diffusers.PixArtTransformer2DModel(
            sample_size=SIZE // 8, num_layers=1, attention_head_dim=8, num_attention_heads=2,
            caption_channels=32, in_channels=4, cross_attention_dim=16, out_channels=8,
        )),
        scheduler=diffusers.DPMSolverMultistepScheduler(beta_end=0.02, solver_order=2),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def sana(folder: Path) -> Path:
    """As SANA: linear attention, an autoencoder without a distribution, and a Gemma."""
    torch.manual_seed(0)
    letters = ["<pad>", "<eos>", "<bos>", "<unk>", *map(chr, range(33, 127)), "\u2581"]
    towers = {"block_out_channels": (8, 8, 8), "layers_per_block": (1, 1, 1)}
    blocks = ("ResBlock", "ResBlock", "EfficientViTBlock")
    diffusers.SanaPipeline(
        tokenizer=GemmaTokenizer(vocab={c: i for i, c in enumerate(letters)}, merges=[]),
        text_encoder=Gemma2Model(
            Gemma2Config(
                vocab_size=len(letters), head_dim=8, hidden_size=16, intermediate_size=32,
                num_attention_heads=2, num_hidden_layers=1, num_key_value_heads=2,
            )
        ),
        vae=diffusers.AutoencoderDC(
            in_channels=3, latent_channels=4, attention_head_dim=2, scaling_factor=0.41407,
            encoder_block_types=blocks, decoder_block_types=blocks,
            encoder_qkv_multiscales=((), (), (5,)), decoder_qkv_multiscales=((), (), (5,)),
            downsample_block_type="conv", upsample_block_type="interpolate",
            **{f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in
               towers.items()},
        ),
        transformer=_reading_captions(diffusers.SanaTransformer2DModel(
            patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2,
            attention_head_dim=4, num_cross_attention_heads=2, cross_attention_head_dim=4,
            cross_attention_dim=8, caption_channels=16, sample_size=SIZE // 4,
        )),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def qwen_image(folder: Path) -> Path:
    """As Qwen-Image: packed latents of a video autoencoder, and a Qwen2.5-VL."""
    torch.manual_seed(0)
    text = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 2,
            "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
        },
        vision_config={
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
            "out_hidden_size": 16, "fullatt_block_indexes": [0],
        },
    )  # fmt: skip
    diffusers.QwenImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
        vae=diffusers.AutoencoderKLQwenImage(
            base_dim=4, z_dim=4, dim_mult=[1, 1, 2, 2], num_res_blocks=1,
            latents_mean=[0.0, 0.1, 0.2, 0.3], latents_std=[1.0, 1.1, 1.2, 1.3],
        ),
        text_encoder=Qwen2_5_VLForConditionalGeneration(text),
        tokenizer=qwen_tokenizer(),
        transformer=_reading_captions(diffusers.QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
        )),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def _reading_captions(transformer: Any) -> Any:
    """The same transformer, which reads its captions: with random weights it hardly does."""
    for name, weight in transformer.named_parameters():
        if any(part in name for part in ("caption_projection", "attn2.to_v", "add_v_proj")):
            weight.data *= 5
    return transformer


def tokenizer() -> Any:
    return CLIPTokenizer.from_pretrained(
        generator_folder("tiny") / "tokenizer", local_files_only=True
    )


def t5(width: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=200, d_model=width, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    )


def t5_tokenizer() -> Any:
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = ["<pad>", "</s>", "<unk>", *(f"\u2581{c}" for c in letters), *letters, "\u2581"]
    vocab = [(piece, 0.0 if piece.startswith("<") else -2.0) for piece in pieces]
    return T5TokenizerFast(vocab=vocab, extra_ids=0)


def qwen_tokenizer() -> Any:
    letters = [chr(c) for c in range(33, 127)] + ["\u0120", "\u010a"]
    return Qwen2Tokenizer(vocab={c: i for i, c in enumerate(letters)}, merges=[])


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


# By the class of their pipeline.
MODELS: dict[str, list[Callable[[Path], Path]]] = {
    "StableDiffusionPipeline": [stable_diffusion_1, stable_diffusion_2],
    "StableDiffusionXLPipeline": [stable_diffusion_xl],
    "StableDiffusion3Pipeline": [stable_diffusion_3, stable_diffusion_35],
    "FluxPipeline": [flux_dev, flux_schnell],
    "PixArtSigmaPipeline": [pixart_sigma],
    "SanaPipeline": [sana],
    "QwenImagePipeline": [qwen_image],
}

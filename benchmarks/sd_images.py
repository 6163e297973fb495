"""Images per second of Stable Diffusion on this device, with possible optimizations.

The pipeline has the size of Stable Diffusion 1.5 (860 million parameters in the U-Net, 512 pixels)
and random weights, on which its speed does not depend. `--small` has a tenth of the channels.

- *plain*: the diffusers pipeline in half precision, one block per call, same sampler and steps;
- *ours*: `PipelineGenerator` in bf16;
- each other line changes one property of *ours*: channels last, a compiled U-Net, other block
  sizes; the last line combines the changes that helped.

    python benchmarks/sd_images.py [--device cuda] [--block 8] [--blocks 3] [--steps 25] [--small]

On a CPU only `--small` is feasible. The last line is JSON: `ratio` is the rate of *ours* divided by
*plain*, and `peak` the fraction of the device's peak rate of dense bf16 operations that *ours*
reaches, if the device is in the table PEAK.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))

from air_core.diffusion import pipeline
from air_core.diffusion.pipeline import PipelineGenerator, load_pipeline
from air_core.models.weights import generator_folder
from air_core.specs import GenerationSettings
from benchmarks.harness import options, progress, report

PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}  # bf16
NAME = "a photo of a bird"
NOISE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
}


def random_pipeline(folder: Path, small: bool) -> int:
    """Write a pipeline of the size of Stable Diffusion 1.5; returns the image size in pixels."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = load_pipeline(generator_folder("tiny")).tokenizer
    part = 10 if small else 1
    width, size = (64, 64) if small else (768, 512)
    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=12 // part,
        num_attention_heads=width // 64,
        max_position_embeddings=77,
    )
    unet = UNet2DConditionModel(
        sample_size=size // 8,
        cross_attention_dim=width,
        block_out_channels=tuple(320 * n // part for n in (1, 2, 4, 4)),
        attention_head_dim=8,
        norm_num_groups=4 if small else 32,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=tuple(128 * n // (4 if small else 1) for n in (1, 2, 4, 4)),
        layers_per_block=2,
        latent_channels=4,
        sample_size=size,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(**NOISE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return size


# ---------------------------------------------------------------- timed variants

Draw = Callable[[int], Any]  # draws a block with a number of images


def plain(folder: Path, settings: GenerationSettings, device: str) -> Draw:
    """The pipeline as in the documentation of diffusers."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    half = torch.float16 if torch.device(device).type == "cuda" else torch.bfloat16
    loaded = StableDiffusionPipeline.from_pretrained(
        folder, dtype=half, local_files_only=True, use_safetensors=True
    ).to(device)
    loaded.scheduler = DPMSolverMultistepScheduler.from_config(loaded.scheduler.config)
    loaded.set_progress_bar_config(disable=True)

    def draw(count: int) -> Any:
        with torch.inference_mode():
            return loaded(
                [NAME] * count,
                height=settings.size,
                width=settings.size,
                num_inference_steps=settings.num_inference_steps,
                guidance_scale=settings.guidance_scale,
                output_type="pt",
            ).images.cpu()

    return draw


def ours(folder: Path, settings: GenerationSettings, device: str, *changes: str) -> Draw:
    pipeline._shared.clear()  # without the changes of the variant before
    generator = PipelineGenerator(folder, settings, device=device)
    for name in changes:
        CHANGES[name](generator.pipeline)
    return lambda count: generator.generate("bird", range(count), [0] * count)


def _channels_last(pipeline: Any) -> None:
    pipeline.unet.to(memory_format=torch.channels_last)
    pipeline.vae.to(memory_format=torch.channels_last)


def _compiled(pipeline: Any) -> None:
    pipeline.unet.compile(mode="default")


CHANGES: dict[str, Callable[[Any], None]] = {
    "channels_last": _channels_last,
    "compiled": _compiled,
}


def rate(draw: Draw, block: int, blocks: int) -> float:
    """Images per second after a warm-up block, including the copy to the CPU."""
    draw(block)
    begun = time.perf_counter()
    for _ in range(blocks):
        draw(block)
    return block * blocks / (time.perf_counter() - begun)


def operations(folder: Path, settings: GenerationSettings, device: str) -> float:
    """Floating-point operations of matrix products and convolutions for one image."""
    draw = ours(folder, settings, device)
    with FlopCounterMode(display=False) as counter:
        draw(1)
    return float(counter.get_total_flops())


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    without: list[str] = []
    args = options(
        __doc__, device=device, block=8, blocks=3, steps=25, small=False, without=without
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = random_pipeline(folder, args.small)
        settings = GenerationSettings(
            size=size, num_inference_steps=args.steps, block=args.block, precision="bf16"
        )
        device, block, blocks = args.device, args.block, args.blocks
        found: dict[str, float] = {}

        def timed(what: str, make: Callable[[], Draw], images: int = block) -> float:
            found[what] = rate(make(), images, blocks)
            progress(f"{what:24} {found[what]:8.2f} images/s")
            if torch.device(device).type == "cuda":
                torch.cuda.empty_cache()
            return found[what]

        timed("plain", partial(plain, folder, settings, device))
        base = timed("ours", partial(ours, folder, settings, device))
        helped = [
            change
            for change in CHANGES
            if change not in args.without
            and timed(f"ours, {change}", partial(ours, folder, settings, device, change)) > base
        ]
        for images in (block // 2, block * 2, block * 4):
            timed(f"ours, blocks of {images}", partial(ours, folder, settings, device), images)
        timed("ours, what helped", partial(ours, folder, settings, device, *helped))
        count = operations(folder, settings, device)
    card = torch.cuda.get_device_name() if torch.device(device).type == "cuda" else ""
    peak = next((most for word, most in PEAK.items() if word in card), None)
    report(
        "sd_images",
        found["ours"] / found["plain"],
        "the diffusers pipeline in half precision, one block per call",
        best_ratio=found["ours, what helped"] / found["plain"],
        helped=helped,
        images_per_second=found,
        tflop_an_image=count / 1e12,
        peak=found["ours"] * count / peak if peak else None,
        device=card or device,
        size=size,
        block=block,
        steps=args.steps,
    )


if __name__ == "__main__":
    main()

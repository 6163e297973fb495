"""Loads the generator of a row of images."""

from __future__ import annotations

from pathlib import Path

from air_core.diffusion import ImageGenerator
from air_core.specs import FolderImages, GeneratedImages


def load_generator(
    images: GeneratedImages | FolderImages,
    model: Path,
    adapter: Path | None,
    device: str = "cpu",
    thrift: int = 0,
) -> ImageGenerator:
    """Load the generator of a row of images.

    Args:
        images: spec of the images.
        model: a diffusers folder, or a folder of existing images.
        adapter: folder with the LoRA's weights; required if and only if `images` has a LoRA.
        device: of a diffusion model.
        thrift: trades speed for memory, see `pipeline.shared_pipeline`.

    Raises:
        ValueError: the folder or the adapter does not fit `images`.
    """
    wants = isinstance(images, GeneratedImages) and images.lora is not None
    if wants != (adapter is not None):
        need = "need a LoRA" if wants else "have no LoRA"
        raise ValueError(f"the images {need}, but the adapter is {adapter}")
    match images:
        case GeneratedImages():
            from air_core.diffusion.pipeline import PipelineGenerator  # diffusers takes seconds

            return PipelineGenerator(
                model,
                images.settings,
                adapter=adapter,
                scale=images.lora_scale,
                device=device,
                thrift=thrift,
            )
        case FolderImages():
            from air_core.diffusion.folder import FolderGenerator

            return FolderGenerator(model, images.classnames, images.size)

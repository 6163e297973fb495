"""The pixels of an image for a bundle's `model.onnx`, with numpy and Pillow alone.

This module imports nothing of airsweep: a model in MLflow contains a copy of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL.Image import Image, Resampling, new


def image_pixels(image: Image, preprocess: Mapping[str, Any]) -> np.ndarray:
    """Resize, crop or pad, and normalise an image as open_clip does, in the same order.

    Args:
        image: RGB, as `air_core.datasets.images.open_image` returns it.
        preprocess: size (height, width), mean, std, interpolation, resize_mode, fill_color.

    Returns:
        (3, H, W) float32.
    """
    height, width = preprocess["size"]
    bilinear = preprocess["interpolation"] == "bilinear"
    mode, square = preprocess["resize_mode"], height == width
    if mode == "shortest" and not square:
        bilinear = False  # open_clip resizes to such a size with the bicubic filter only
    resized = image.resize(
        _resized(image.size, (width, height), mode),
        Resampling.BILINEAR if bilinear else Resampling.BICUBIC,
    )
    canvas = new("RGB", (width, height), (preprocess["fill_color"],) * 3)
    canvas.paste(resized, (_offset(resized.width, width), _offset(resized.height, height)))
    values = np.asarray(canvas, dtype=np.float32) / np.float32(255)  # (H, W, 3)
    mean, std = (np.asarray(preprocess[name], dtype=np.float32) for name in ("mean", "std"))
    return np.ascontiguousarray(((values - mean) / std).transpose(2, 0, 1))


def _resized(size: tuple[int, int], target: tuple[int, int], mode: str) -> tuple[int, int]:
    """Width and height before cropping or padding."""
    if mode == "squash":
        return target
    if mode == "shortest" and target[0] == target[1]:
        short = min(size)
        # torchvision rounds the longer side down.
        width, height = (
            target[0] if side == short else int(target[0] * side / short) for side in size
        )
        return width, height
    ratios = [side / wanted for side, wanted in zip(size, target, strict=True)]
    ratio = max(ratios) if mode == "longest" else min(ratios)
    return max(1, round(size[0] / ratio)), max(1, round(size[1] / ratio))


def _offset(size: int, target: int) -> int:
    """Where the resized image begins: half of the padding, or minus half of what is cropped."""
    return (target - size) // 2 if size < target else -round((size - target) / 2)

"""Generator over a folder of existing images: `<folder>/<classname>/*.png`, sorted by name.

It needs no model, so it is also useful for tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from air_core.datasets.class_folders import class_files
from air_core.datasets.images import Unreadable, open_image


class FolderGenerator:
    """An ImageGenerator over class folders."""

    def __init__(self, folder: Path, classnames: Sequence[str], size: int) -> None:
        """
        Args:
            folder: see `class_files`.
            classnames: of the dataset.
            size: side of the square to which images are scaled and cropped, in pixels.

        Raises:
            ValueError: class folders are missing.
        """
        self.size = size
        self.files = class_files(folder, classnames)

    def generate(self, classname: str, indices: Sequence[int], attempts: Sequence[int]) -> Tensor:
        """See ImageGenerator. Every attempt gives the same image."""
        files = self.files[classname]
        # The last block can extend beyond the last file.
        return torch.stack(
            [_read(files[i], self.size) if i < len(files) else _black(self.size) for i in indices]
        )


def _read(file: Path, size: int) -> Tensor:
    """Read an image as (size, size, 3) uint8; black if the file is not readable."""
    try:
        image = open_image(file)
    except Unreadable:
        return _black(size)
    square = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(square))


def _black(size: int) -> Tensor:
    return torch.zeros((size, size, 3), dtype=torch.uint8)

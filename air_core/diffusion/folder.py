"""Images that somebody made already: `<folder>/<classname>/*.png`, in the order of their names.

Also a generator without a model, for trying things out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


class FolderGenerator:
    """An ImageGenerator over class folders."""

    def __init__(self, folder: Path, classnames: Sequence[str], size: int) -> None:
        """
        Args:
            folder: holds one folder for each class, named like it; underscores may stand for
                spaces.
            classnames: of the dataset.
            size: side of the square that images are scaled and cropped to, in pixels.

        Raises:
            ValueError: class folders are missing.
        """
        self.folder = folder
        self.size = size
        self.files = {name: _files(folder, name) for name in classnames}
        missing = [name for name, files in self.files.items() if files is None]
        if missing:
            raise ValueError(
                f"{folder} has no folder for {', '.join(map(repr, missing))}; "
                "one folder a class, spaces may be underscores"
            )

    def generate(self, classname: str, indices: Sequence[int], attempts: Sequence[int]) -> Tensor:
        """See ImageGenerator. A file is a file: another attempt gives the same image."""
        files = self.files.get(classname)
        if files is None:
            raise ValueError(f"unknown class {classname!r}; known: {', '.join(self.files)}")
        need = max(indices, default=-1) + 1
        if need > len(files):
            raise ValueError(
                f"class {classname!r} has {len(files)} images in {self.folder}, "
                f"but {need} are needed; add some or ask for fewer"
            )
        images = [_read(files[i], self.size) for i in indices]
        empty = torch.empty((0, self.size, self.size, 3), dtype=torch.uint8)
        return torch.stack(images) if images else empty


def _files(folder: Path, classname: str) -> list[Path] | None:
    for name in (classname, classname.replace(" ", "_")):
        if (folder / name).is_dir():
            files = (folder / name).iterdir()
            return sorted(f for f in files if f.suffix.lower() in SUFFIXES)
    return None


def _read(file: Path, size: int) -> Tensor:
    """(size, size, 3) uint8; black where the file is no readable image."""
    try:
        with Image.open(file) as image:
            square = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError):
        return torch.zeros((size, size, 3), dtype=torch.uint8)
    return torch.from_numpy(np.array(square))

"""Sequences of images that are opened on access, as RGB.

A dataset of 30,000 photographs does not fit in memory, so sequences contain paths or small arrays.
`open_image` is the only function that opens image files, `open_png` the only one for stored PNGs.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, overload

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

BAD_SHARE = 0.01  # largest share of unreadable images in a dataset; more means another problem
WHITE = (255, 255, 255)
# Pillow supports forty more formats. For EPS it starts Ghostscript, whatever the file name.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 178_956_970  # 0.5 GB as RGB; the header of a small file can claim any size
TOO_LARGE = f"it is too large, over {MAX_PIXELS:,} pixels; make it smaller"


class Unreadable(ValueError):
    """A file that cannot be decoded as an image. Errors of the disk are OSErrors instead."""


@dataclass(frozen=True)
class ImageFiles(Sequence["Image"]):
    """Image files as a sequence: an index opens a file as RGB, a slice opens none."""

    files: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.files)

    @overload
    def __getitem__(self, index: int) -> Image: ...
    @overload
    def __getitem__(self, index: slice) -> ImageFiles: ...
    def __getitem__(self, index: int | slice) -> Image | ImageFiles:
        """Raises: Unreadable, if the index is of a file that cannot be decoded."""
        if isinstance(index, slice):
            return ImageFiles(self.files[index])
        return open_image(self.files[index])


@dataclass(frozen=True, eq=False)  # arrays do not compare to a single bool
class GreyImages(Sequence["Image"]):
    """Grey pixels (N, H, W) uint8 as a sequence of RGB images."""

    pixels: np.ndarray

    def __len__(self) -> int:
        return len(self.pixels)

    @overload
    def __getitem__(self, index: int) -> Image: ...
    @overload
    def __getitem__(self, index: slice) -> GreyImages: ...
    def __getitem__(self, index: int | slice) -> Image | GreyImages:
        from PIL import Image

        if isinstance(index, slice):
            return GreyImages(self.pixels[index])
        return Image.fromarray(self.pixels[index]).convert("RGB")


def open_image(file: Path) -> Image:
    """Open an image as upright RGB; 16-bit grey is scaled, transparent pixels are put on white.

    The content determines the format, not the file name. Of an animation or a TIFF with several
    pages only the first image is read.

    Raises:
        Unreadable: its format is not in FORMATS, it exceeds MAX_PIXELS, or cannot be decoded.
        OSError: the file does not exist, or the disk fails.
    """
    if not file.is_file() and file.exists():  # opening a pipe would block
        raise Unreadable(f"{file} cannot be read: it is a folder or a device")
    return _opened(file, FORMATS, str(file))


def open_png(content: bytes) -> Image:
    """Decode a PNG that airsweep has stored, as RGB.

    Raises:
        Unreadable: it is not a PNG, exceeds MAX_PIXELS, or cannot be decoded.
    """
    return _opened(BytesIO(content), ("PNG",), "a stored image")


def _opened(source: Path | BytesIO, formats: tuple[str, ...], name: str) -> Image:
    from PIL import Image, UnidentifiedImageError

    _silence_pillow()
    try:
        with Image.open(source, formats=formats) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(TOO_LARGE)
            image.load()
            return _rgb(_upright(image))
    except UnidentifiedImageError:
        empty = isinstance(source, Path) and source.stat().st_size == 0
        allowed = f"not an image of an allowed format ({', '.join(formats)})"
        why = "it is empty" if empty else f"{allowed}, or its header is damaged"
    except Image.DecompressionBombError:
        why = TOO_LARGE
    except OSError as problem:
        # An error with a number comes from the operating system, so the disk fails, not the image.
        if problem.errno is not None:
            raise
        why = str(problem)
    except MemoryError:
        raise
    except Exception as problem:  # decoders raise any exception on damaged bytes
        why = str(problem) or type(problem).__name__
    raise Unreadable(f"{name} cannot be read: {why}")


@cache
def _silence_pillow() -> None:
    # Pillow warns above half of MAX_PIXELS, which is allowed here. warnings.catch_warnings is not
    # thread-safe, so the filter is global.
    from PIL.Image import DecompressionBombWarning

    warnings.filterwarnings("ignore", category=DecompressionBombWarning, append=True)


def _upright(image: Image) -> Image:
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        # The pixels are valid even if the EXIF data is damaged.
        return image


def _rgb(image: Image) -> Image:
    from PIL import Image

    if image.mode == "I" or image.mode.startswith("I;16"):
        return _scaled(image).convert("RGB")
    if image.mode == "F":
        raise ValueError("pixels are floating-point numbers of unknown range; save 8 or 16 bit")
    if image.has_transparency_data:
        over = image.convert("RGBA")
        white = Image.new("RGBA", over.size, (*WHITE, 255))
        return Image.alpha_composite(white, over).convert("RGB")
    return image.convert("RGB")


def _scaled(image: Image) -> Image:
    # Pillow's conversion clips at 255, which makes nearly every 16-bit image white.
    import numpy as np
    from PIL import Image

    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("pixels are 32-bit numbers of unknown range; save 8 or 16 bit")
    return Image.fromarray((values / 257).round().astype(np.uint8))

"""Images that are opened one at a time, as RGB. Knows no dataset.

A dataset of 30,000 photographs does not fit in memory: what is held here are paths or small arrays.
Every image file is opened by `open_image`, every stored PNG by `open_png`, and by nothing else.
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

BAD_SHARE = 0.01  # of a dataset's images may be unreadable; beyond that something else is wrong
WHITE = (255, 255, 255)
# Pillow knows forty formats more. For EPS it starts Ghostscript, whatever the file is named.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 178_956_970  # 0.5 GB as RGB; a small file can claim any size
TOO_LARGE = f"it is too large, over {MAX_PIXELS:,} pixels; make it smaller"


class Unreadable(ValueError):
    """A file that holds no image which can be decoded. A disk that fails is an OSError instead."""


@dataclass(frozen=True)
class ImageFiles(Sequence["Image"]):
    """Image files as a sequence: an index opens one as RGB, a slice opens none."""

    files: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.files)

    @overload
    def __getitem__(self, index: int) -> Image: ...
    @overload
    def __getitem__(self, index: slice) -> ImageFiles: ...
    def __getitem__(self, index: int | slice) -> Image | ImageFiles:
        """Raises: Unreadable, where one file is asked for that cannot be decoded."""
        if isinstance(index, slice):
            return ImageFiles(self.files[index])
        return open_image(self.files[index])


@dataclass(frozen=True, eq=False)  # arrays have no truth value, so no ==
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
    """One image as RGB, upright: 16-bit grey is scaled, transparency lies over white.

    Its content decides what it is, not its name. Of an animation or a TIFF with several pages only
    the first image is read.

    Raises:
        Unreadable: it is of no format in FORMATS, has more than MAX_PIXELS, or cannot be decoded.
        OSError: the file is not there, or the disk fails.
    """
    if not file.is_file() and file.exists():  # a pipe would be waited for
        raise Unreadable(f"{file} cannot be read: it is no file, but a folder or a device")
    return _opened(file, FORMATS, str(file))


def open_png(content: bytes) -> Image:
    """A PNG that airsweep has stored, as RGB.

    Raises:
        Unreadable: it is no PNG, has more than MAX_PIXELS, or cannot be decoded.
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
        why = "it is empty" if empty else f"{allowed}, or its head is damaged"
    except Image.DecompressionBombError:
        why = TOO_LARGE
    except OSError as problem:
        # With an error number it is the system's: a disk that fails says nothing about the image.
        if problem.errno is not None:
            raise
        why = str(problem)
    except MemoryError:
        raise
    except Exception as problem:  # decoders raise what they like on damaged bytes
        why = str(problem) or type(problem).__name__
    raise Unreadable(f"{name} cannot be read: {why}")


@cache
def _silence_pillow() -> None:
    # Pillow warns from half of MAX_PIXELS on, which is allowed here. A filter of one call would not
    # be safe in threads.
    from PIL.Image import DecompressionBombWarning

    warnings.filterwarnings("ignore", category=DecompressionBombWarning, append=True)


def _upright(image: Image) -> Image:
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        # A damaged note about the camera says nothing about the pixels.
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
    # Pillow's own conversion clips at 255, which turns nearly every 16-bit image white.
    import numpy as np
    from PIL import Image

    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("pixels are 32-bit numbers of unknown range; save 8 or 16 bit")
    return Image.fromarray((values / 257).round().astype(np.uint8))

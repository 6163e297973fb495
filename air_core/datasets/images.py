"""Sequences of images that are opened on access, as RGB.

A dataset of 30,000 photographs does not fit in memory, so sequences contain paths or small arrays.
`open_image` is the only function that opens image files. Served models contain a copy of this
module, so it imports nothing of airsweep. With pillow-heif, the extra `heic`, it reads HEIC.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

BAD_SHARE = 0.01  # largest share of unreadable images in a dataset; more means another problem
WHITE = (255, 255, 255)
READS_HEIC = find_spec("pillow_heif") is not None
# Pillow supports forty more formats. For EPS it starts Ghostscript, whatever the file name.
HEIF = ("HEIF",) if READS_HEIC else ()
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP", *HEIF)
ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}  # the last bytes of a complete file
TAIL = 1 << 16  # bytes at the end of a file among which ENDS are searched; others may follow
ORIENTATION = 0x0112  # tag of EXIF; 1 is upright
MAX_PIXELS = 178_956_970  # 0.5 GB as RGB; the header of a small file can claim any size


class Unreadable(ValueError):
    """A file that cannot be decoded as an image. Errors of the disk are OSErrors instead."""


@dataclass(frozen=True)
class ImageFiles(Sequence["Image"]):
    """Image files as a sequence: an index opens a file as RGB, a slice opens none."""

    files: tuple[Path, ...]

    @cached_property
    def home(self) -> Path:
        """The common folder of the files."""
        return Path(os.path.commonpath([file.parent for file in self.files]))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> Any:
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

    def __getitem__(self, index: Any) -> Any:
        from PIL import Image

        if isinstance(index, slice):
            return GreyImages(self.pixels[index])
        return Image.fromarray(self.pixels[index]).convert("RGB")


def open_image(
    file: Path | BytesIO,
    name: str = "",
    formats: tuple[str, ...] = FORMATS,
    most_pixels: int = MAX_PIXELS,
) -> Image:
    """Open an image as upright RGB; 16-bit grey is scaled, transparent pixels are put on white.

    The content determines the format, not the file name. Of an animation or a TIFF with several
    pages only the first image is read.

    Args:
        name: of the image in messages; by default its path.
        formats: allowed ones, of FORMATS.

    Raises:
        Unreadable: its format is not allowed, it exceeds `most_pixels`, or cannot be decoded.
        OSError: the file does not exist, or the disk fails.
    """
    from PIL import Image, UnidentifiedImageError

    _register_heic()
    name = name or str(file)
    with _decoding(name):
        if isinstance(file, Path) and not file.is_file() and file.exists():
            raise ValueError("it is a folder or a device")  # opening a pipe would block
        try:
            image = Image.open(file, formats=formats)
        except UnidentifiedImageError:
            raise ValueError(_why_unidentified(file, formats)) from None
        with image:
            if image.width * image.height > most_pixels:
                raise ValueError(f"it is too large, over {most_pixels:,} pixels; make it smaller")
            image.load()
            return _rgb(_upright(image))


def rgb_image(image: Image | np.ndarray, name: str) -> Image:
    """Convert an image in memory as `open_image` converts files.

    Args:
        image: a PIL image, or an array (H, W, 3) or (H, W) uint8.
        name: of the image in messages.

    Raises:
        ValueError: it is of another type, or an array of another shape or dtype.
    """
    import numpy as np
    from PIL import Image

    if isinstance(image, np.ndarray):
        shaped = image.ndim == 2 or image.shape[2:] == (3,)
        if not shaped or not image.size or image.dtype != np.uint8:
            raise ValueError(
                f"image {name} is an array {image.shape} of {image.dtype}; allowed: (H, W, 3) or "
                "(H, W) of uint8, with values from 0 to 255"
            )
        return Image.fromarray(image).convert("RGB")
    if not isinstance(image, Image.Image):
        raise ValueError(
            f"image {name} is a {type(image).__name__}; allowed: paths, PIL images and numpy arrays"
        )
    image.load()
    return _rgb(_upright(image))


def too_many_unreadable(name: str, problems: Sequence[str], images: int, share: float) -> str:
    """The error for unreadable images of a dataset; empty if they are few enough.

    Args:
        name: of the dataset.
        problems: why each unreadable image cannot be read.
        images: number of all images.
        share: largest share of them that may be unreadable.
    """
    allowed = int(share * images)
    if len(problems) <= allowed:
        return ""
    return (
        f"{name}: {len(problems):,} of {images:,} images cannot be read, at most {allowed:,} are "
        f"allowed; the first: {problems[0]}; remove or replace them"
    )


def visible_problem(file: Path) -> str:
    """Why an image cannot be read, if its header or end shows it; else empty.

    Takes 0.1 ms, since only an image without its end is decoded. Damage inside remains unnoticed.
    """
    from PIL import Image

    _register_heic()
    with suppress(Exception), Image.open(file, formats=FORMATS) as image, open(file, "rb") as tail:
        tail.seek(max(0, tail.seek(0, os.SEEK_END) - TAIL))
        is_whole = ENDS.get(image.format or "", b"") in tail.read()
        if is_whole and image.width * image.height <= MAX_PIXELS:
            return ""
    try:
        open_image(file)
    except Unreadable as problem:
        return str(problem)
    return ""


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Turns errors of an image, which decoders raise as any exception, into Unreadable."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as problem:
        # An error with a number comes from the operating system, so the disk fails, not the image.
        if isinstance(problem, OSError) and problem.errno is not None:
            raise
        why = str(problem) or type(problem).__name__
        raise Unreadable(f"{name} cannot be read: {why}") from None


def _why_unidentified(file: Path | BytesIO, formats: tuple[str, ...]) -> str:
    if isinstance(file, Path) and file.stat().st_size == 0:
        return "it is empty"
    allowed = ", ".join(f for f in formats if f not in HEIF)
    return f"not an image of an allowed format ({allowed}), or its header is damaged"


@cache
def _register_heic() -> None:
    if READS_HEIC:
        from pillow_heif import register_heif_opener

        register_heif_opener()


def _upright(image: Image) -> Image:
    from PIL import ImageOps

    try:
        if image.getexif().get(ORIENTATION, 1) == 1:
            return image  # exif_transpose would copy it
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

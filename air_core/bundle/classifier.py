"""Classifies images with a bundle, with the same computation as the trial."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from air_core.backbone import Backbone
from air_core.bundle.files import image_files
from air_core.bundle.manifest import Manifest
from air_core.datasets.images import Unreadable, open_image, rgb_image

# N images, C classes, D feature width.

TOP = 3  # classes per image in a result
STEP = 64  # images per batch; larger batches delay the output of large models
MAX_THREADS = 16  # that open images; each can need 0.5 GB for the largest allowed image

Source = Path | Image.Image | np.ndarray


@dataclass(frozen=True)
class ClassifiedImage:
    """The classes of one image."""

    image: str
    top: tuple[tuple[str, float], ...]  # class and probability, best first

    @property
    def classname(self) -> str:
        return self.top[0][0]

    @property
    def probability(self) -> float:
        """Softmax over the bundle's classes; images of other classes can also have high values."""
        return self.top[0][1]

    def json(self) -> dict[str, Any]:
        return {
            "image": self.image,
            "class": self.classname,
            "probability": self.probability,
            "top": [{"class": name, "probability": share} for name, share in self.top],
        }


class Bundle:
    """Classifies with a frozen CLIP and the text features and visual prompt, if any, of a trial."""

    def __init__(self, manifest: Manifest, backbone: Backbone) -> None:
        self.manifest, self.backbone = manifest, backbone
        self.classnames = manifest.classnames
        self._texts = torch.from_numpy(manifest.text_features)  # (C, D)
        prompt = manifest.visual_prompt
        self._prompt = None if prompt is None else torch.from_numpy(prompt).to(backbone.device)

    def classify(
        self, images: Iterable[str | Path | Image.Image | np.ndarray], topk: int = TOP
    ) -> list[ClassifiedImage]:
        """Classify images in this order.

        Args:
            images: files, folders (recursively) and patterns; PIL images; arrays (H, W, 3) or
                (H, W) uint8. An image that is no file has its position, from 0, as `image`: "#3".
            topk: number of classes per image, at most all.

        Raises:
            ValueError: a path does not exist or contains no image, or an array has another shape
                or dtype.
            Unreadable: a file is not an image; `stream` can skip such files.
        """
        sources: dict[Path | str, Source] = {}  # each file once
        for position, image in enumerate(images):
            if isinstance(image, str | Path):
                sources |= {file: file for file in image_files([image])}
            else:
                sources[f"#{position}"] = image
        if not sources:
            raise ValueError("no images given; give paths, PIL images or numpy arrays")
        return list(self._stream([*sources.items()], topk, None))

    def stream(
        self,
        files: Sequence[Path],
        topk: int = TOP,
        unreadable: Callable[[Path, str], None] | None = None,
    ) -> Iterator[ClassifiedImage]:
        """Classify image files in batches and yield the results in order. Memory use is constant.

        Threads, as many as torch uses, open the next batch while the model computes.

        Args:
            topk: number of classes per image, at most all.
            unreadable: called with the path of an unreadable file and the reason, in the order of
                the files. Default: raise Unreadable.
        """
        return self._stream([(file, file) for file in files], topk, unreadable)

    def _stream(
        self,
        sources: Sequence[tuple[Any, Source]],
        topk: int,
        unreadable: Callable[[Any, str], None] | None,
    ) -> Iterator[ClassifiedImage]:
        for batch in self._prepared(sources):
            pixels = [image for _, image in batch if isinstance(image, Tensor)]
            if pixels:
                shares = self.logits(pixels).softmax(dim=-1)
                found = shares.topk(min(topk, len(self.classnames)), dim=-1)
                tops = iter(zip(*map(Tensor.tolist, found), strict=True))
            for name, image in batch:
                if isinstance(image, Tensor):
                    values, classes = next(tops)
                    names = (self.classnames[c] for c in classes)
                    yield ClassifiedImage(str(name), tuple(zip(names, values, strict=True)))
                elif unreadable is None:
                    raise Unreadable(image)
                else:
                    unreadable(name, image)

    def _prepared(
        self, sources: Sequence[tuple[Any, Source]]
    ) -> Iterator[list[tuple[Any, Tensor | str]]]:
        """Batches of names with preprocessed images, or with the reason why one is unreadable.

        While the caller works on a batch, threads prepare the next one.
        """
        step = min(STEP, self.backbone.at_once)
        with ThreadPoolExecutor(min(torch.get_num_threads(), MAX_THREADS)) as pool:

            def start(first: int) -> list[tuple[Any, Future[Tensor | str]]]:
                return [
                    # PIL images are decoded here: decoding one in two threads is not safe.
                    (name, pool.submit(self._pixels, _loaded(name, source)))
                    for name, source in sources[first : first + step]
                ]

            following = start(0)
            try:
                for first in range(0, len(sources), step):
                    batch, following = following, start(first + step)
                    yield [(name, future.result()) for name, future in batch]
            finally:
                pool.shutdown(cancel_futures=True)  # if the caller stops early

    def _pixels(self, source: Path | Image.Image) -> Tensor | str:
        try:
            image = open_image(source) if isinstance(source, Path) else source
        except Unreadable as problem:
            return str(problem)
        except OSError as problem:
            return f"{source} cannot be read: {problem.strerror}"
        pixels: Tensor = self.backbone.preprocess(image)  # (3, H, W)
        return pixels

    def logits(self, images: Sequence[Image.Image | Tensor]) -> Tensor:
        """Logits (N, C) on the CPU, scaled by CLIP's logit_scale.

        Args:
            images: N images, or tensors (3, H, W) from the backbone's `preprocess`.
        """
        if self._prompt is None:
            return self.logits_of(self.backbone.encode_images(images))
        # Half precision, as in the stored image tokens of trials.
        return self.logits_of(self.backbone.image_tokens(images, torch.float16))

    @torch.no_grad()
    def logits_of(self, encoded: Tensor) -> Tensor:
        """Logits (N, C) of features (N, D), or of image tokens (N, T, V) for a visual prompt.

        Raises:
            ValueError: the widths of class vectors or prompt differ from the backbone's.
        """
        if self._prompt is not None:
            parts = torch.split(encoded, self.backbone.at_once)
            features = [self.backbone.encode_tokens(part, self._prompt).cpu() for part in parts]
            encoded = torch.cat(features)
        if encoded.shape[-1] != self._texts.shape[1]:
            raise ValueError(
                f"{self.manifest.folder} is not a bundle of this backbone: its class vectors have "
                f"width {self._texts.shape[1]}, but image features {encoded.shape[-1]}"
            )
        return self.manifest.logit_scale * encoded @ self._texts.T


def check_device(device: str) -> None:
    """Check that torch can use a device.

    Raises:
        ValueError: it cannot.
    """
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as problem:
        first = str(problem).strip().partition("\n")[0]
        raise ValueError(f"device {device!r} cannot be used ({first}); cpu always works") from None


def _loaded(name: Any, source: Source) -> Path | Image.Image:
    return source if isinstance(source, Path) else rgb_image(source, str(name))

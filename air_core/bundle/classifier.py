"""Classifies images with a bundle, with the same computation as the trial."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from air_core.backbone import Backbone
from air_core.bundle.files import image_files
from air_core.bundle.manifest import Manifest
from air_core.datasets.images import Unreadable, open_image

# N images, C classes, D feature width.

TOP = 3  # classes per image in a result
STEP = 64  # images per batch; larger batches delay the output of large models
BLANK_PX = 8


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

    def classify(self, places: Sequence[str | Path], topk: int = TOP) -> list[ClassifiedImage]:
        """Classify the images of files, folders (recursively) and patterns, in this order.

        Raises:
            ValueError: a path does not exist or contains no image.
            Unreadable: a file is not an image; `stream` can skip such files.
        """
        return list(self.stream(image_files(places), topk))

    def stream(
        self,
        files: Sequence[Path],
        topk: int = TOP,
        unreadable: Callable[[Path, str], None] | None = None,
    ) -> Iterator[ClassifiedImage]:
        """Classify image files in batches and yield the results in order. Memory use is constant.

        Args:
            topk: number of classes per image, at most all.
            unreadable: called with the path of an unreadable file and the reason. Default: raise
                Unreadable.
        """
        step = min(STEP, self.backbone.at_once)
        for start in range(0, len(files), step):
            opened = _LazyImages(files[start : start + step])
            shares = self.logits(opened).softmax(dim=-1)
            found = shares.topk(min(topk, len(self.classnames)), dim=-1)
            for file, values, classes in zip(opened.files, *map(Tensor.tolist, found), strict=True):
                if file not in opened.bad:
                    names = (self.classnames[c] for c in classes)
                    yield ClassifiedImage(str(file), tuple(zip(names, values, strict=True)))
                elif unreadable is None:
                    raise Unreadable(opened.bad[file])
                else:
                    unreadable(file, opened.bad[file])

    def logits(self, images: Sequence[Image.Image]) -> Tensor:
        """Logits (N, C) on the CPU, scaled by CLIP's logit_scale."""
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


@dataclass
class _LazyImages(Sequence[Image.Image]):
    """Image files as a sequence that opens them on access, with blanks for unreadable files."""

    files: Sequence[Path]
    bad: dict[Path, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return _LazyImages(self.files[index], self.bad)
        file = self.files[index]
        try:
            return open_image(file)
        except Unreadable as problem:
            self.bad[file] = str(problem)
        except OSError as problem:
            self.bad[file] = f"{file} cannot be read: {problem.strerror}"
        return Image.new("RGB", (BLANK_PX, BLANK_PX))

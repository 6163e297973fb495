"""A bundle at work: images in, classes out. It computes what the trial computed."""

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

TOP = 3  # classes that are told of an image
STEP = 64  # images of a batch; with more, a large model is silent for long
BLANK_PX = 8


@dataclass(frozen=True)
class Classified:
    """What one image was taken for."""

    image: str
    top: tuple[tuple[str, float], ...]  # class and probability, the best first

    @property
    def classname(self) -> str:
        return self.top[0][0]

    @property
    def probability(self) -> float:
        """Softmax over the bundle's classes: an image of none of them gets one all the same."""
        return self.top[0][1]

    def json(self) -> dict[str, Any]:
        return {
            "image": self.image,
            "class": self.classname,
            "probability": self.probability,
            "top": [{"class": name, "probability": share} for name, share in self.top],
        }


class Bundle:
    """A frozen CLIP with the class texts, and maybe the visual prompt, of one trial."""

    def __init__(self, manifest: Manifest, backbone: Backbone) -> None:
        self.manifest, self.backbone = manifest, backbone
        self.classnames = manifest.classnames
        self._texts = torch.from_numpy(manifest.text_features)  # (C, D)
        prompt = manifest.visual_prompt
        self._prompt = None if prompt is None else torch.from_numpy(prompt).to(backbone.device)

    def classify(self, places: Sequence[str | Path], topk: int = TOP) -> list[Classified]:
        """Classes of files, folders (with all below them) and patterns, in this order.

        Raises:
            ValueError: one of them is not there or holds no image.
            Unreadable: a file is no image; `stream` goes on all the same.
        """
        return list(self.stream(image_files(places), topk))

    def stream(
        self,
        files: Sequence[Path],
        topk: int = TOP,
        unreadable: Callable[[Path, str], None] | None = None,
    ) -> Iterator[Classified]:
        """Classes of image files in their order, a batch at a time: memory does not grow.

        Args:
            topk: classes that are told of each image, at most all.
            unreadable: told of a file that cannot be read, and why; None: it is raised.
        """
        step = min(STEP, self.backbone.at_once)
        for start in range(0, len(files), step):
            opened = _Opened(files[start : start + step])
            shares = self.logits(opened).softmax(dim=-1)
            found = shares.topk(min(topk, len(self.classnames)), dim=-1)
            for file, values, classes in zip(opened.files, *map(Tensor.tolist, found), strict=True):
                if file not in opened.bad:
                    names = (self.classnames[c] for c in classes)
                    yield Classified(str(file), tuple(zip(names, values, strict=True)))
                elif unreadable is None:
                    raise Unreadable(opened.bad[file])
                else:
                    unreadable(file, opened.bad[file])

    def logits(self, images: Sequence[Image.Image]) -> Tensor:
        """(N, C) on the CPU, before softmax, at CLIP's temperature."""
        if self._prompt is None:
            return self.logits_of(self.backbone.encode_images(images))
        # As they are stored for trials: in half precision.
        return self.logits_of(self.backbone.image_tokens(images, torch.float16))

    @torch.no_grad()
    def logits_of(self, encoded: Tensor) -> Tensor:
        """(N, C) of features (N, D), or of image tokens (N, T, V) where the prompt is visual.

        Raises:
            ValueError: class vectors or prompt are of other widths than the backbone's.
        """
        if self._prompt is not None:
            parts = torch.split(encoded, self.backbone.at_once)
            features = [self.backbone.encode_tokens(part, self._prompt).cpu() for part in parts]
            encoded = torch.cat(features)
        if encoded.shape[-1] != self._texts.shape[1]:
            raise ValueError(
                f"{self.manifest.folder} is not a bundle of this backbone: its class vectors are "
                f"{self._texts.shape[1]} wide, and image features {encoded.shape[-1]}"
            )
        return self.manifest.logit_scale * encoded @ self._texts.T


def check_device(device: str) -> None:
    """
    Raises:
        ValueError: there is no such device here.
    """
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as problem:
        first = str(problem).strip().partition("\n")[0]
        raise ValueError(f"device {device!r} cannot be used here ({first}); cpu can") from None


@dataclass
class _Opened(Sequence[Image.Image]):
    """Image files as a sequence that opens one at a time; a blank stands for what cannot be."""

    files: Sequence[Path]
    bad: dict[Path, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return _Opened(self.files[index], self.bad)
        file = self.files[index]
        try:
            return open_image(file)
        except (Unreadable, OSError) as problem:
            self.bad[file] = str(problem)
            return Image.new("RGB", (BLANK_PX, BLANK_PX))

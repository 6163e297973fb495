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
from air_core.bundle.arrays import fused_classifier
from air_core.bundle.checks import FUSED
from air_core.bundle.files import image_files
from air_core.bundle.manifest import Manifest
from air_core.classifiers import Classifier
from air_core.datasets.images import Unreadable, open_image
from air_core.types import Batch

# N images, C classes, D feature width.

TOP = 3  # classes per image in a result
STEP = 64  # images per batch; larger batches delay the output of large models
BLANK = Image.new("RGB", (8, 8))


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
        """Over the bundle's classes, so images of other classes can also have high values."""
        return self.top[0][1]

    def json(self) -> dict[str, Any]:
        return {
            "image": self.image,
            "class": self.classname,
            "probability": self.probability,
            "top": [{"class": name, "probability": share} for name, share in self.top],
        }


@dataclass(frozen=True)
class _Text:
    """The text classifier of a bundle, with its visual prompt, if any."""

    backbone: Backbone
    texts: Tensor  # (C, D)
    scale: float
    prompt: Tensor | None

    def logits(self, batch: Batch) -> Tensor:
        features = batch.features
        if self.prompt is not None:
            assert batch.tokens is not None
            parts = torch.split(batch.tokens, self.backbone.at_once)
            encoded = [self.backbone.encode_tokens(part, self.prompt).cpu() for part in parts]
            features = torch.cat(encoded)
        return self.scale * features @ self.texts.T  # (N, C)


class Bundle:
    """The classifiers of a trial and the frozen CLIP that they read images with.

    Attributes:
        classnames: the C classes.
        classifiers: names of the classifiers, of text, auxiliary and fused.
        classifier: the one that `classify` uses.
    """

    def __init__(
        self, manifest: Manifest, backbone: Backbone, classifier: str | None = None
    ) -> None:
        self.manifest, self.backbone = manifest, backbone
        self.classnames, self.classifiers = manifest.classnames, manifest.classifiers
        self.classifier = manifest.selected(classifier)
        texts = torch.from_numpy(manifest.text_features)
        width = backbone.encode_images([BLANK]).shape[1]
        if width != texts.shape[1]:
            raise ValueError(
                f"{manifest.folder} is not a bundle of this backbone: its class vectors have width "
                f"{texts.shape[1]}, but image features {width}"
            )
        prompt = None
        if manifest.visual_prompt is not None:
            prompt = torch.from_numpy(manifest.visual_prompt).to(backbone.device)
        text = _Text(backbone, texts, manifest.logit_scale, prompt)
        self._reads_tokens = prompt is not None
        self._of: dict[str, Classifier] = {"text": text}
        if FUSED in manifest.arrays:
            arrays = {name: torch.from_numpy(a) for name, a in manifest.arrays[FUSED].items()}
            unseen = manifest.content["test"]["unseen"]
            unseen = None if unseen is None else torch.tensor(unseen)
            fused = fused_classifier(arrays, text, manifest.content["space"], unseen)
            self._of = fused.each(text)

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
            shares = self.scores(opened)
            found = shares.topk(min(topk, len(self.classnames)), dim=-1)
            for file, values, classes in zip(opened.files, *map(Tensor.tolist, found), strict=True):
                if file not in opened.bad:
                    names = (self.classnames[c] for c in classes)
                    yield ClassifiedImage(str(file), tuple(zip(names, values, strict=True)))
                elif unreadable is None:
                    raise Unreadable(opened.bad[file])
                else:
                    unreadable(file, opened.bad[file])

    def scores(self, images: Sequence[Image.Image]) -> Tensor:
        """Probabilities (N, C) on the CPU, by the selected classifier."""
        return self.scores_of(self.encode(images), self.classifier)

    def logits(self, images: Sequence[Image.Image]) -> Tensor:
        """Logits (N, C) on the CPU, by the selected classifier, before its temperature."""
        return self.logits_of(self.encode(images), self.classifier)

    def encode(self, images: Sequence[Image.Image]) -> Batch:
        """Images as the classifiers of the bundle read them."""
        if not self._reads_tokens:
            return Batch(self.backbone.encode_images(images))
        # Half precision, as in the stored image tokens of trials.
        tokens = self.backbone.image_tokens(images, torch.float16)
        others = self.classifiers != ("text",)
        features = (
            self.backbone.encode_images(images) if others else tokens.new_zeros(len(tokens), 0)
        )
        return Batch(features, tokens)

    def scores_of(self, batch: Batch, classifier: str) -> Tensor:
        """Probabilities (N, C): logits at the temperature of the classifier."""
        logits = self.logits_of(batch, classifier)
        return (logits / self.manifest.temperature(classifier)).softmax(dim=-1)

    @torch.no_grad()
    def logits_of(self, batch: Batch, classifier: str) -> Tensor:
        """Logits (N, C) of encoded images."""
        return self._of[classifier].logits(batch)


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
        return BLANK

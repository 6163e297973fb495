"""Classifies images with a bundle, with the same computation as the trial."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from air_core.backbone import Backbone
from air_core.backbone.clip import MAX_THREADS
from air_core.bundle.arrays import fused_classifier
from air_core.bundle.checks import FUSED, PROMPT, TEXT
from air_core.bundle.files import UNSURE, image_files
from air_core.bundle.manifest import Manifest
from air_core.classifiers import Classifier
from air_core.datasets.images import Unreadable, open_image, rgb_image
from air_core.prompts import Bundled
from air_core.settings.components import LEARNERS
from air_core.tools.ahead import computed_ahead
from air_core.types import Classes, Encoded

# N images, C classes, D feature width.

TOP = 3  # classes per image in a result
STEP = 64  # images per batch; larger batches delay the output of large models

Source = Path | Image.Image | np.ndarray
Row = dict[str, Any]


@dataclass(frozen=True)
class ClassifiedImage:
    """The classes of one image."""

    image: str
    top: tuple[tuple[str, float], ...]  # class and probability, best first
    is_unsure: bool = False  # the probability is below the bundle's `min_probability`

    @property
    def classname(self) -> str:
        """The best class, or `unsure`."""
        return UNSURE if self.is_unsure else self.top[0][0]

    @property
    def probability(self) -> float:
        """Over the bundle's classes, so images of other classes can also have high values."""
        return self.top[0][1]


@dataclass(frozen=True)
class _Text:
    """The text classifier of a bundle, with its learned prompt, if any."""

    texts: Tensor  # (C, D)
    scale: float
    features: Callable[[Encoded], Tensor] = lambda batch: batch.features

    def logits(self, batch: Encoded) -> Tensor:
        return self.scale * self.features(batch) @ self.texts.T  # (N, C)


class Bundle:
    """The classifiers of a trial and the frozen CLIP that they read images with.

    Attributes:
        classnames: the C classes.
        classifiers: names of the classifiers, of text, auxiliary and fused.
        classifier: the one that `classify` uses.
        min_probability: below it, an image is unsure.
        preprocess: gives the pixels (3, H, W) of an RGB image.
    """

    def __init__(
        self,
        manifest: Manifest,
        backbone: Backbone,
        classifier: str | None = None,
        min_probability: float = 0.0,
    ) -> None:
        self.min_probability = min_probability
        self.manifest, self.backbone = manifest, backbone
        self.classnames, self.classifiers = manifest.classnames, manifest.classifiers
        self.classifier = manifest.selected(classifier)
        self.preprocess: Callable[[Image.Image], Tensor] = backbone.preprocess
        self.at_once = min(STEP, backbone.at_once)
        texts = torch.from_numpy(manifest.arrays[TEXT]["text_features"])
        text = _Text(texts, float(manifest.arrays[TEXT]["logit_scale"]))
        if PROMPT in manifest.arrays:
            learner: type[Bundled] = LEARNERS.load(manifest.content.modality)
            prompt = torch.from_numpy(manifest.arrays[PROMPT]["prompt"]).to(backbone.device)
            text = replace(text, features=partial(learner.features, backbone, prompt))
        self._of: dict[str, Classifier] = {"text": text}
        if FUSED in manifest.arrays:
            arrays = {name: torch.from_numpy(a) for name, a in manifest.arrays[FUSED].items()}
            unseen = manifest.content.unseen
            classes = Classes(len(texts), None if unseen is None else torch.tensor(unseen))
            fused = fused_classifier(arrays, text, manifest.content.space, classes)
            self._of = fused.each(text)

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
            Unreadable: an image cannot be read; `rows` has the reason instead.
        """
        sources: dict[Path | str, Source] = {}  # each file once
        for position, image in enumerate(images):
            if isinstance(image, str | Path):
                sources |= {file: file for file in image_files([image])}
            else:
                sources[f"#{position}"] = image
        if not sources:
            raise ValueError("no images given; give paths, PIL images or numpy arrays")
        results = []
        for result in self._results(sources.items(), topk):
            if isinstance(result, Unreadable):
                raise result
            results.append(result)
        return results

    def columns(self, topk: int) -> list[str]:
        """Names of the values of `rows`."""
        ranks = ["", *(f"_{rank}" for rank in range(2, min(topk, len(self.classnames)) + 1))]
        pairs = [f"{name}{rank}" for rank in ranks for name in ("class", "probability")]
        return ["path", *pairs, *(["guess"] if self.min_probability else []), "error"]

    def rows(self, files: Sequence[Path], topk: int) -> Iterator[Row]:
        """Classify image files in batches and yield a row per file, in order.

        Threads, as many as torch uses, open the next batch while the model computes. Memory use is
        constant.

        Returns:
            `path`; `class` and `probability` of the best class, then `class_2`, `probability_2` and
            so on; with `min_probability` `guess`, the best class where `class` is `unsure`;
            `error`, the reason why a file cannot be read. None where there is no value.
        """
        names = self.columns(topk)
        results = self._results(((file, file) for file in files), topk)
        for file, result in zip(files, results, strict=True):
            values: list[Any] = [None] * (len(names) - 2)
            error = str(result) if isinstance(result, Unreadable) else None
            if isinstance(result, ClassifiedImage):
                values = [value for pair in result.top for value in pair]
                values += [values[0] if result.is_unsure else None] if self.min_probability else []
                values[0] = result.classname  # may be `unsure`
            yield dict(zip(names, [str(file), *values, error], strict=True))

    def _results(
        self, sources: Iterable[tuple[Any, Source]], topk: int
    ) -> Iterator[ClassifiedImage | Unreadable]:
        """While the model computes a batch, threads prepare the next one."""
        threads = min(torch.get_num_threads(), MAX_THREADS)
        # PIL images are decoded here: decoding one in two threads is not safe.
        loaded = (
            (name, source if isinstance(source, Path) else rgb_image(source, str(name)))
            for name, source in sources
        )
        prepared = computed_ahead(
            lambda each: (each[0], self._pixels(each[1])), loaded, threads, ahead=self.at_once
        )
        while batch := [*itertools.islice(prepared, self.at_once)]:
            pixels = [image for _, image in batch if isinstance(image, Tensor)]
            scores = self.scores(pixels) if pixels else torch.empty(0, len(self.classnames))
            found = scores.topk(min(topk, len(self.classnames)), dim=-1)
            tops = zip(*map(Tensor.tolist, found), strict=True)
            for name, image in batch:
                if isinstance(image, Unreadable):
                    yield image
                    continue
                values, classes = next(tops)
                names = (self.classnames[c] for c in classes)
                top = tuple(zip(names, values, strict=True))
                yield ClassifiedImage(str(name), top, values[0] < self.min_probability)

    def _pixels(self, source: Path | Image.Image) -> Tensor | Unreadable:
        try:
            image = open_image(source) if isinstance(source, Path) else source
        except Unreadable as problem:
            return problem
        except OSError as problem:
            return Unreadable(f"{source} cannot be read: {problem.strerror}")
        return self.preprocess(image)

    def scores(self, images: Sequence[Image.Image | Tensor]) -> Tensor:
        """Probabilities (N, C) on the CPU, by the selected classifier.

        Args:
            images: N images, or tensors (3, H, W) from `preprocess`.
        """
        return self.scores_of(self.encode(images), self.classifier)

    def encode(self, images: Sequence[Image.Image | Tensor]) -> Encoded:
        """Images as the classifiers of the bundle read them."""
        if not self.manifest.reads_tokens:
            return Encoded(self.backbone.encode_images(images))
        # Half precision, as in the stored image tokens of trials.
        tokens = self.backbone.image_tokens(images, torch.float16)
        others = self.classifiers != ("text",)
        features = (
            self.backbone.encode_images(images) if others else tokens.new_zeros(len(tokens), 0)
        )
        return Encoded(features, tokens)

    def scores_of(self, batch: Encoded, classifier: str) -> Tensor:
        """Probabilities (N, C): logits at the temperature of the classifier."""
        logits = self.logits_of(batch, classifier)
        return (logits / self.manifest.temperature(classifier)).softmax(dim=-1)

    @torch.no_grad()
    def logits_of(self, batch: Encoded, classifier: str) -> Tensor:
        """Logits (N, C) of encoded images."""
        return self._of[classifier].logits(batch)

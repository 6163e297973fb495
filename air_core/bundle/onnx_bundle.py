"""A bundle that classifies with its `model.onnx`, without the weights of the backbone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from air_core.bundle.classifier import STEP, Bundle
from air_core.bundle.manifest import Manifest
from air_core.bundle.onnx import OnnxModel
from air_core.bundle.preprocessing import image_pixels


class OnnxBundle(Bundle):
    """A bundle with the classifier of its `model.onnx`.

    Args:
        device: cpu, cuda or cuda:N.
        classifier: must be that of the file; None: any.

    Raises:
        ValueError: the bundle has no such file, the file has another classifier or other classes,
            or onnxruntime is missing or does not support the device.
    """

    def __init__(
        self,
        manifest: Manifest,
        device: str,
        classifier: str | None = None,
        min_probability: float = 0.0,
    ) -> None:
        self.min_probability = min_probability
        file = manifest.onnx_file()
        self._model = OnnxModel(file.read_bytes(), file, device)
        if classifier not in (None, self._model.classifier):
            raise ValueError(
                f"{file} contains the {self._model.classifier} classifier; use --runtime torch, or "
                f"export the bundle again with --onnx --classifier {classifier}"
            )
        if self._model.classnames != manifest.classnames:
            raise ValueError(f"{file} has other classes than {manifest.folder}; export it again")
        self.manifest, self.classnames = manifest, manifest.classnames
        self.classifiers, self.classifier = (self._model.classifier,), self._model.classifier
        self.backbone: Any = _Preprocessing(self._model)

    def scores(self, images: Sequence[Image.Image | Tensor]) -> Tensor:
        """Probabilities (N, C) of images, or of tensors (3, H, W) after preprocessing."""
        pixels = [i if isinstance(i, Tensor) else self.backbone.preprocess(i) for i in images]
        return torch.from_numpy(self._model.run(np.stack([each.numpy() for each in pixels])))


class _Preprocessing:
    """The part of a backbone that `Bundle.rows` uses."""

    at_once = STEP

    def __init__(self, model: OnnxModel) -> None:
        self._model = model

    def preprocess(self, image: Image.Image) -> Tensor:  # (3, H, W)
        return torch.from_numpy(image_pixels(image, self._model.preprocess))

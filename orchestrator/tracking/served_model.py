"""Code of the MLflow models that `airsweep export --register` logs: classes of base64 images.

MLflow copies this file and the package `airsweep_model` beside it into the model, so serving needs
mlflow, numpy, onnxruntime, pandas and Pillow, but neither airsweep nor torch. Nothing is pickled.
"""

from __future__ import annotations

import base64
import binascii
import json
from io import BytesIO
from typing import Any

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel

try:
    from airsweep_model.images import Unreadable, open_image
    from airsweep_model.preprocessing import image_pixels
except ModuleNotFoundError:  # the process that saves the model
    from air_core.bundle.preprocessing import image_pixels
    from air_core.datasets.images import Unreadable, open_image

FORMATS = ("JPEG", "PNG")
MOST_PIXELS = 50_000_000


class ServedBundle(PythonModel):  # type: ignore[misc]  # mypy does not read MLflow
    """Answers base64 images with their classes and probabilities, best first."""

    def load_context(self, context: Any) -> None:
        import onnxruntime

        self.session = onnxruntime.InferenceSession(
            context.artifacts["onnx"], providers=["CPUExecutionProvider"]
        )
        metadata = self.session.get_modelmeta().custom_metadata_map
        self.classnames = json.loads(metadata["classnames"])
        self.preprocess = json.loads(metadata["preprocess"])

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """Class, probability and the `topk` best classes of each image.

        Args:
            model_input: a table with the column `image`: JPEG or PNG files in base64.
            params: `topk`, at least 1.

        Raises:
            MlflowException: an image is too large or unreadable. The server answers 400.
        """
        topk, texts = int((params or {}).get("topk", 3)), model_input["image"]
        pixels = np.stack([self._pixels(text, f"image {at}") for at, text in enumerate(texts)])
        [found] = self.session.run(["probabilities"], {"pixels": pixels})  # (N, C)
        return [self._answer(row, topk) for row in found]

    def _pixels(self, text: str, name: str) -> np.ndarray:
        try:
            content = base64.b64decode(text, validate=True)
            image = open_image(BytesIO(content), name, FORMATS, MOST_PIXELS)
        except binascii.Error:
            problem = f"{name} is not base64: encode the bytes of a JPEG or PNG file"
        except Unreadable as error:
            problem = str(error)
        else:
            pixels: np.ndarray = image_pixels(image, self.preprocess)
            return pixels
        raise MlflowException.invalid_parameter_value(problem)

    def _answer(self, row: np.ndarray, topk: int) -> dict[str, Any]:
        best = np.argsort(-row, kind="stable")[:topk]
        top = [{"class": self.classnames[c], "probability": float(row[c])} for c in best]
        return {**top[0], "top": top}


set_model(ServedBundle())

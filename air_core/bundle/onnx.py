"""Writes and runs `model.onnx`: a bundle's image tower and one of its classifiers in one file.

Input `pixels` (N, 3, H, W) float32, output `probabilities` (N, C) float32, for any N. The metadata
of the file are texts: `classnames`, `preprocess` and `lineage` (JSON), `classifier`, `temperature`
and `made_by`.
Computes in single precision, also for a bundle of half precision.

The packages onnx, onnxscript and onnxruntime are the extra `onnx`.
"""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL.Image import Image

from air_core.bundle.content import Preprocessing, checked
from air_core.bundle.preprocessing import image_pixels

if TYPE_CHECKING:
    from air_core.backbone import Backbone
    from air_core.bundle.classifier import Bundle

# N images, C classes.

INSTALL = "pip install onnx onnxruntime onnxscript"
PIXELS, PROBABILITIES = "pixels", "probabilities"
MOST_BYTES = 2_000_000_000  # of one ONNX file: protobuf's limit is 2 GiB
EXAMPLES = 2  # images of the traced batch; 1 would be traced as a constant


def needed(package: str) -> ModuleType:
    """Import a package of the extra `onnx`.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return import_module(package)
    except ModuleNotFoundError as problem:
        raise ValueError(
            f"ONNX needs the package {problem.name}, which is not installed: {INSTALL}"
        ) from None


def check_packages() -> None:
    """Check that the extra `onnx` is installed.

    Raises:
        ValueError: it is not.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        needed(package)


# ---------------------------------------------------------------- export


def onnx_bytes(bundle: Bundle, classifier: str) -> bytes:
    """The content of `model.onnx` for one classifier of a bundle.

    Args:
        classifier: one of `bundle.classifiers`.

    Raises:
        ValueError: a package of the extra is missing, or the image tower exceeds 2 GB.
    """
    check_packages()
    import torch

    single = _in_single_precision(bundle)
    preprocess = _preprocessing(single.backbone)
    module, example = _module(single, classifier), torch.zeros(EXAMPLES, 3, *preprocess["size"])
    with torch.no_grad():
        module(example)  # fills caches whose values torch.export cannot trace
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # warns of what it cannot simplify
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of torch's exporter about itself
        program = torch.onnx.export(
            module,
            (example,),
            input_names=[PIXELS],
            output_names=[PROBABILITIES],
            dynamic_shapes=({0: torch.export.Dim("N")},),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    assert program is not None
    [pixels] = program.model_proto.graph.input
    assert pixels.type.tensor_type.shape.dim[0].dim_param, "the number of images became a constant"
    content = bundle.manifest.content
    metadata = {
        "classnames": json.dumps(list(bundle.classnames)),
        "preprocess": json.dumps(preprocess),
        "classifier": classifier,
        "temperature": str(bundle.manifest.temperature(classifier)),
        "lineage": json.dumps(content.lineage),
        "made_by": content.made_by,
    }
    return _bare(program.model_proto, metadata)


def _in_single_precision(bundle: Bundle) -> Bundle:
    """The same bundle on the CPU in float32; a copy if it is not."""
    import torch

    from air_core.backbone import Backbone
    from air_core.bundle.classifier import Bundle

    found = bundle.backbone
    parameters = list(found.model.visual.parameters())
    size = 4 * sum(parameter.numel() for parameter in parameters)
    if size > MOST_BYTES:
        raise ValueError(
            f"the image tower needs {size / 1e9:.1f} GB in single precision, but one ONNX file "
            "contains at most 2 GB; use the bundle without --onnx, or train with a smaller backbone"
        )
    if {(each.device.type, each.dtype) for each in parameters} == {("cpu", torch.float32)}:
        return bundle
    model = copy.deepcopy(found.model).to("cpu", torch.float32)
    return Bundle(bundle.manifest, Backbone(model, found.preprocess, found.tokenizer))


def _preprocessing(backbone: Backbone) -> dict[str, Any]:
    """The backbone's preprocessing, complete and as JSON has it."""
    found = dict(backbone.model.visual.preprocess_cfg)
    size = found["size"]
    complete = {
        "size": [size, size] if isinstance(size, int) else list(size),
        "mean": list(found["mean"]),
        "std": list(found["std"]),
        # open_clip takes `random` for bicubic outside of training.
        "interpolation": "bilinear" if found["interpolation"] == "bilinear" else "bicubic",
        "resize_mode": found["resize_mode"],
        "fill_color": found["fill_color"],
    }
    return checked(Preprocessing, complete).model_dump()


def _module(bundle: Bundle, classifier: str) -> Any:
    """Module that computes the probabilities (N, C) of pixels (N, 3, H, W)."""
    import torch
    from torch import Tensor, nn

    from air_core.backbone.vision import vision_tower
    from air_core.types import Encoded

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = bundle.backbone.model

        def forward(self, pixels: Tensor) -> Tensor:
            features = self.model.encode_image(pixels, normalize=True)
            if bundle.manifest.visual_prompt is None:
                return bundle.scores_of(Encoded(features), classifier)
            # Rounded as the stored image tokens of trials.
            tokens = vision_tower(self.model.visual).tokens(pixels).to(torch.float16)
            return bundle.scores_of(Encoded(features, tokens), classifier)

    return Classifier().eval()


def _bare(model: Any, metadata: Mapping[str, str]) -> bytes:
    """An ONNX model with these metadata and without those of the exporter.

    The exporter notes the source lines of each node, with paths of this machine.
    """
    graphs = [model.graph, *model.functions]
    for graph in graphs:
        for part in (
            *([graph.input, graph.output, graph.initializer] if graph is model.graph else []),
            graph.node,
            graph.value_info,
        ):
            for each in part:
                del each.metadata_props[:]
                each.doc_string = ""
        del graph.metadata_props[:]
        graph.doc_string = ""
    del model.metadata_props[:]
    needed("onnx").helper.set_model_props(model, dict(metadata))
    return bytes(model.SerializeToString(deterministic=True))


# ---------------------------------------------------------------- runtime


class OnnxModel:
    """Classifies images with the content of a `model.onnx`. Imports no torch.

    Args:
        content: of the file.
        name: of the file, for messages.
        device: cpu, cuda or cuda:N.

    Raises:
        ValueError: onnxruntime is missing or does not support the device, or the content is not a
            model of `onnx_bytes`.
    """

    def __init__(self, content: bytes, name: str | Path, device: str = "cpu") -> None:
        runtime = needed("onnxruntime")
        options = runtime.SessionOptions()
        options.log_severity_level = 3  # errors
        try:
            self._session = runtime.InferenceSession(
                content, options, providers=_providers(device, runtime)
            )
            self._read_metadata()
        except _DeviceError:
            raise
        except Exception as problem:  # onnxruntime's exceptions have no common class
            reason = str(problem).strip().partition("\n")[0]
            raise ValueError(
                f"{name} is not an ONNX model of airsweep ({reason}); export it again with --onnx"
            ) from None

    def _read_metadata(self) -> None:
        metadata = self._session.get_modelmeta().custom_metadata_map
        for name in ("classnames", "classifier", "preprocess"):
            if name not in metadata:
                raise ValueError(f"it has no {name}")
        self.classnames = tuple(json.loads(metadata["classnames"]))
        self.classifier: str = metadata["classifier"]
        self.preprocess = checked(Preprocessing, json.loads(metadata["preprocess"])).model_dump()
        shapes = [each.shape[1:] for each in self._session.get_inputs()]
        if shapes != [[3, *self.preprocess["size"]]]:
            raise ValueError("its input is not pixels (N, 3, height, width)")
        if [each.shape[1:] for each in self._session.get_outputs()] != [[len(self.classnames)]]:
            raise ValueError("its output is not probabilities (N, classes)")

    def probabilities(self, images: Sequence[Image]) -> np.ndarray:
        """(N, C) float32 of RGB images; rows sum to 1."""
        return self.run(np.stack([image_pixels(image, self.preprocess) for image in images]))

    def run(self, pixels: np.ndarray) -> np.ndarray:
        """(N, C) float32 of pixels (N, 3, H, W) float32."""
        [found] = self._session.run([PROBABILITIES], {PIXELS: pixels})
        return np.asarray(found)


class _DeviceError(ValueError):
    """onnxruntime does not support the device."""


def _providers(device: str, runtime: Any) -> list[Any]:
    kind, _, number = device.partition(":")
    wanted = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}.get(kind)
    if wanted not in runtime.get_available_providers():
        more = "; cuda needs the package onnxruntime-gpu" if kind == "cuda" else ""
        raise _DeviceError(
            f"device {device!r} cannot be used by onnxruntime here{more}; cpu always works"
        )
    return [(wanted, {"device_id": int(number or 0)})] if kind == "cuda" else [wanted]

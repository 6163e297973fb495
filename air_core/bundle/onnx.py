"""Writes `model.onnx`, a bundle's image tower and selected classifier in one file, and runs it.

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
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn

from air_core.backbone import Backbone
from air_core.backbone.vision import vision_tower
from air_core.bundle.classifier import STEP, Bundle
from air_core.bundle.manifest import Manifest
from air_core.bundle.preprocessing import image_pixels
from air_core.types import Encoded

# N images, C classes.

INSTALL = "pip install onnx onnxruntime onnxscript"
PIXELS, PROBABILITIES = "pixels", "probabilities"
MOST_BYTES = 2_000_000_000  # of one ONNX file: protobuf's limit is 2 GiB
EXAMPLES = 2  # images of the traced batch; 1 would be traced as a constant


def check_packages(*packages: str) -> None:
    """Import packages of the extra `onnx`.

    Raises:
        ValueError: one is not installed.
    """
    for package in packages:
        try:
            import_module(package)
        except ModuleNotFoundError as problem:
            raise ValueError(
                f"ONNX needs the package {problem.name}, which is not installed: {INSTALL}"
            ) from None


# ---------------------------------------------------------------- export


def onnx_bytes(bundle: Bundle) -> bytes:
    """The content of `model.onnx` for the selected classifier of a bundle.

    Raises:
        ValueError: the image tower exceeds 2 GB.
    """
    module, preprocess = _Module(_in_single_precision(bundle)).eval(), _preprocessing(bundle)
    example = torch.zeros(EXAMPLES, 3, *preprocess["size"])
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
    # The exporter notes the source lines of each node, with paths of this machine.
    import_module("onnx_ir.passes.common").ClearMetadataAndDocStringPass()(program.model)
    content = bundle.manifest.content
    program.model.metadata_props.clear()
    program.model.metadata_props.update(
        classnames=json.dumps(list(bundle.classnames)),
        preprocess=json.dumps(preprocess),
        classifier=bundle.classifier,
        temperature=str(bundle.manifest.temperature(bundle.classifier)),
        lineage=json.dumps(content.lineage),
        made_by=content.made_by,
    )
    return bytes(program.model_proto.SerializeToString(deterministic=True))


def _in_single_precision(bundle: Bundle) -> Bundle:
    """A copy of the bundle on the CPU in float32."""
    found = bundle.backbone
    size = 4 * sum(parameter.numel() for parameter in found.model.visual.parameters())
    if size > MOST_BYTES:
        raise ValueError(
            f"the image tower needs {size / 1e9:.1f} GB in single precision, but one ONNX file "
            "contains at most 2 GB; use the bundle without --onnx, or train with a smaller backbone"
        )
    model = copy.deepcopy(found.model).to("cpu", torch.float32)
    single = Backbone(model, found.preprocess, found.tokenizer)
    return Bundle(bundle.manifest, single, bundle.classifier)


def _preprocessing(bundle: Bundle) -> dict[str, Any]:
    """The backbone's preprocessing, complete and as JSON has it."""
    found = dict(bundle.backbone.model.visual.preprocess_cfg)
    size = found["size"]
    return {
        "size": [size, size] if isinstance(size, int) else list(size),
        "mean": list(found["mean"]),
        "std": list(found["std"]),
        # open_clip takes `random` for bicubic outside of training.
        "interpolation": "bilinear" if found["interpolation"] == "bilinear" else "bicubic",
        "resize_mode": found["resize_mode"],
        "fill_color": found["fill_color"],
    }


class _Module(nn.Module):
    """Computes the probabilities (N, C) of pixels (N, 3, H, W)."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__()
        self.model, self._bundle = bundle.backbone.model, bundle

    def forward(self, pixels: Tensor) -> Tensor:
        batch = Encoded(self.model.encode_image(pixels, normalize=True))
        if self._bundle.manifest.reads_tokens:
            # Rounded as the stored image tokens of trials.
            tokens = vision_tower(self.model.visual).tokens(pixels).to(torch.float16)
            batch = Encoded(batch.features, tokens)
        return self._bundle.scores_of(batch, self._bundle.classifier)


# ---------------------------------------------------------------- runtime


class OnnxBundle(Bundle):
    """A bundle that classifies with its `model.onnx`, without the weights of the backbone.

    Args:
        device: cpu, cuda or cuda:N.
        classifier: must be that of the file; None: any.

    Raises:
        ValueError: the bundle has no such file or it has another classifier, or onnxruntime is
            missing or does not support the device.
    """

    def __init__(
        self,
        manifest: Manifest,
        device: str = "cpu",
        classifier: str | None = None,
        min_probability: float = 0.0,
    ) -> None:
        file, selected = manifest.onnx_file(), manifest.selected()
        if classifier not in (None, selected):
            raise ValueError(
                f"{file} contains the {selected} classifier; use --runtime torch, or export the "
                f"bundle again with --onnx --classifier {classifier}"
            )
        check_packages("onnxruntime")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        self._session = onnxruntime.InferenceSession(
            file.read_bytes(), options, providers=_providers(device)
        )
        preprocess = json.loads(self._session.get_modelmeta().custom_metadata_map["preprocess"])
        self.min_probability, self.at_once = min_probability, STEP
        self.manifest, self.classnames = manifest, manifest.classnames
        self.classifiers, self.classifier = (selected,), selected
        self.preprocess = lambda image: torch.from_numpy(image_pixels(image, preprocess))

    def scores(self, images: Sequence[Image | Tensor]) -> Tensor:
        """Probabilities (N, C) of images, or of tensors (3, H, W) after preprocessing."""
        pixels = [i if isinstance(i, Tensor) else self.preprocess(i) for i in images]
        [found] = self._session.run([PROBABILITIES], {PIXELS: torch.stack(pixels).numpy()})
        return torch.from_numpy(np.asarray(found))


def _providers(device: str) -> list[Any]:
    from onnxruntime import get_available_providers

    kind, _, number = device.partition(":")
    wanted = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}.get(kind)
    if wanted not in get_available_providers():
        raise ValueError(
            f"device {device!r} cannot be used by onnxruntime here; cpu always works, cuda needs "
            "the package onnxruntime-gpu"
        )
    return [(wanted, {"device_id": int(number or 0)})] if kind == "cuda" else [wanted]

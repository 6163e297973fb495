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
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn

from air_core.backbone import Backbone
from air_core.backbone.vision import vision_tower
from air_core.bundle.classifier import STEP, Bundle
from air_core.bundle.content import Preprocessing, checked
from air_core.bundle.manifest import Manifest
from air_core.bundle.preprocessing import image_pixels
from air_core.types import Encoded

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
    needed("onnx_ir.passes.common").ClearMetadataAndDocStringPass()(program.model)
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
    parameters = found.model.visual.parameters()
    size = 4 * sum(parameter.numel() for parameter in parameters)
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
        ValueError: the bundle has no such file or it has another classifier, onnxruntime is missing
            or does not support the device, or the file is not one of `onnx_bytes`.
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
        runtime = needed("onnxruntime")
        providers, options = _providers(device, runtime), runtime.SessionOptions()
        options.log_severity_level = 3  # errors
        try:
            self._session = runtime.InferenceSession(
                file.read_bytes(), options, providers=providers
            )
            metadata = self._session.get_modelmeta().custom_metadata_map
            preprocess = checked(Preprocessing, json.loads(metadata["preprocess"])).model_dump()
            [pixels], [output] = self._session.get_inputs(), self._session.get_outputs()
            shapes = [pixels.shape[1:], output.shape[1:]]
            if shapes != [[3, *preprocess["size"]], [len(manifest.classnames)]]:
                raise ValueError("other shapes than its bundle")
        except Exception as problem:  # onnxruntime's exceptions have no common class
            reason = str(problem).strip().partition("\n")[0]
            raise ValueError(
                f"{file} is not an ONNX model of airsweep ({reason}); export it again with --onnx"
            ) from None
        self.min_probability, self.at_once = min_probability, STEP
        self.manifest, self.classnames = manifest, manifest.classnames
        self.classifiers, self.classifier = (selected,), selected
        self.preprocess = lambda image: torch.from_numpy(image_pixels(image, preprocess))

    def scores(self, images: Sequence[Image | Tensor]) -> Tensor:
        """Probabilities (N, C) of images, or of tensors (3, H, W) after preprocessing."""
        pixels = [i if isinstance(i, Tensor) else self.preprocess(i) for i in images]
        [found] = self._session.run([PROBABILITIES], {PIXELS: torch.stack(pixels).numpy()})
        return torch.from_numpy(np.asarray(found))


def _providers(device: str, runtime: Any) -> list[Any]:
    kind, _, number = device.partition(":")
    wanted = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}.get(kind)
    if wanted not in runtime.get_available_providers():
        more = "; cuda needs the package onnxruntime-gpu" if kind == "cuda" else ""
        raise ValueError(
            f"device {device!r} cannot be used by onnxruntime here{more}; cpu always works"
        )
    return [(wanted, {"device_id": int(number or 0)})] if kind == "cuda" else [wanted]

"""Bundles: exported classifiers of trials, which classify images without a store or a sweep.

    from air_core.bundle import load_bundle
    bundle = load_bundle("bundle")
    results = bundle.classify(["new/*.png"])

`manifest` reads and writes the folder, `content` and `checks` validate it, `files` finds the images
to classify, and `classifier` classifies them. Importing this package is cheap: only `load_bundle`
imports torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from air_core.bundle.files import image_files
from air_core.bundle.manifest import read_bundle

if TYPE_CHECKING:
    from air_core.bundle.classifier import Bundle


def load_bundle(
    folder: str | Path,
    weights: str | None = None,
    device: str = "cpu",
    classifier: str | None = None,
    min_probability: float = 0.0,
    runtime: str = "torch",
) -> Bundle:
    """Load a bundle and the frozen CLIP with which it was trained. Downloads nothing.

    Args:
        folder: written by `airsweep export`.
        weights: name or path of the backbone, as in a sweep file. Default: the published weights
            that the bundle names. Paths in a bundle are never used.
        device: of CLIP, such as cuda.
        classifier: text, auxiliary or fused. Default: the one that was selected at the export.
        min_probability: the class of an image with a smaller probability is `unsure`.
        runtime: torch; or onnx, which uses the bundle's `model.onnx` instead of the backbone.

    Raises:
        ValueError: the folder is not an unchanged bundle, the backbone differs, the bundle names no
            published weights and `weights` is missing, the device does not exist, or the bundle
            does not contain the classifier.
    """
    manifest = read_bundle(folder)
    manifest.selected(classifier)
    if runtime == "onnx":
        from air_core.bundle.onnx import OnnxBundle

        return OnnxBundle(manifest, device, classifier, min_probability)
    if runtime != "torch":
        raise ValueError(f"unknown runtime {runtime!r}; allowed: torch, onnx")
    found = manifest.backbone(weights)  # before torch is imported or a weight is read
    import torch  # seconds

    from air_core.backbone.loading import load_backbone
    from air_core.bundle.classifier import Bundle

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as problem:
        first = str(problem).strip().partition("\n")[0]
        raise ValueError(f"device {device!r} cannot be used ({first}); cpu always works") from None
    backbone = load_backbone(found, device, manifest.content.backbone.precision)
    return Bundle(manifest, backbone, classifier, min_probability)

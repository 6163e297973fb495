"""ONNX files of bundles: equality with torch, preprocessing, metadata."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from air_core.auxiliary import auxiliary_classifier
from air_core.backbone.loading import load_backbone
from air_core.bundle import load_bundle
from air_core.bundle.arrays import fused_arrays
from air_core.bundle.checks import FUSED, PROMPT
from air_core.bundle.classifier import Bundle
from air_core.bundle.manifest import write_bundle
from air_core.bundle.onnx import onnx_bytes
from air_core.bundle.preprocessing import image_pixels
from air_core.classifiers import FusedClassifier, text_classifier
from air_core.datasets import get_dataset
from air_core.settings import AuxiliarySettings, PromptSettings
from air_core.transduction import transductive
from air_core.types import Classes, Encoded, Labelled
from tests.helpers.bundles import shallow_clip, zero_shot

ROUNDING = 1e-4  # of probabilities: half-precision tokens can round to the other neighbour


@pytest.fixture(scope="module")
def digits() -> list[Image.Image]:
    """Not of the size that CLIP reads, so that they are resized and cropped."""
    return [image.resize((50, 40)) for image in get_dataset("digits").load(None).images[:70]]


@pytest.fixture(scope="module")
def shallow(tmp_path_factory) -> str:
    return shallow_clip(tmp_path_factory.mktemp("shallow") / "clip", 1)


def written(folder: Path, about: Any, arrays: Any, backbone: Any, weights: Any = None) -> Bundle:
    """A bundle with `model.onnx`."""
    write_bundle(
        folder, about, arrays, False, onnx=lambda manifest: onnx_bytes(Bundle(manifest, backbone))
    )
    return load_bundle(folder, weights=weights)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, shallow) -> Bundle:
    folder, clip = tmp_path_factory.mktemp("one") / "bundle", load_backbone(shallow)
    return written(folder, *zero_shot(shallow), clip, shallow)


def assert_equal_probabilities(bundle: Bundle, images: list[Image.Image]) -> None:
    """Those of torch, for any number of images."""
    expected = bundle.scores(images).numpy()
    model = load_bundle(bundle.manifest.folder, runtime="onnx")
    assert model.classifier == bundle.classifier
    for count in (1, 2, len(images)):
        found = model.scores(images[:count]).numpy()
        assert np.abs(found - expected[:count]).max() < ROUNDING
    assert (found.argmax(axis=1) == expected.argmax(axis=1)).all()


@pytest.mark.parametrize(("depth", "layers"), [("shallow", 1), ("deep", 2)])
def test_a_visual_prompt_is_part_of_the_file(depth, layers, tmp_path, digits):
    name = shallow_clip(tmp_path / "clip", layers)
    clip = load_backbone(name)
    shape = (3, clip.vision.width)
    shape = (layers, *shape) if depth == "deep" else shape
    prompt = torch.randn(shape, generator=torch.Generator().manual_seed(0)).numpy()
    about, arrays = zero_shot(name)
    about |= {"modality": "visual", "prompt": asdict(PromptSettings(length=3, depth=depth))}
    arrays[PROMPT] = {"prompt": prompt}
    assert_equal_probabilities(written(tmp_path / "b", about, arrays, clip, name), digits)


@pytest.mark.parametrize(
    ("classifier", "kind", "unseen"),
    [("auxiliary", "knn", None), ("fused", "cache", None), ("fused", "mixture", [7, 8, 9])],
)
def test_auxiliary_and_fused_classifiers_are_exported_with_their_temperature(
    classifier, kind, unseen, tmp_path, shallow, digits
):
    """Those of the first digits; `mixture` has no auxiliary classifier."""
    dataset, clip = get_dataset("digits"), load_backbone(shallow)
    examples = dataset.load(None)
    pool = Encoded(clip.encode_images(list(examples.images[:100])))
    labels = torch.from_numpy(examples.labels[:100]).long()
    classes = Classes(10, None if unseen is None else torch.tensor(unseen))
    text, auxiliary = text_classifier(clip, dataset.classnames, dataset.template), None
    if kind == "mixture":
        text = transductive(text, pool, classes)
    else:
        settings, real = AuxiliarySettings(kind=kind), Labelled(pool, labels)
        auxiliary = auxiliary_classifier(settings, None, real, pool, 10, clip.logit_scale)
    fused = FusedClassifier(text, auxiliary, 0.4, "probability", classes)
    about, arrays = zero_shot(shallow)
    about |= {"classifier": classifier, "temperatures": {classifier: 1.7}, "unseen": unseen}
    arrays[FUSED] = {name: array.numpy() for name, array in fused_arrays(fused).items()}
    assert_equal_probabilities(written(tmp_path / "b", about, arrays, clip, shallow), digits)


def test_a_bundle_of_half_precision_is_computed_in_single_precision(tmp_path, shallow, digits):
    backbone = load_backbone(shallow, precision="fp16")  # the stored weights are fp16
    bundle = written(tmp_path / "b", *zero_shot(shallow), backbone, shallow)
    assert_equal_probabilities(bundle, digits)
    assert backbone.dtype == torch.float16


def test_the_metadata_suffice_to_classify_and_have_no_path_of_this_machine(bundle):
    content = bundle.manifest.onnx_file().read_bytes()
    model = onnx.load_from_string(content)
    metadata = {each.key: each.value for each in model.metadata_props}
    assert tuple(json.loads(metadata["classnames"])) == bundle.classnames
    assert json.loads(metadata["preprocess"])["size"] == [32, 32]
    assert json.loads(metadata["lineage"]) == bundle.manifest.content.lineage
    assert metadata["classifier"] == "text"
    for path in (os.getcwd(), str(Path.home()), "site-packages", "air_core"):
        assert path.encode() not in content


# ---------------------------------------------------------------- preprocessing


@pytest.mark.parametrize("size", [(32, 32), (24, 40), (40, 24)])
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pixels_are_exactly_those_of_open_clip(size, mode, interpolation):
    from open_clip.transform import image_transform

    mean, std = [0.48, 0.45, 0.4], [0.26, 0.26, 0.27]
    options = {"resize_mode": mode, "interpolation": interpolation, "fill_color": 7}
    reference = image_transform(size, is_train=False, mean=mean, std=std, **options)
    preprocess = {"size": [*size], "mean": mean, "std": std, **options}
    rng = np.random.default_rng(0)
    for width, height in [(32, 32), (40, 24), *rng.integers(5, 300, (20, 2))]:
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        found = image_pixels(image, preprocess)
        assert (found == reference(image).numpy()).all()


def test_a_missing_device_is_named(bundle):
    with pytest.raises(ValueError, match="device 'tpu' cannot be used by onnxruntime here"):
        load_bundle(bundle.manifest.folder, runtime="onnx", device="tpu")

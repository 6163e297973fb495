"""The frozen CLIP, compared with plain forward passes of open_clip."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from unittest import mock

import numpy as np
import open_clip
import pytest
import torch
from open_clip import timm_model
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import VisionTransformer
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from air_core.backbone import Backbone
from air_core.backbone.clip import tf32_products
from air_core.backbone.loading import load_backbone
from air_core.backbone.vision import vision_tower
from air_core.datasets.images import ImageFiles, open_image
from air_core.tools.ahead import computed_ahead
from benchmarks.harness import random_clip
from benchmarks.method import padded_text_features, whole_tower

NAMES = ["digit zero", "digit seven", "heart", "ankle_boot", "letter q"]
# Largest differences due to rounding, relative to the norm of the tensor.
CLOSE = {torch.float32: 1e-5, torch.float64: 1e-10}


@pytest.fixture(scope="module")
def vit_b_32() -> Backbone:
    """A published architecture with random weights and two layers, which take less memory."""
    torch.manual_seed(0)
    name = "ViT-B-32-quickgelu"
    config = open_clip.get_model_config(name)
    towers = {part: {**config[part], "layers": 2} for part in ("vision_cfg", "text_cfg")}
    return random_clip(name, **towers)


def plain_images(backbone: Backbone, images: list[Image.Image], prompt: Tensor) -> Tensor:
    """Features with CPL's visual prompt, computed by the complete tower."""
    pixels = torch.stack([backbone.preprocess(image) for image in images]).to(prompt)
    return whole_tower(backbone, pixels, prompt)


@pytest.fixture(
    params=[("tiny", torch.float32), ("tiny", torch.float64), ("ViT-B-32", torch.float32)],
    ids=lambda param: f"{param[0]}-{str(param[1])[-7:]}",
)
def clip(request, vit_b_32) -> Any:
    """The tiny model in two precisions, and a published architecture."""
    name, dtype = request.param
    backbone = load_backbone("tiny") if name == "tiny" else vit_b_32
    backbone.model.to(dtype)
    yield Backbone(backbone.model, backbone.preprocess, backbone.tokenizer)
    backbone.model.float()


def test_a_clip_that_nobody_uses_is_freed_at_once(tiny_clip):
    """A process that loads another one would hold both until Python finds the cycle."""
    gc.disable()
    try:
        backbone = load_backbone("tiny")
        backbone.encode_context(torch.zeros(2, 128), tuple(NAMES))
        model = weakref.ref(backbone.model)
        del backbone
        assert model() is None
    finally:
        gc.enable()


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float(((found - expected).norm() / expected.norm()).detach())


def some_images(count: int, side: int = 40) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return [Image.fromarray(image) for image in pixels]


def with_gradient(encode: Any, prompt: Tensor) -> tuple[Tensor, Tensor]:
    """The features, and the gradient of a function of them."""
    prompt = prompt.clone().requires_grad_()
    features = encode(prompt)
    weight = torch.randn(features.shape, generator=torch.Generator().manual_seed(1))
    (features * weight.to(features)).sum().backward()
    return features.detach(), prompt.grad


# ---------------------------------------------------------------- images


def test_threads_change_no_bit_and_lazy_images_may_occur_twice(tiny_clip, tmp_path, monkeypatch):
    for number, image in enumerate(some_images(20)):
        image.save(tmp_path / f"{number:02}.png")
    files = sorted(tmp_path.glob("*.png"))
    monkeypatch.setattr(tiny_clip, "at_once", 8)
    opened = [tiny_clip.preprocess(open_image(file)) for file in files]
    expected = tiny_clip.encode_images(opened)
    for threads in (1, 3):
        monkeypatch.setattr(tiny_clip, "threads", threads)
        assert torch.equal(tiny_clip.encode_images(ImageFiles(tuple(files))), expected)
        lazy = [image for image in map(Image.open, files) for _ in range(2)]
        twice = tiny_clip.encode_images(lazy)
        assert torch.equal(twice, tiny_clip.encode_images([i for i in opened for _ in range(2)]))


def test_threads_keep_the_order_and_compute_no_more_than_allowed_ahead():
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        if item == 30:
            raise ValueError(item)
        return -item

    results = computed_ahead(work, range(100), threads=3, ahead=5)
    for position in range(30):
        assert next(results) == -position
        assert len(begun) <= position + 6
    with pytest.raises(ValueError, match="30"):
        next(results)
    assert len(begun) <= 36


# ---------------------------------------------------------------- texts


def test_text_features_and_gradients_equal_one_padded_sequence_per_class(clip):
    context = 0.02 * torch.randn(16, clip.token_width, dtype=clip.dtype)
    found, slope = with_gradient(lambda c: clip.encode_context(c, NAMES), context)
    expected, plain_slope = with_gradient(lambda c: padded_text_features(clip, c, NAMES), context)
    assert error(found, expected) < CLOSE[clip.dtype]
    assert error(slope, plain_slope) < CLOSE[clip.dtype]


def test_splitting_many_classes_gives_the_same_features(tiny_clip, monkeypatch):
    context = 0.02 * torch.randn(4, tiny_clip.token_width)
    whole = tiny_clip.encode_context(context, NAMES)
    monkeypatch.setattr("air_core.backbone.text.PACK", 2)
    assert error(tiny_clip.encode_context(context, NAMES), whole) < 1e-5


# ---------------------------------------------------------------- images


@pytest.mark.parametrize("depth", ["shallow", "deep"])
def test_image_features_and_gradients_equal_the_complete_tower_with_the_prompt(clip, depth):
    images = some_images(3)
    shape = (
        [4, clip.vision.width] if depth == "shallow" else [clip.vision.layers, 4, clip.vision.width]
    )
    prompt = clip.vision.width**-0.5 * torch.randn(shape, dtype=clip.dtype)
    tokens = clip.image_tokens(images)
    found, slope = with_gradient(lambda p: clip.encode_tokens(tokens, p), prompt)
    expected, plain_slope = with_gradient(lambda p: plain_images(clip, images, p), prompt)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(3, dtype=clip.dtype))
    assert error(found, expected) < CLOSE[clip.dtype]
    assert error(slope, plain_slope) < CLOSE[clip.dtype]


def test_image_tokens_are_cls_and_patches_and_do_not_depend_on_the_batch(tiny_clip, monkeypatch):
    images = some_images(5)
    tokens = tiny_clip.image_tokens(images)
    assert tokens.shape == (
        5,
        1 + (32 // tiny_clip.model.visual.conv1.kernel_size[0]) ** 2,
        tiny_clip.vision.width,
    )
    monkeypatch.setattr(tiny_clip, "at_once", 2)
    assert error(tiny_clip.image_tokens(images), tokens) < 1e-6


def test_a_resnet_has_no_tokens():
    with pytest.raises(ValueError, match=r"need a vision transformer, .* is a ModifiedResNet; set"):
        vision_tower(ModifiedResNet([1, 1, 1, 1], 64, 4))


def test_image_features_have_unit_length_and_equal_open_clip(tiny_clip):
    images = some_images(5)
    features = tiny_clip.encode_images(images)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(5))
    pixels = torch.stack([tiny_clip.preprocess(image) for image in images])
    theirs = normalize(tiny_clip.model.encode_image(pixels), dim=-1)
    torch.testing.assert_close(features, theirs)


def timm(name: str, side: int, pool: str, proj: str = "linear") -> Any:
    """A tower with two layers."""
    shallow = functools.partial(timm_model.timm.create_model, depth=2)
    with mock.patch.object(timm_model.timm, "create_model", shallow):
        return timm_model.TimmModel(name, 64, side, pool=pool, proj=proj)


TOWERS: dict[str, Callable[[], tuple[Any, int]]] = {
    "CLIP": lambda: (VisionTransformer(32, 8, 64, 2, 4, 4.0, output_dim=64), 32),
    "CLIPA": lambda: (
        VisionTransformer(
            32, 8, 64, 2, 4, 4.0, output_dim=64, no_ln_pre=True, pool_type="avg",
            final_ln_after_pool=True,
        ),
        32,
    ),
    "attention pool": lambda: (
        VisionTransformer(32, 8, 64, 2, 4, 4.0, output_dim=64, attentional_pool=True), 32
    ),
    "SigLIP": lambda: (timm("vit_base_patch16_siglip_224", 224, "map", proj="none"), 224),
    "EVA02": lambda: (timm("eva02_tiny_patch14_224", 224, "token"), 224),
    "MobileCLIP-B": lambda: (timm("vit_base_mci_224", 224, "token"), 224),
    "PE": lambda: (timm("vit_pe_core_tiny_patch16_384", 384, "map"), 384),
}  # fmt: skip


@pytest.mark.parametrize("name", TOWERS)
def test_any_vision_transformer_takes_learned_tokens(name):
    torch.manual_seed(0)
    visual, side = TOWERS[name]()
    tower = vision_tower(visual.eval().requires_grad_(False))
    pixels = torch.randn(2, 3, side, side)
    tokens = tower.tokens(pixels)
    plain = visual(pixels)
    none = tower.features(tokens, torch.empty(0, tower.width))
    assert error(none, plain) < 1e-5
    for shape in ((3, tower.width), (tower.layers, 3, tower.width)):
        prompt = torch.randn(shape)
        found, slope = with_gradient(lambda p: tower.features(tokens, p), prompt)
        assert error(found, plain) > 1e-3
        assert slope.abs().amin(dim=-1).max() > 0  # every learned token counts
        # They have no position.
        turned = tower.features(tokens, prompt.flip(-2))
        assert error(turned, found) < 1e-4


@pytest.mark.parametrize(("precision", "close"), [("fp16", 2e-3), ("bf16", 2e-2)])
def test_half_precision_is_close_and_keeps_prompts_and_features_in_float32(
    tiny_clip, precision, close
):
    half = load_backbone("tiny", precision=precision)
    assert half.dtype == {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    images = some_images(3)
    context = torch.nn.Parameter(0.02 * torch.randn(4, half.token_width))
    prompt = torch.nn.Parameter(0.1 * torch.randn(4, half.vision.width))
    found, expected = [], []
    for clip, results in ((half, found), (tiny_clip, expected)):
        learned = (
            clip.encode_context(context, NAMES),
            clip.encode_tokens(clip.image_tokens(images), prompt),
        )
        slopes = torch.autograd.grad(sum(part[:, 0].sum() for part in learned), [context, prompt])
        results += [*learned, clip.encode_images(images), clip.encode_texts(NAMES), *slopes]
    assert {tensor.dtype for tensor in found} == {torch.float32}
    errors = [error(*pair) for pair in zip(found, expected, strict=True)]
    assert max(errors[:4]) < close
    assert max(errors[4:]) < 20 * close  # gradients, through all blocks


def test_tf32_on_a_cpu_is_fp32(tiny_clip):
    other, images = load_backbone("tiny", precision="tf32"), some_images(3)
    assert (other.precision, other.dtype, other.uses_tf32) == ("tf32", torch.float32, False)
    assert torch.equal(other.encode_images(images), tiny_clip.encode_images(images))
    assert torch.equal(other.encode_texts(NAMES), tiny_clip.encode_texts(NAMES))


def test_tf32_is_allowed_within_a_block_only():
    def state():
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    before = state()
    with tf32_products(allowed=False):
        assert state() == before
    with suppress(ValueError), tf32_products():
        assert state() == ("high", True)
        raise ValueError
    assert state() == before


@pytest.mark.gpu
def test_tf32_on_a_gpu_is_close_to_fp32_and_changes_no_other_backbone():
    exact, rounded = (load_backbone("tiny", "cuda", kind) for kind in ("fp32", "tf32"))
    images = some_images(64)
    first, other, again = (clip.encode_images(images) for clip in (exact, rounded, exact))
    assert torch.equal(first, again)
    assert 0 < error(other, first) < 1e-2

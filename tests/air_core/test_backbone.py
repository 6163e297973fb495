"""The frozen CLIP, against open_clip's own forward pass."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from air_core.backbone import load_backbone

NAMES = ["digit zero", "digit seven", "heart", "ankle boot", "letter q"]


def test_text_features_with_the_models_own_words_as_context_equal_plain_encoding(tiny_clip):
    """`a photo of a` as context vectors is the same text, one sequence a class or packed."""
    words = tiny_clip.tokenizer.encode("a photo of a")
    context = tiny_clip.model.token_embedding(torch.tensor(words))
    packed = tiny_clip.encode_context(context, NAMES)
    plain = tiny_clip.encode_texts([f"a photo of a {name}" for name in NAMES])
    torch.testing.assert_close(packed, plain, atol=2e-5, rtol=0)


def test_prompts_in_one_batch_equal_prompts_alone(tiny_clip):
    contexts = 0.02 * torch.randn(3, 16, tiny_clip.token_width)
    together = tiny_clip.encode_context(contexts, NAMES)
    alone = torch.stack([tiny_clip.encode_context(context, NAMES) for context in contexts])
    assert together.shape == (3, len(NAMES), together.shape[-1])
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=0)


def test_many_classes_are_split_without_a_difference(tiny_clip, monkeypatch):
    context = 0.02 * torch.randn(4, tiny_clip.token_width)
    whole = tiny_clip.encode_context(context, NAMES)
    monkeypatch.setattr("air_core.backbone.PACK", 2)
    torch.testing.assert_close(tiny_clip.encode_context(context, NAMES), whole, atol=2e-5, rtol=0)


def test_only_the_context_gets_gradients(tiny_clip):
    context = torch.zeros(16, tiny_clip.token_width, requires_grad=True)
    tiny_clip.encode_context(context, NAMES).sum().backward()
    assert context.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in tiny_clip.model.parameters())


def test_a_name_that_does_not_fit_is_an_error(tiny_clip):
    context = torch.zeros(16, tiny_clip.token_width)
    with pytest.raises(ValueError, match=r"takes .* tokens, but .* are left after a context of 16"):
        tiny_clip.encode_context(context, ["a very long name of a thing that nobody can say"])


def test_image_features_have_unit_length_and_equal_open_clip(tiny_clip):
    from air_core.datasets import get_dataset

    images = get_dataset("digits").load(None).images[:5]
    features = tiny_clip.encode_images(images)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(5))
    pixels = torch.stack([tiny_clip.preprocess(image) for image in images])
    theirs = normalize(tiny_clip.model.encode_image(pixels), dim=-1)
    torch.testing.assert_close(features, theirs)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="open_clip_config"):
        load_backbone(tmp_path)


def test_missing_weights_are_an_error_not_a_random_clip(tmp_path):
    from air_core.backbone import tiny_folder

    text = (tiny_folder() / "open_clip_config.json").read_text()
    (tmp_path / "open_clip_config.json").write_text(text)
    with pytest.raises((RuntimeError, FileNotFoundError, ValueError)):
        load_backbone(tmp_path)

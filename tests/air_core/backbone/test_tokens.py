"""Token counts of class names, which equal those of the text towers."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from open_clip import tokenizer as open_clip
from safetensors.torch import save_file

from air_core.datasets import DATASETS
from air_core.datasets.dataset import TEMPLATE
from air_core.models.tokens import as_read, check_room, count_tokens
from air_core.models.weights import find_backbone, tiny_folder

NAMES = [name for dataset in DATASETS.values() for name in dataset.classnames]
STRANGE = [
    "Größe &amp; ﬁsh", "don't I'LL", "日本語 テキスト", "مرحبا بالعالم", "🦜🏳️‍🌈 parrot", "x" * 300,
    "a_b__c", "1234-567", "\uff41\uff42", "schÃ¶n", "İstanbul", "“quoted”", "&nGt; &bne;",
    "abab!!??", "",
]  # fmt: skip


@pytest.mark.parametrize(
    ("clean", "theirs"),
    [
        ("lower", open_clip._clean_lower),
        ("whitespace", open_clip._clean_whitespace),
        ("canonicalize", open_clip._clean_canonicalize),
    ],
)
def test_names_are_cleaned_as_open_clip_does(clean, theirs):
    for name in [*NAMES, *STRANGE]:
        assert as_read(name, clean) == theirs(name.replace("_", " "))


@pytest.mark.parametrize("folder", [None, tiny_folder()], ids=["CLIP", "tiny"])
def test_tokens_are_counted_as_open_clip_does(folder):
    found = replace(find_backbone("tiny"), tokenizer=folder)
    tokenizer = open_clip.SimpleTokenizer(str(found.merges or open_clip.default_bpe()))
    for name in [*NAMES, *STRANGE]:
        exact = len(tokenizer.encode(name)) + 2
        assert count_tokens(name, found) == exact
        assert exact <= count_tokens(name, found, room=400)  # an upper bound, if that fits


def test_a_name_is_rejected_if_and_only_if_the_text_tower_rejects_it(tiny_clip):
    names = ("zero", "zero one two")
    fits = {}
    for length in range(14, 20):
        try:
            tiny_clip.encode_context(torch.zeros(length, tiny_clip.token_width), names)
            fits[length] = True
        except ValueError:
            fits[length] = False
        match = f"'zero one two' .* prompt.length takes {length};"
        with nullcontext() if fits[length] else pytest.raises(ValueError, match=match):
            check_room("tiny", names, TEMPLATE, length)
    assert set(fits.values()) == {True, False}


def test_a_name_that_is_too_long_for_the_template_is_rejected():
    check_room("tiny", ("zero", " ".join(["one"] * 18)), TEMPLATE, 0)
    match = r"'one one .*\.\.\.' in 'a photo of a {}' takes 25 tokens"
    with pytest.raises(ValueError, match=match):
        check_room("tiny", ("zero", " ".join(["one"] * 19)), TEMPLATE, 0)


@pytest.mark.parametrize(("backbone", "length"), [("tiny", 4), ("ViT-B-32", 16)])
def test_the_class_names_of_published_datasets_fit_and_differ(tmp_path: Path, backbone, length):
    if backbone != "tiny":
        save_file({"one": torch.ones(1)}, tmp_path / "weights.safetensors")  # never read
        backbone = f"{backbone}@{tmp_path / 'weights.safetensors'}"
    for dataset in DATASETS.values():
        check_room(backbone, dataset.classnames, dataset.template, length)

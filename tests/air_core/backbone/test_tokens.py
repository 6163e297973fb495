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

STRANGE = [
    "Größe", "don't I'LL", "日本語 テキスト", "مرحبا بالعالم", "🦜🏳️‍🌈 parrot", "x" * 300,
    "a_b__c", "T-shirt", "1234-567", "abab!!??", "",
]  # fmt: skip
NAMES = [*(name for dataset in DATASETS.values() for name in dataset.classnames), *STRANGE]


@pytest.mark.parametrize("clean", ["lower", "whitespace", "canonicalize"])
def test_names_are_cleaned_as_open_clip_does(clean):
    theirs = open_clip.get_clean_fn(clean)
    assert [as_read(n, clean) for n in NAMES] == [theirs(n.replace("_", " ")) for n in NAMES]


@pytest.mark.parametrize("folder", [None, tiny_folder()], ids=["CLIP", "tiny"])
def test_tokens_are_counted_as_open_clip_does(folder):
    found = replace(find_backbone("tiny"), tokenizer=folder)
    tokenizer = open_clip.SimpleTokenizer(str(found.merges or open_clip.default_bpe()))
    for name in NAMES:
        exact = len(tokenizer.encode(name.replace("_", " "))) + 2
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
    # In the template with start and end: 4 + 18 + 2 tokens of 24.
    check_room("tiny", (" ".join(["one"] * 18),), TEMPLATE, 0)
    with pytest.raises(ValueError, match=r"'one one .*' in 'a photo of a {}' takes 25 tokens"):
        check_room("tiny", (" ".join(["one"] * 19),), TEMPLATE, 0)


@pytest.mark.parametrize(("backbone", "length"), [("tiny", 4), ("ViT-B-32", 16)])
def test_the_class_names_of_published_datasets_fit(tmp_path: Path, backbone, length):
    if backbone != "tiny":
        save_file({"one": torch.ones(1)}, tmp_path / "weights.safetensors")  # never read
        backbone = f"{backbone}@{tmp_path / 'weights.safetensors'}"
    for dataset in DATASETS.values():
        check_room(backbone, dataset.classnames, dataset.template, length)

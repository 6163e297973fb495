"""Checks that class names fit into the context of a text tower. Imports no torch.

open_clip silently truncates texts that are too long, and learned vectors take part of the context.
Class names are therefore checked before any work starts.
"""

from __future__ import annotations

import gzip
import string
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from air_core.models.weights import ClipWeights, find_backbone, open_clip_folder
from air_core.settings.components import BACKBONES

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONTEXT_LENGTH = 77  # CLIP's, the default of a configuration
MOST_LINES = 49152 - 256 - 2 + 1  # of merges, as in open_clip
# CLIP splits texts by this pattern before it merges byte pairs, as open_clip.tokenizer does.
PIECES = r"(?i)'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
SPECIAL = 3  # start, end, and the mark that some tokenizers put before the first word


def as_read(text: str, clean: str = "lower") -> str:
    """A text as a tokenizer of open_clip reads it, with underscores read as spaces.

    open_clip also repairs broken Unicode and HTML, which can change the number of tokens.

    Args:
        clean: `lower` for CLIP, `canonicalize` for SigLIP, `whitespace` for other tokenizers.

    >>> as_read("Big_Cat  and dog"), as_read("T-shirt", "canonicalize")
    ('big cat and dog', 'tshirt')
    """
    text = text.replace("_", " ")
    if clean == "canonicalize":
        text = text.translate(str.maketrans("", "", string.punctuation))
    if clean != "whitespace":
        text = text.lower()
    return " ".join(text.split())


@cache
def check_room(backbone: str, classnames: tuple[str, ...], template: str, length: int) -> None:
    """Check that class names fit into a backbone's text tower.

    Args:
        backbone: its name.
        classnames: of a dataset.
        template: of the dataset, with {} for the class name.
        length: number of learned vectors before a class name; 0 if none are learned.

    Raises:
        ValueError: a name is too long after the learned vectors or in the template, or the backbone
            does not exist.
    """
    if backbone in BACKBONES:  # its own tokenizer reads the names
        return
    found = find_backbone(backbone)
    context = found.model["text_cfg"].get("context_length", CONTEXT_LENGTH)
    for name in classnames:
        for text, taken in ((template.format(name), 0), (name, length)):
            if (count := count_tokens(text, found, context - taken)) > context - taken:
                place = "" if taken else f" in {template!r}"
                rest = f"of which prompt.length takes {taken}" if taken else "and cuts the rest off"
                raise ValueError(
                    f"class name {name!r}{place} takes {count} tokens with start and end, "
                    f"but {backbone} reads {context}, {rest}; shorten the name (a folder of images "
                    "has classnames.txt or classes.txt for it) or "
                    f"{'lower prompt.length' if taken else 'the template'}"
                )


def count_tokens(text: str, found: ClipWeights, room: int = 0) -> int:
    """Number of tokens of a text with start and end, or an upper bound if that fits `room`.

    Raises:
        ValueError: the file of the tokenizer is damaged.
    """
    # A token encodes at least one byte, so most names need no tokenizer.
    if text.isascii() and len(text) + SPECIAL <= room:
        return len(text) + SPECIAL
    tower = found.model["text_cfg"]
    is_simple = not tower.get("hf_tokenizer_name")
    options = {
        "clean": "lower" if is_simple else "whitespace",
        **(tower.get("tokenizer_kwargs") or {}),
    }
    cleaned = as_read(text, options["clean"])
    if is_simple:
        merges = found.merges or open_clip_folder() / "bpe_simple_vocab_16e6.txt.gz"
        return len(_tokenizer(merges).encode(cleaned).ids) + 2
    assert found.tokenizer is not None
    file = found.tokenizer / "tokenizer.json"
    if not file.is_file():  # only transformers reads its format, so the trial checks the names
        return 0
    return len(_tokenizer(file).encode(cleaned).ids)


@cache
def _tokenizer(file: Path) -> Tokenizer:
    """A `tokenizer.json`, or open_clip's SimpleTokenizer with these merges, without special tokens.

    open_clip's module imports torch.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    try:
        if file.suffix == ".json":
            tokenizer = Tokenizer.from_file(str(file))
            tokenizer.no_truncation()
            tokenizer.no_padding()
            return tokenizer
        with gzip.open(file, "rt", encoding="utf-8") as packed:
            lines = packed.read().split("\n")[1:MOST_LINES]
        pairs = [(first, second) for first, second in map(str.split, filter(None, lines))]
        letters = pre_tokenizers.ByteLevel.alphabet()
        pieces = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, pairs)]
        vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
        tokenizer = Tokenizer(models.BPE(vocabulary, pairs, end_of_word_suffix="</w>"))
    except Exception as problem:  # tokenizers raises plain Exceptions
        raise ValueError(f"{file} holds no tokenizer that can be read: {problem}") from problem
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer

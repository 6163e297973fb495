"""Checks that class names fit into the context of a text tower. Imports no torch.

open_clip silently truncates texts that are too long, and learned vectors take part of the context.
Class names are therefore checked before any work starts.
"""

from __future__ import annotations

import gzip
import html
import string
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from air_core.models.weights import MERGES, find_backbone
from air_core.settings.components import BACKBONES

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONTEXT_LENGTH = 77  # CLIP's, the default of a configuration
MOST_MERGES = 1 << 24  # bytes of unpacked merges to read; CLIP's are 3 MB
MOST_LINES = 49152 - 256 - 2 + 1  # as in open_clip
# CLIP splits texts by this pattern before it merges byte pairs, as open_clip.tokenizer does.
PIECES = r"(?i)'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
SPECIAL = 3  # start, end, and the mark that some tokenizers put before the first word


def as_read(name: str, clean: str = "lower") -> str:
    """A class name as a tokenizer of open_clip cleans it, with underscores read as spaces.

    Args:
        clean: `lower` for CLIP, `canonicalize` for SigLIP, `whitespace` for other tokenizers.

    >>> as_read("Big_Cat  &amp; dog"), as_read("T-shirt", "canonicalize")
    ('big cat & dog', 'tshirt')
    """
    return _cleaned(name.replace("_", " "), clean)


@lru_cache(maxsize=1 << 16)
def _cleaned(text: str, clean: str) -> str:
    if not (
        text.isascii() and text.isprintable() and "&" not in text
    ):  # otherwise ftfy changes nothing
        import ftfy  # imports in 50 ms

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    if clean == "canonicalize":
        text = text.replace("_", " ").translate(str.maketrans("", "", string.punctuation))
    if clean != "whitespace":
        text = text.lower()
    return " ".join(text.split())


@cache
def check_room(backbone: str, classnames: tuple[str, ...], template: str, length: int) -> None:
    """Check that class names fit into a backbone's text tower and differ after tokenization.

    Args:
        backbone: its name.
        classnames: of a dataset.
        template: of the dataset, with {} for the class name.
        length: number of learned vectors before a class name; 0 if none are learned.

    Raises:
        ValueError: a name is too long after the learned vectors or in the template, or two names
            are the same, or the backbone does not exist.
    """
    if backbone in BACKBONES:  # its own tokenizer reads the names
        return
    found = find_backbone(backbone)
    text, folder = found.model["text_cfg"], found.tokenizer
    context = text.get("context_length", CONTEXT_LENGTH)
    hugging_face = bool(text.get("hf_tokenizer_name"))
    options = text.get("tokenizer_kwargs") or {}
    clean = options.get("clean", "whitespace" if hugging_face else "lower")
    known: dict[str, str] = {}
    for name in classnames:
        other = known.setdefault(as_read(name, clean), name)
        if other != name:
            raise ValueError(
                f"class names {other!r} and {name!r} are the same to {backbone}, which reads "
                f"{as_read(name, clean)!r}; rename one"
            )
        words = name.replace("_", " ")
        room = context - length
        alone = _count(words, room, clean, hugging_face, folder) if length else 0
        if alone > room:
            raise ValueError(
                f"class name {_shown(name)} takes {alone} tokens with start and end, but "
                f"{backbone} reads {context}, of which prompt.length takes {length}; shorten the "
                "name (a folder of images has classnames.txt or classes.txt for it) or lower "
                "prompt.length"
            )
        whole = _count(template.format(words), context, clean, hugging_face, folder)
        if whole > context:
            raise ValueError(
                f"class name {_shown(name)} in {template!r} takes {whole} tokens with start "
                f"and end, but {backbone} reads {context} and cuts the rest off; shorten the name "
                "(a folder of images has classnames.txt or classes.txt for it) or the template"
            )


def _shown(name: str) -> str:
    return repr(name if len(name) <= 60 else f"{name[:57]}...")


def _count(text: str, room: int, clean: str, hugging_face: bool, folder: Path | None) -> int:
    """Number of tokens of a text with start and end, or an upper bound if that fits `room`."""
    # A token encodes at least one byte, so most names need no tokenizer.
    if text.isascii() and len(text) + SPECIAL <= room:
        return len(text) + SPECIAL
    if hugging_face:
        assert folder is not None
        file = folder / "tokenizer.json"
        if not file.is_file():  # only transformers reads this format, so the trial checks the names
            return 0
        return len(_of_hugging_face(file).encode(_cleaned(text, clean)).ids)
    own = folder / MERGES if folder is not None else None
    tokenizer = _of_clip(own if own is not None and own.is_file() else _clip_merges())
    return len(tokenizer.encode(_cleaned(text, clean)).ids) + 2


def _clip_merges() -> Path:
    spec = find_spec("open_clip")  # locates the package without importing it
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).with_name("bpe_simple_vocab_16e6.txt.gz")


@cache
def _of_clip(merges: Path) -> Tokenizer:
    """open_clip's SimpleTokenizer without the special tokens. open_clip's module imports torch."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    letters = pre_tokenizers.ByteLevel.alphabet()
    try:
        with gzip.open(merges, "rb") as packed:
            lines = packed.read(MOST_MERGES).decode("utf-8").split("\n")[1:MOST_LINES]
        pairs = [(first, second) for first, second in map(str.split, filter(None, lines))]
        pieces = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, pairs)]
        vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
        tokenizer = Tokenizer(models.BPE(vocabulary, pairs, end_of_word_suffix="</w>"))
    except Exception as problem:  # tokenizers raises plain Exceptions
        raise ValueError(f"{merges} holds no byte-pair merges: {problem}") from problem
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


@cache
def _of_hugging_face(file: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as problem:  # tokenizers raises plain Exceptions
        raise ValueError(f"{file} holds no tokenizer that can be read: {problem}") from problem
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer

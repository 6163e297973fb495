"""How a text tower reads class names: cleaned, in tokens, within its context. Imports no torch.

open_clip cuts a text that is too long without a word, and learned vectors leave less room still.
Here names are counted before anything is drawn.
"""

from __future__ import annotations

import gzip
import html
import string
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from air_core.weights import ClipFolder, find_backbone

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONTEXT_LENGTH = 77  # of a text tower that does not say: CLIP's
MERGES = "merges.txt.gz"  # of a folder with byte-pair merges of its own
MOST_MERGES = 1 << 24  # bytes of unpacked merges that are read; CLIP's are 3 MB
MOST_LINES = 49152 - 256 - 2 + 1  # open_clip reads as many
# The pieces that CLIP's byte-pair merges start from; open_clip.tokenizer has the same.
PIECES = r"(?i)'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
SPECIAL = 3  # start, end, and a mark that some tokenizers put before the first word


def as_read(name: str, clean: str = "lower") -> str:
    """A class name as a tokenizer of open_clip cleans it, with underscores read as spaces.

    Args:
        clean: `lower` of CLIP, `canonicalize` of SigLIP, `whitespace` of other tokenizers.

    >>> as_read("Big_Cat  &amp; dog"), as_read("T-shirt", "canonicalize")
    ('big cat & dog', 'tshirt')
    """
    return _cleaned(name.replace("_", " "), clean)


@lru_cache(maxsize=1 << 16)
def _cleaned(text: str, clean: str) -> str:
    if not (text.isascii() and text.isprintable() and "&" not in text):  # else it stays as it is
        import ftfy  # a twentieth of a second

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    if clean == "canonicalize":
        text = text.replace("_", " ").translate(str.maketrans("", "", string.punctuation))
    if clean != "whitespace":
        text = text.lower()
    return " ".join(text.split())


@cache
def check_room(backbone: str, classnames: tuple[str, ...], template: str, length: int) -> None:
    """Every class name fits into the text tower of a backbone, and no two are the same to it.

    Args:
        backbone: its name.
        classnames: of a dataset.
        template: of the dataset, with the place for a class name.
        length: learned vectors before a class name; 0: none are learned.

    Raises:
        ValueError: a name is too long behind the learned vectors or in the template, or is the
            same as another one; says which, and what to do. Or there is no such backbone.
    """
    text, folder = _text_tower(backbone)
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
                "name (a folder of images has classnames.txt for it) or lower prompt.length"
            )
        whole = _count(template.format(words), context, clean, hugging_face, folder)
        if whole > context:
            raise ValueError(
                f"class name {_shown(name)} in {template!r} takes {whole} tokens with start "
                f"and end, but {backbone} reads {context} and cuts the rest off; shorten the name "
                "(a folder of images has classnames.txt for it) or the template"
            )


def _shown(name: str) -> str:
    return repr(name if len(name) <= 60 else f"{name[:57]}...")


def _count(text: str, room: int, clean: str, hugging_face: bool, folder: Path | None) -> int:
    """Tokens of a text with start and end; an upper bound of them where that is within `room`."""
    # A token stands for a byte at least, so that most names need no tokenizer.
    if text.isascii() and len(text) + SPECIAL <= room:
        return len(text) + SPECIAL
    if hugging_face:
        assert folder is not None
        file = folder / "tokenizer.json"
        if not file.is_file():  # a form that transformers alone reads: the trial will count
            return 0
        return len(_of_hugging_face(file).encode(_cleaned(text, clean)).ids)
    own = folder / MERGES if folder is not None else None
    tokenizer = _of_clip(own if own is not None and own.is_file() else _clip_merges())
    return len(tokenizer.encode(_cleaned(text, clean)).ids) + 2


def _text_tower(backbone: str) -> tuple[dict[str, Any], Path | None]:
    """Its configuration, and the folder of its tokenizer."""
    found = find_backbone(backbone)
    if isinstance(found, ClipFolder):
        return found.model["text_cfg"], found.path
    folder = found.tokenizer[0].parent if found.tokenizer else None
    return found.model["text_cfg"], folder


def _clip_merges() -> Path:
    spec = find_spec("open_clip")  # where it lies, without importing it
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).with_name("bpe_simple_vocab_16e6.txt.gz")


@cache
def _of_clip(merges: Path) -> Tokenizer:
    """open_clip's SimpleTokenizer without its two special tokens: its own module imports torch."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    letters = pre_tokenizers.ByteLevel.alphabet()
    try:
        with gzip.open(merges, "rb") as packed:
            lines = packed.read(MOST_MERGES).decode("utf-8").split("\n")[1:MOST_LINES]
        pairs = [(first, second) for first, second in map(str.split, filter(None, lines))]
        pieces = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, pairs)]
        vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
        tokenizer = Tokenizer(models.BPE(vocabulary, pairs, end_of_word_suffix="</w>"))
    except Exception as problem:  # tokenizers raises nothing more special
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
    except Exception as problem:  # it raises nothing more special
        raise ValueError(f"{file} holds no tokenizer that can be read: {problem}") from problem
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer

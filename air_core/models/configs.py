"""Checks configuration files of model folders before a library reads them. Imports no torch.

In open_clip, transformers and diffusers some settings import Python files of the folder, load
another model, or access the network. Therefore only settings that are listed here are allowed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

LIBRARIES = ("diffusers", "transformers")  # of a pipeline's parts; other libraries are not trusted
UNREAD = "safety_checker"  # part of a pipeline that is never loaded
PLAIN_ATTENTION = (None, "eager", "sdpa")  # transformers downloads compiled code for others
TOKENIZER_CONFIGS = ("tokenizer_config.json", "config.json")


@dataclass(frozen=True)
class Kind:
    """The allowed values of a setting."""

    words: str
    fits: Callable[[Any], bool]

    def or_null(self) -> Kind:
        return Kind(f"{self.words}, or null", lambda value: value is None or self.fits(value))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def _is_list(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(fits, value))


def _choice(*words: str) -> Kind:
    return Kind(f"one of {', '.join(words)}", lambda value: value in words)


FLAG = Kind("true or false", lambda value: isinstance(value, bool))
WORD = Kind("a string", lambda value: isinstance(value, str))
WHOLE = Kind("a whole number", _is_whole)
WHOLES = Kind(
    "a whole number or a list of them", lambda value: _is_whole(value) or _is_list(value, _is_whole)
)
NUMBER = Kind("a number", _is_number)
CHANNELS = Kind(
    "a number or a list of 3 numbers",
    lambda value: _is_number(value) or (_is_list(value, _is_number) and len(value) == 3),
)
TIMM_NAME = Kind(
    "the plain name of an architecture of timm (no colon, no slash), since nothing is downloaded",
    lambda value: isinstance(value, str) and bool(re.fullmatch(r"[\w.-]*", value)),
)

Table = Mapping[str, "Kind | Table"]

BLOCKS: Table = {  # of both towers
    "layers": WHOLES,
    "width": WHOLE,
    "mlp_ratio": NUMBER,
    "ls_init_value": NUMBER.or_null(),
    "pool_type": WORD,
    "final_ln_after_pool": FLAG,
    "output_tokens": FLAG,
    "act_kwargs": {"approximate": _choice("none", "tanh")},
    "norm_kwargs": {"eps": NUMBER, "elementwise_affine": FLAG, "bias": FLAG},
    "block_type": WORD.or_null(),
    "qk_norm": FLAG,
    "scaled_cosine_attn": FLAG,
    "scale_heads": FLAG,
    "scale_attn_inner": FLAG,
    "scale_attn": FLAG,
    "scale_fc": FLAG,
}
VISION: Table = {
    **BLOCKS,
    "head_width": WHOLE,
    "patch_size": WHOLES.or_null(),
    "image_size": WHOLES,
    "patch_dropout": NUMBER,
    "attentional_pool": Kind("true, false or a string", lambda v: isinstance(v, bool | str)),
    "attn_pooler_queries": WHOLE,
    "attn_pooler_heads": WHOLE,
    "no_ln_pre": FLAG,
    "pos_embed_type": WORD,
    "timm_model_name": TIMM_NAME.or_null(),
    "timm_model_pretrained": FLAG,
    "timm_pool": WORD,
    "timm_proj": WORD.or_null(),
    "timm_proj_bias": FLAG,
    "timm_drop": NUMBER,
    "timm_drop_path": NUMBER.or_null(),
}
TOKENIZER: Table = {
    "clean": _choice("canonicalize", "lower", "whitespace"),
    "strip_sep_token": FLAG,
    "language": WORD.or_null(),
}
TEXT: Table = {
    **BLOCKS,
    "context_length": WHOLE,
    "vocab_size": WHOLE,
    "hf_tokenizer_name": WORD.or_null(),  # the folder contains such a tokenizer
    "tokenizer_mode": Kind("clips or null", lambda value: value in (None, "", "clips")),
    "tokenizer_kwargs": TOKENIZER,
    "heads": WHOLE,
    "embed_cls": FLAG,
    "pad_id": WHOLE,
    "eos_id": WHOLE,
    "no_causal_mask": FLAG,
    "proj_bias": FLAG,
    "proj_type": WORD.or_null(),
}
CLIP: Table = {
    "model_cfg": {
        "embed_dim": WHOLE,
        "vision_cfg": VISION,
        "text_cfg": TEXT,
        "custom_text": FLAG,
        "quick_gelu": FLAG,
        "init_logit_scale": NUMBER,
        "init_logit_bias": NUMBER.or_null(),
        "nonscalar_logit_scale": FLAG,
        "output_dict": FLAG,
    },
    "preprocess_cfg": {
        "size": WHOLES.or_null(),
        "mode": _choice("RGB").or_null(),
        "mean": CHANNELS.or_null(),
        "std": CHANNELS.or_null(),
        "interpolation": _choice("bicubic", "bilinear", "random").or_null(),
        "resize_mode": _choice("shortest", "longest", "squash").or_null(),
        "fill_color": WHOLE.or_null(),
    },
}


def json_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: the file cannot be read, is not JSON, or contains no object.
    """
    if not file.is_file():  # reading a pipe would block
        raise ValueError(f"{file} is a broken link, a folder or a device, not a file")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        raise ValueError(
            f"{file} cannot be read: {problem}; correct, download or copy it again"
        ) from problem
    if not isinstance(found, dict):
        raise ValueError(f"{file} contains a {type(found).__name__} instead of a JSON object")
    return found


# ---------------------------------------------------------------- open_clip


def check_clip_config(file: Path, config: Mapping[str, Any]) -> None:
    """Check that an open_clip configuration contains only settings of CLIP and SigLIP.

    Args:
        file: of the configuration, for the message.
        config: with `model_cfg`, optionally with `preprocess_cfg`.

    Raises:
        ValueError: an unknown key, or a value of another type.
    """
    _check_table(file, "", config, CLIP)
    text = config["model_cfg"]["text_cfg"]
    alone = (text.get("tokenizer_kwargs") or {}).keys() - {"clean"}
    if alone and not text.get("hf_tokenizer_name"):
        raise ValueError(
            f"{file}: model_cfg.text_cfg.tokenizer_kwargs has {', '.join(sorted(alone))}, which "
            "CLIP's tokenizer does not support; allowed: clean, or all with hf_tokenizer_name"
        )


def _check_table(file: Path, where: str, found: Mapping[str, Any], table: Table) -> None:
    for key, value in found.items():
        place, kind = f"{where}{key}", table.get(key)
        if kind is None:
            raise ValueError(
                f"{file}: the setting {where}{key[:99]} is not allowed in a model folder; "
                f"allowed: {', '.join(table)}"
            )
        if isinstance(kind, Kind):
            if not kind.fits(value):
                raise ValueError(f"{file}: {place} is {shortened(value)}; allowed: {kind.words}")
        elif isinstance(value, dict):
            _check_table(file, f"{place}.", value, kind)
        elif value is not None:
            raise ValueError(f"{file}: {place} is {shortened(value)}; allowed: an object or null")


def check_tokenizer_config(folder: Path) -> None:
    """Check that the configuration of a Hugging Face tokenizer names a tokenizer class.

    transformers accepts the name of any of its classes, and some of these load other models and
    run code from the folder.

    Raises:
        ValueError: a file names another class, or cannot be read.
    """
    for file in (folder / name for name in TOKENIZER_CONFIGS):
        if not file.is_file():
            continue
        config = json_object(file)
        kind = config.get("tokenizer_class")
        plain = kind is None or (
            isinstance(kind, str)
            and re.fullmatch(r"(?!Auto|Rag)\w+(Tokenizer|TokenizerFast|Backend)", kind)
        )
        if not plain or config.get("model_type") == "rag":
            raise ValueError(
                f"{file}: {shortened(kind or 'rag')} is not a tokenizer class; allowed: a "
                "tokenizer of transformers such as T5Tokenizer"
            )


# ---------------------------------------------------------------- diffusers


def pipeline_index(file: Path) -> dict[str, Any]:
    """Read the `model_index.json` of a diffusers folder and check the classes that it names.

    Raises:
        ValueError: it cannot be read, or names code of the folder or of another package.
    """
    index = json_object(file)
    kind = index.get("_class_name")
    if not _is_name(kind):
        raise ValueError(
            f"{file}: _class_name is {shortened(kind)}; allowed: the name of a pipeline of "
            "diffusers, since anything else is code that comes with the weights"
        )
    for part, value in index.items():
        if part.startswith("_") or not isinstance(value, list) or _is_list(value, _is_number):
            continue
        named = len(value) == 2 and (value == [None, None] or all(map(_is_name, value)))
        if not part.isidentifier() or not named:
            raise ValueError(
                f"{file}: {shortened(part)} is {shortened(value)}; allowed: a library and a class, "
                "or two nulls"
            )
        if value[0] not in (None, *LIBRARIES) and part != UNREAD:
            raise ValueError(
                f"{file}: its {part} is of {value[0]}; allowed: {' and '.join(LIBRARIES)}, since "
                "anything else is code that comes with the weights"
            )
    return index


def pipeline_parts(index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The parts of a pipeline that are loaded, each with its library and class.

    >>> pipeline_parts({"_class_name": "P", "vae": ["diffusers", "V"], "unet": [None, None]})
    {'vae': ('diffusers', 'V')}
    """
    return {
        part: (value[0], value[1])
        for part, value in index.items()
        if not part.startswith("_")
        and part != UNREAD
        and isinstance(value, list)
        and value
        and isinstance(value[0], str)
    }


def check_part_configs(folder: Path) -> None:
    """Check that the configuration of a pipeline's part names no code and no other model.

    Raises:
        ValueError: a file does, or cannot be read.
    """
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder / 'adapter_config.json'} names another model that is loaded with this part; "
            "save the folder again with the adapter merged into the weights"
        )
    for file in sorted(folder.glob("*config.json")):
        _check_no_code(file, json_object(file))


def _check_no_code(file: Path, found: Any) -> None:
    if isinstance(found, list):
        for each in found:
            _check_no_code(file, each)
    if not isinstance(found, dict):
        return
    if found.get("auto_map"):
        raise ValueError(
            f"{file} has auto_map, which names code that comes with the weights; allowed: models "
            f"of {' and '.join(LIBRARIES)}"
        )
    for key in ("attn_implementation", "_attn_implementation"):
        if found.get(key) not in PLAIN_ATTENTION:
            raise ValueError(
                f"{file}: {key} is {shortened(found[key])}; allowed: eager, sdpa or null, since "
                "others are downloaded as compiled code"
            )
    for each in found.values():
        _check_no_code(file, each)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value.isidentifier()

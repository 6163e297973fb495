"""Checks configuration files of model folders before a library reads them. Imports no torch.

In open_clip, transformers and diffusers some settings import Python files of the folder, load
another model, or access the network. All of them are paths, names with a source, or code, so a rule
by the kind of values refuses them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, NamedTuple

PIPELINE_CONFIG = "model_index.json"
LIBRARIES = ("diffusers", "transformers")  # of a pipeline's parts; other libraries are not trusted
UNREAD = "safety_checker"  # part of a pipeline that is never loaded
TOKENIZERS = r"(?!Auto|Rag)\w*(Tokenizer|TokenizerFast|Backend)"  # classes of one model
TOKENIZER = ("clean", "strip_sep_token", "language")  # the constructor also accepts paths


def json_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: the file cannot be read, is not JSON, or contains no object.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise ValueError(
            f"{file} cannot be read: {problem}; correct, download or copy it again"
        ) from problem
    if not isinstance(found, dict):
        raise ValueError(f"{file} contains a {type(found).__name__} instead of a JSON object")
    return found


def _settings(found: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Keys and values at any depth; those in a list have its key."""
    yield key, found
    if isinstance(found, dict):
        for name, value in found.items():
            yield from _settings(value, name)
    elif isinstance(found, list):
        for value in found:
            yield from _settings(value, key)


# ---------------------------------------------------------------- open_clip


def check_clip_config(file: Path, config: Mapping[str, Any]) -> None:
    """Check that an open_clip configuration names no file, module or other model.

    Args:
        file: of the configuration, for the message.
        config: with `model_cfg`, optionally with `preprocess_cfg`.

    Raises:
        ValueError: a value that could, or an option of the tokenizer that is not supported.
    """
    for key, value in _settings(config):
        if key == "hf_tokenizer_name":  # is not read: the folder contains the tokenizer
            continue
        if isinstance(value, str) and not re.fullmatch(r"[\w.-]*", value):
            raise ValueError(
                f"{file}: {key} is {shortened(value)}; allowed in a model folder: numbers, true, "
                "false, null, and words without : and /"
            )
    options = config["model_cfg"]["text_cfg"].get("tokenizer_kwargs") or {}
    if not {*options} <= {*TOKENIZER}:
        raise ValueError(
            f"{file}: model_cfg.text_cfg.tokenizer_kwargs is {shortened(options)}; allowed: "
            f"{', '.join(TOKENIZER)}"
        )


# ---------------------------------------------------------------- diffusers


class Pipeline(NamedTuple):
    """What the `model_index.json` of a diffusers folder says."""

    kind: str  # its class
    parts: dict[str, tuple[str, str]]  # subfolders that are read, with their library and class
    absent: set[str]  # parts that are missing on purpose, and the safety checker


def read_index(folder: Path) -> Pipeline:
    """Read the `model_index.json` of a diffusers folder and check the classes that it names.

    Raises:
        ValueError: it cannot be read, or names code of the folder or of another package.
    """
    file = folder / PIPELINE_CONFIG
    index = json_object(file)
    named: dict[str, list[Any]] = {"_class_name": [LIBRARIES[0], index.get("_class_name")]}
    named |= {n: v for n, v in index.items() if isinstance(v, list) and not n.startswith("_")}
    parts, absent = {}, set()
    for name, value in named.items():
        is_class = len(value) == 2 and value[0] in LIBRARIES and all(map(_is_name, value))
        if value == [None, None] or name == UNREAD:
            absent.add(name)
        elif is_class and name.isidentifier():
            parts[name] = (value[0], value[1])
        elif not all(isinstance(each, int | float) for each in value):
            raise ValueError(
                f"{file}: {shortened(name)} is {shortened(value)}; allowed: a class of "
                f"{' or '.join(LIBRARIES)}, or two nulls, since anything else is code that comes "
                "with the weights"
            )
    return Pipeline(parts.pop("_class_name")[1], parts, absent)


def check_configs(folder: Path) -> None:
    """Check that the configuration of a pipeline's part or a tokenizer names no code or model.

    transformers accepts the name of any of its classes as a tokenizer's, and some of these load
    other models and run code from the folder.

    Raises:
        ValueError: a file does, or cannot be read.
    """
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder / 'adapter_config.json'} names another model that is loaded with this part; "
            "save the folder again with the adapter merged into the weights"
        )
    for file in sorted(folder.glob("*config.json")):
        config = json_object(file)
        if any(key == "auto_map" and value for key, value in _settings(config)):
            raise ValueError(
                f"{file} has auto_map, which names code that comes with the weights; allowed: "
                f"models of {' and '.join(LIBRARIES)}"
            )
        kind = config.get("tokenizer_class") or "Tokenizer"
        if config.get("model_type") == "rag" or not re.fullmatch(TOKENIZERS, str(kind)):
            raise ValueError(
                f"{file}: tokenizer_class is {shortened(kind)}; allowed: a tokenizer of "
                "transformers such as T5Tokenizer"
            )


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value.isidentifier()

"""Weights that somebody has downloaded: what they are, and whether a job could read them.

CLIP weights are loaded, as a trial would load them. A diffusers folder, which may be gigabytes, is
looked at part by part: configuration, and the head of each file of weights.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from air_core.model_configs import check_part_configs, json_object
from air_core.weights import (
    CLIP_CONFIG,
    HUB_WEIGHTS,
    LORA_PIPELINES,
    PIPELINE_CONFIG,
    SUFFIXES,
    ClipFile,
    ClipFolder,
    find_backbone,
    generator_files,
    generator_parts,
    named_model,
    weights_as,
    weights_files,
)
from orchestrator.unpacking import Member

CONFIGS = tuple(
    f"{of}config.json" for of in ("", "scheduler_", "tokenizer_", "preprocessor_", "processor_")
)
WEIGHTLESS = ("Scheduler", "Tokenizer", "TokenizerFast", "Processor", "Extractor")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
LFS = b"version https://git-lfs"
# What tells models of a name from others: of Stable Diffusion 1.5 the sizes of its U-Net.
STABLE_DIFFUSION_1: dict[str, Any] = {
    "cross_attention_dim": 768,
    "block_out_channels": [320, 640, 1280, 1280],
}
U_NETS = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": STABLE_DIFFUSION_1,
    "stable-diffusion-v1-5": STABLE_DIFFUSION_1,
}


@dataclass
class ModelSource:
    """The files of a model, wherever they lie, and what is written beside them."""

    path: Path
    files: Mapping[str, Path]  # by their name in the model's folder
    written: Mapping[str, bytes] = field(default_factory=dict)

    def members(self) -> list[Member]:
        sizes = {name: file.stat().st_size for name, file in self.files.items()}
        sizes |= {name: len(data) for name, data in self.written.items()}
        return [Member(name, size) for name, size in sizes.items()]

    def unpack(self, folder: Path) -> Iterator[str]:
        for name, file in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / name)
            yield name
        for name, data in self.written.items():
            (folder / name).write_bytes(data)
            yield name


def model_source(name: str, given: Path) -> ModelSource:
    """What of a file or folder is the model.

    Args:
        name: of a backbone or generator, as sweep files have it, or one of one's own.

    Raises:
        ValueError: it is no model, or not what the name says.
    """
    if given.is_file():
        return _weights_file(name, given)
    if not given.is_dir():
        raise ValueError(f"{given} is not there")
    given = _snapshot(given)
    if (given / PIPELINE_CONFIG).is_file():
        if named_model(name):
            raise ValueError(f"{name} is a CLIP of open_clip, but {given} is a diffusers folder")
        _check_parts(given)
        return ModelSource(given, _below(given, generator_files(given)))
    if (given / CLIP_CONFIG).is_file():
        return ModelSource(given, _below(given, weights_files(str(given))))
    inside = [one for one in sorted(given.iterdir()) if one.suffix in SUFFIXES]
    hint = f"; for CLIP weights of one file, give {inside[0]}" if inside else ""
    raise ValueError(
        f"{given} is no model: it has neither {PIPELINE_CONFIG} (a diffusers folder) nor "
        f"{CLIP_CONFIG} (an open_clip folder){hint}"
    )


def check_model(name: str, folder: Path) -> dict[str, Any]:
    """What a model's folder holds, and what to write into a sweep file.

    Raises:
        ValueError: it is not whole, cannot be read, or is another model.
    """
    if (folder / PIPELINE_CONFIG).is_file():
        return _check_generator(name, folder)
    return _check_backbone(name, folder)


def _below(folder: Path, files: list[Path]) -> dict[str, Path]:
    return {file.relative_to(folder).as_posix(): file for file in files}


def _snapshot(folder: Path) -> Path:
    """The files of the newest version in a folder of the Hugging Face hub's cache."""
    main = folder / "refs" / "main"
    if not main.is_file():
        return folder
    return folder / "snapshots" / main.read_text().strip()


# ---------------------------------------------------------------- backbones


def _weights_file(name: str, file: Path) -> ModelSource:
    """A file of weights becomes an open_clip folder, which says itself how it is built."""
    if named_model(name) is None:
        raise ValueError(
            f"{name!r} says not what {file} is: for a file, the name is <architecture>/<tag> or "
            "<architecture> of open_clip, such as ViT-B-32/openai; a generator is a folder"
        )
    found = weights_as(name, file.absolute())
    safe = file.suffix == ".safetensors"
    files = {HUB_WEIGHTS[0] if safe else HUB_WEIGHTS[1]: file}
    files |= {one.name: one for one in found.tokenizer}
    return ModelSource(file, files, {CLIP_CONFIG: _config(found)})


def _config(found: ClipFile) -> bytes:
    said = {"model_cfg": found.model, "preprocess_cfg": found.preprocess}
    return json.dumps(said, indent=1, sort_keys=True).encode()


def _check_backbone(name: str, folder: Path) -> dict[str, Any]:
    found = find_backbone(str(folder))
    assert isinstance(found, ClipFolder)
    config = found.model
    wanted = named_model(name) or {}
    for key in ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu"):
        difference = _difference(wanted.get(key), config.get(key), key) if wanted else None
        if difference:
            raise ValueError(f"{folder} is not {name}: {difference}")
    for file in sorted(folder.glob("*.safetensors")):
        _check_head(file)
    from air_core.backbone.loading import load_backbone  # torch

    load_backbone(folder)
    return {"is": "backbone", "width": config.get("embed_dim")}


def _difference(wanted: Any, found: Any, key: str) -> str | None:
    """The first setting that a model of that name has otherwise."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        each = (
            _difference(value, found.get(part), f"{key}.{part}") for part, value in wanted.items()
        )
        return next((one for one in each if one), None)
    if (wanted or None) == (found or None):  # what is off may be left out
        return None
    return f"{key} is {found} there and {wanted} in open_clip's configuration of that name"


# ---------------------------------------------------------------- generators


def _check_parts(folder: Path) -> None:
    """
    Raises:
        ValueError: a part is missing, cannot be read, or names code that comes with it.
    """
    for part, (library, kind) in generator_parts(folder).items():
        place = folder / part
        if not place.is_dir():
            raise ValueError(
                f"{folder} is not whole: {PIPELINE_CONFIG} names {part}, and there is no such "
                "folder; was it fetched to its end?"
            )
        if not any((place / one).is_file() for one in CONFIGS):
            raise ValueError(f"{place} is not whole: it has none of {', '.join(CONFIGS)}")
        check_part_configs(place)
        if not kind.endswith(WEIGHTLESS):
            stem = "model" if library == "transformers" else "diffusion_pytorch_model"
            for file in _weights(place, stem):
                _check_head(file)


def _weights(part: Path, stem: str) -> list[Path]:
    """The files that a part's weights are read from.

    Raises:
        ValueError: there are none, or none that holds tensors alone.
    """
    if (whole := part / f"{stem}.safetensors").is_file():
        return [whole]
    if (index := part / f"{stem}.safetensors.index.json").is_file():
        names = sorted(set(json_object(index).get("weight_map", {}).values()))
        missing = [name for name in names if not (part / name).is_file()]
        if missing or not names:
            raise ValueError(f"{part} is not whole: {index.name} names {missing or 'no file'}")
        return [part / name for name in names]
    variants = sorted(file.name for file in part.glob(f"{stem}.*.safetensors"))
    if variants:
        raise ValueError(
            f"{part} has {variants[0]} and no {stem}.safetensors, which alone is read: fetch that "
            "too, or rename the other to it, if those are the weights that you want"
        )
    pickled = sorted(file.name for pattern in PICKLES for file in part.glob(pattern))
    if pickled:
        raise ValueError(
            f"{part} has its weights as {pickled[0]} alone, a pickle, which can run code where it "
            f"is read; fetch {stem}.safetensors of the same model, or where there is none load the "
            "folder once with diffusers, where you trust it, and write it again by "
            "save_pretrained(FOLDER, safe_serialization=True)"
        )
    raise ValueError(f"{part} has no weights: {stem}.safetensors is not there")


def _check_generator(name: str, folder: Path) -> dict[str, Any]:
    from air_core.diffusion.pipeline import check_classes  # diffusers takes seconds

    _check_parts(folder)
    check_classes(folder)
    kind = json_object(folder / PIPELINE_CONFIG).get("_class_name")
    wanted = U_NETS.get(name)
    if wanted is not None:
        unet = json_object(folder / "unet" / "config.json") if (folder / "unet").is_dir() else {}
        for key, value in wanted.items():
            if unet.get(key) != value:
                raise ValueError(
                    f"{folder} is not {name}: the {key} of its U-Net is {unet.get(key)}, of "
                    f"that model {value}; give another one, or stage this one under its own name"
                )
    parts = sorted(generator_parts(folder))
    return {"is": "generator", "pipeline": kind, "parts": parts, "lora": kind in LORA_PIPELINES}


# ---------------------------------------------------------------- files


def _check_head(file: Path) -> None:
    """A file of tensors has all the bytes that its head promises.

    Raises:
        ValueError: it has not.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as tensors:
            if not tensors.keys():
                raise ValueError(f"{file} holds no tensors")
    except SafetensorError as problem:
        with open(file, "rb") as handle:
            pointer = handle.read(len(LFS)) == LFS
        why = "it is a pointer of Git LFS; `git lfs pull` fetches what it stands for"
        raise ValueError(
            f"{file} cannot be read: "
            + (why if pointer else f"{problem}; was it fetched to its end?")
        ) from problem

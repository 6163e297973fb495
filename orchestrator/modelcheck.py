"""Weights on this machine: what they are, and whether a job could read them.

CLIP weights are loaded, as a trial would load them. A diffusers folder, which may be gigabytes, is
looked at part by part: configuration, and the head of each file of weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from air_core.model_configs import check_part_configs, json_object
from air_core.weights import (
    CLIP_CONFIG,
    LORA_PIPELINES,
    PIPELINE_CONFIG,
    SUFFIXES,
    check_whole,
    find_backbone,
    generator_folder,
    generator_parts,
    named_model,
    weights_files,
)

CONFIGS = tuple(
    f"{of}config.json" for of in ("", "scheduler_", "tokenizer_", "preprocessor_", "processor_")
)
WEIGHTLESS = ("Scheduler", "Tokenizer", "TokenizerFast", "Processor", "Extractor")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# What tells models of a name from others: of Stable Diffusion 1.5 the sizes of its U-Net.
STABLE_DIFFUSION_1: dict[str, Any] = {
    "cross_attention_dim": 768,
    "block_out_channels": [320, 640, 1280, 1280],
}
U_NETS = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": STABLE_DIFFUSION_1,
    "stable-diffusion-v1-5": STABLE_DIFFUSION_1,
}


def check_model(place: str, name: str = "") -> dict[str, Any]:
    """What a model is, after a check that a job can read it.

    Args:
        place: of a backbone or generator, as a sweep file names it.
        name: the model that it should be, of open_clip or Stable Diffusion 1.5; empty: any.

    Raises:
        ValueError: it is not whole, cannot be read, or is another model.
    """
    folder = Path(place).expanduser().absolute()
    if not folder.exists():
        backbone = "@" in place or named_model(place) is not None or place == "tiny"
        return (
            _check_backbone(name, place)
            if backbone
            else _check_generator(name, generator_folder(place))
        )
    if (folder / PIPELINE_CONFIG).is_file():
        if name and named_model(name):
            raise ValueError(f"{name} is a CLIP of open_clip, but {folder} is a diffusers folder")
        return _check_generator(name, folder)
    if (folder / CLIP_CONFIG).is_file():
        return _check_backbone(name, str(folder))
    files = [folder] if folder.is_file() else sorted(folder.iterdir())
    inside = [one for one in files if one.suffix in SUFFIXES]
    hint = f"; for CLIP weights of one file, write <architecture>@{inside[0]}" if inside else ""
    raise ValueError(
        f"{folder} is no model: it has neither {PIPELINE_CONFIG} (a diffusers folder) nor "
        f"{CLIP_CONFIG} (an open_clip folder){hint}"
    )


# ---------------------------------------------------------------- backbones


def _check_backbone(name: str, place: str) -> dict[str, Any]:
    found = find_backbone(place)
    config = found.model
    wanted = (named_model(name) if name else None) or {}
    for key in ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu"):
        difference = _difference(wanted.get(key), config.get(key), key) if wanted else None
        if difference:
            raise ValueError(f"{place} is not {name}: {difference}")
    for file in weights_files(found):
        check_whole(file)
    from air_core.backbone.loading import load_backbone  # torch

    load_backbone(found)
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
                check_whole(file)


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
                    f"that model {value}"
                )
    parts = sorted(generator_parts(folder))
    return {"is": "generator", "pipeline": kind, "parts": parts, "lora": kind in LORA_PIPELINES}

"""Are data and weights on this machine what a sweep file says, and could a job read them?

A dataset is compared with the published one (`air_core.datasets.published`), and every image is
opened; a folder of one's own is compared with nothing. CLIP weights are loaded, as a trial would
load them. A diffusers folder, which may be gigabytes, is checked part by part: configuration, and
the head of each file of weights.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from air_core.datasets import Dataset, Examples, get_dataset
from air_core.datasets.images import BAD_SHARE, Unreadable
from air_core.datasets.published import PUBLISHED
from air_core.model_configs import check_part_configs, json_object
from air_core.printable import printable
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

SHOWN = 3  # unreadable files that are named
Watch = Callable[[Iterable[str | None], int], Iterable[str | None]]
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


# ---------------------------------------------------------------- datasets


def check_dataset(
    name: str, root: Path | None, watch: Watch = lambda each, total: each
) -> dict[str, Any]:
    """Count, compare, and open every image.

    Args:
        name: a dataset, or folder:<path>.
        watch: passes on what is opened, one by one, and may show how far it is.

    Returns:
        What was found; `difference` is the first one, None where all fits.
    """
    try:
        dataset = get_dataset(name)
        examples = dataset.load(root)
    except ValueError as problem:
        return _dataset_report(name, (), {}, (), str(problem))
    found, counts = np.unique(examples.parts, return_counts=True)
    parts = dict(zip(found.tolist(), counts.tolist(), strict=True))
    unreadable = [why for why in watch(_opened(examples), len(examples.images)) if why]
    difference = next(_differences(dataset, examples, parts, unreadable), None)
    return _dataset_report(dataset.name, dataset.classnames, parts, unreadable, difference)


def _dataset_report(
    name: str,
    classnames: Sequence[str],
    parts: dict[str, int],
    unreadable: Sequence[str],
    difference: str | None,
) -> dict[str, Any]:
    return {
        "name": name,
        "classnames": list(classnames),
        "images": sum(parts.values()),
        "parts": {part: parts[part] for part in ("train", "val", "test", "free") if part in parts},
        "unreadable": {"count": len(unreadable), "first": list(unreadable[:SHOWN])},
        "difference": difference,
    }


def dataset_lines(report: dict[str, Any]) -> list[str]:
    """A report for people; nothing where nothing could be read."""
    if not report["parts"]:
        return []
    parts = "   ".join(f"{part} {count:,}" for part, count in report["parts"].items())
    return [
        f"{report['name']}: {report['images']:,} images of {len(report['classnames'])} classes",
        f"parts       {parts}",
        f"unreadable  {report['unreadable']['count']:,}",
        *(f"            {printable(why)}" for why in report["unreadable"]["first"]),
    ]


def _differences(
    dataset: Dataset, examples: Examples, parts: dict[str, int], unreadable: Sequence[str]
) -> Iterator[str]:
    """Where it is not the published one, and whether too many images cannot be read."""
    name, published = dataset.name, PUBLISHED.get(dataset.name)
    if published is not None:
        if len(dataset.classnames) != published.classes:
            yield f"{name} has {len(dataset.classnames)} classes, published {published.classes}"
        # Before the parts, since it says where images are missing.
        counts = np.bincount(examples.labels, minlength=len(dataset.classnames))
        each = published.each
        for classname, count in zip(dataset.classnames, counts, strict=True):
            if each is not None and count != each:
                yield f"{name}: class {classname!r} has {count:,} images, published {each:,}"
        for part, wanted in published.parts.items():
            count = sum(parts.get(one, 0) for one in part.split("+"))
            if count != wanted:
                source = published.source
                yield f"{name}: {part} has {count:,} images, published {wanted:,} ({source})"
    # One image less is another dataset than the published one; of one's own a few may be bad.
    images = len(examples.parts)
    allowed = 0 if published else int(BAD_SHARE * images)
    if len(unreadable) > allowed:
        yield (
            f"{name}: {len(unreadable):,} of {images:,} images cannot be read, {allowed:,} may; "
            f"the first: {printable(unreadable[0])}"
        )


def _opened(examples: Examples) -> Iterator[str | None]:
    """Why an image cannot be read, or None, one by one in order; decoding runs in threads."""

    def problem(index: int) -> str | None:
        try:
            examples.images[index]
        except Unreadable as unreadable:
            return str(unreadable)
        return None

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        yield from threads.map(problem, range(len(examples.images)))


# ---------------------------------------------------------------- models


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


def _check_generator(name: str, folder: Path) -> dict[str, Any]:
    from air_core.diffusion.pipeline import check_classes  # diffusers takes seconds

    parts = generator_parts(folder)
    for part, (library, kind) in parts.items():
        _check_part(folder, part, library, kind)
    check_classes(folder)
    unet = json_object(folder / "unet" / "config.json") if "unet" in parts else {}
    for key, value in U_NETS.get(name, {}).items():
        if unet.get(key) != value:
            raise ValueError(
                f"{folder} is not {name}: the {key} of its U-Net is {unet.get(key)}, of that model "
                f"{value}"
            )
    pipeline = json_object(folder / PIPELINE_CONFIG).get("_class_name")
    lora = pipeline in LORA_PIPELINES
    return {"is": "generator", "pipeline": pipeline, "parts": sorted(parts), "lora": lora}


def _check_part(folder: Path, part: str, library: str, kind: str) -> None:
    """
    Raises:
        ValueError: it is missing, cannot be read, or names code that comes with it.
    """
    place = folder / part
    if not place.is_dir():
        raise ValueError(
            f"{folder} is not whole: {PIPELINE_CONFIG} names {part}, and there is no such folder; "
            "was it fetched to its end?"
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

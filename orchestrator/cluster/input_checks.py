"""Checks of datasets and models on this machine, for `airsweep data check` and `models check`.

Every image of a dataset is opened, and the dataset is compared with the published counts
(`air_core.datasets.published`); image folders of the user have no such counts. CLIP weights are
loaded like in a trial. Of a diffusers folder, which may hold gigabytes, each part's configuration
and the header of each weights file are read.
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

SHOWN = 3  # unreadable files to list
ProgressWrapper = Callable[[Iterable[str | None], int], Iterable[str | None]]
CONFIGS = tuple(
    f"{prefix}config.json"
    for prefix in ("", "scheduler_", "tokenizer_", "preprocessor_", "processor_")
)
WEIGHTLESS = ("Scheduler", "Tokenizer", "TokenizerFast", "Processor", "Extractor")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# Settings of the U-Net by which a model is recognized.
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
    name: str, root: Path | None, with_progress: ProgressWrapper = lambda results, total: results
) -> dict[str, Any]:
    """Open every image of a dataset and compare the dataset with the published counts.

    Args:
        name: a dataset, or folder:<path>.
        root: folder of real datasets.
        with_progress: wraps the iterable of results and may show its progress.

    Returns:
        The report; `difference` describes the first difference, None if everything matches.
    """
    try:
        dataset = get_dataset(name)
        examples = dataset.load(root)
    except ValueError as problem:
        return _dataset_report(name, (), {}, (), str(problem))
    names, counts = np.unique(examples.parts, return_counts=True)
    parts = dict(zip(names.tolist(), counts.tolist(), strict=True))
    problems = with_progress(_image_problems(examples), len(examples.images))
    unreadable = [problem for problem in problems if problem]
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
    """A report as text; empty if the dataset could not be loaded."""
    if not report["parts"]:
        return []
    parts = "   ".join(f"{part} {count:,}" for part, count in report["parts"].items())
    return [
        f"{report['name']}: {report['images']:,} images of {len(report['classnames'])} classes",
        f"parts       {parts}",
        f"unreadable  {report['unreadable']['count']:,}",
        *(f"            {printable(problem)}" for problem in report["unreadable"]["first"]),
    ]


def _differences(
    dataset: Dataset, examples: Examples, parts: dict[str, int], unreadable: Sequence[str]
) -> Iterator[str]:
    """Differences from the published dataset, and whether too many images are unreadable."""
    name, published = dataset.name, PUBLISHED.get(dataset.name)
    if published is not None:
        if len(dataset.classnames) != published.classes:
            yield f"{name} has {len(dataset.classnames)} classes, published {published.classes}"
        # Classes before parts: a difference in a class shows where images are missing.
        counts = np.bincount(examples.labels, minlength=len(dataset.classnames))
        each = published.each
        for classname, count in zip(dataset.classnames, counts, strict=True):
            if each is not None and count != each:
                yield f"{name}: class {classname!r} has {count:,} images, published {each:,}"
        for part, wanted in published.parts.items():
            count = sum(parts.get(name_of_part, 0) for name_of_part in part.split("+"))
            if count != wanted:
                source = published.source
                yield f"{name}: {part} has {count:,} images, published {wanted:,} ({source})"
    # A published dataset must be complete; in a user's folder a few images may be unreadable.
    images = len(examples.parts)
    allowed = 0 if published else int(BAD_SHARE * images)
    if len(unreadable) > allowed:
        yield (
            f"{name}: {len(unreadable):,} of {images:,} images cannot be read, at most {allowed:,} "
            f"are allowed; the first: {printable(unreadable[0])}"
        )


def _image_problems(examples: Examples) -> Iterator[str | None]:
    """For each image in order: why it is unreadable, or None. Threads decode the images."""

    def problem(index: int) -> str | None:
        try:
            examples.images[index]
        except Unreadable as unreadable:
            return str(unreadable)
        return None

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        yield from threads.map(problem, range(len(examples.images)))


# ---------------------------------------------------------------- models


def check_model(model: str, name: str = "") -> dict[str, Any]:
    """Check that a job can read a model, and describe the model.

    Args:
        model: a backbone or generator, written as in a sweep file.
        name: expected model, one of open_clip's or Stable Diffusion 1.5; empty: any.

    Raises:
        ValueError: the model is incomplete, cannot be read, or is not the expected one.
    """
    folder = Path(model).expanduser().absolute()
    if not folder.exists():
        if "@" in model or named_model(model) is not None or model == "tiny":
            return _check_backbone(name, model)
        return _check_generator(name, generator_folder(model))
    if (folder / PIPELINE_CONFIG).is_file():
        if name and named_model(name):
            raise ValueError(f"{name} is a CLIP of open_clip, but {folder} is a diffusers folder")
        return _check_generator(name, folder)
    if (folder / CLIP_CONFIG).is_file():
        return _check_backbone(name, str(folder))
    files = [folder] if folder.is_file() else sorted(folder.iterdir())
    weights = [file for file in files if file.suffix in SUFFIXES]
    hint = f"; for a file of CLIP weights, write <architecture>@{weights[0]}" if weights else ""
    raise ValueError(
        f"{folder} is not a model: it has neither {PIPELINE_CONFIG} (a diffusers folder) nor "
        f"{CLIP_CONFIG} (an open_clip folder){hint}"
    )


def _check_backbone(name: str, model: str) -> dict[str, Any]:
    backbone = find_backbone(model)
    config = backbone.model
    expected = (named_model(name) if name else None) or {}
    for key in ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu"):
        difference = _difference(expected.get(key), config.get(key), key) if expected else None
        if difference:
            raise ValueError(f"{model} is not {name}: {difference}")
    for file in weights_files(backbone):
        check_whole(file)
    from air_core.backbone.loading import load_backbone  # torch

    load_backbone(backbone)
    return {"is": "backbone", "width": config.get("embed_dim")}


def _difference(expected: Any, actual: Any, key: str) -> str | None:
    """Describe the first setting that differs from the expected configuration."""
    if isinstance(expected, dict) and isinstance(actual, dict):
        differences = (
            _difference(value, actual.get(part), f"{key}.{part}")
            for part, value in expected.items()
        )
        return next(filter(None, differences), None)
    if (expected or None) == (actual or None):  # a missing key means off
        return None
    return f"its {key} is {actual}, but {expected} in open_clip's configuration of that name"


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
                f"{folder} is not {name}: the {key} of its U-Net is {unet.get(key)}, but {value} "
                "in that model"
            )
    pipeline = json_object(folder / PIPELINE_CONFIG).get("_class_name")
    lora = pipeline in LORA_PIPELINES
    return {"is": "generator", "pipeline": pipeline, "parts": sorted(parts), "lora": lora}


def _check_part(folder: Path, part: str, library: str, kind: str) -> None:
    """Check one part of a pipeline, such as its U-Net.

    Raises:
        ValueError: the part is missing, cannot be read, or refers to code in its folder.
    """
    part_folder = folder / part
    if not part_folder.is_dir():
        raise ValueError(
            f"{folder} is incomplete: {PIPELINE_CONFIG} lists the part {part}, but the folder "
            f"{part} is missing; was the download complete?"
        )
    if not any((part_folder / config).is_file() for config in CONFIGS):
        raise ValueError(f"{part_folder} is incomplete: it has none of {', '.join(CONFIGS)}")
    check_part_configs(part_folder)
    if not kind.endswith(WEIGHTLESS):
        stem = "model" if library == "transformers" else "diffusion_pytorch_model"
        for file in _weights(part_folder, stem):
            check_whole(file)


def _weights(part: Path, stem: str) -> list[Path]:
    """The files with the weights of a part.

    Raises:
        ValueError: the part has no weights in safetensors format.
    """
    if (single := part / f"{stem}.safetensors").is_file():
        return [single]
    if (index := part / f"{stem}.safetensors.index.json").is_file():
        names = sorted(set(json_object(index).get("weight_map", {}).values()))
        missing = [name for name in names if not (part / name).is_file()]
        if missing or not names:
            problem = f"{', '.join(missing)}: missing" if missing else "no file"
            raise ValueError(f"{part} is incomplete: {index.name} lists {problem}")
        return [part / name for name in names]
    variants = sorted(file.name for file in part.glob(f"{stem}.*.safetensors"))
    if variants:
        raise ValueError(
            f"{part} has {variants[0]} but no {stem}.safetensors, and only the latter is read; "
            f"download it too, or rename {variants[0]} to use those weights"
        )
    pickled = sorted(file.name for pattern in PICKLES for file in part.glob(pattern))
    if pickled:
        raise ValueError(
            f"{part} has only {pickled[0]}, a pickle, which can run code when it is loaded; "
            f"download {stem}.safetensors of the same model, or, if you trust the folder, load it "
            "with diffusers and convert it by save_pretrained(FOLDER, safe_serialization=True)"
        )
    raise ValueError(f"{part} has no weights: {stem}.safetensors is missing")

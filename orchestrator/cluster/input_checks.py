"""Checks of datasets and models on this machine, for `airsweep data check` and `models check`.

Every image of a dataset is opened, duplicates are searched, and the dataset is compared with the
published counts (`air_core.datasets.published`); image folders of the user have no such counts.
CLIP weights are loaded like in a trial. Of a diffusers folder, which may hold gigabytes, each
part's configuration and the header of each weights file are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from air_core.datasets import Dataset, Examples, get_dataset
from air_core.datasets.duplicates import difference_hash, exact_pairs, near_pairs, pixel_digest
from air_core.datasets.image_folder import PREFIX, leak_message, permits_duplicates
from air_core.datasets.images import (
    BAD_SHARE,
    ImageFiles,
    Unreadable,
    pixel_count,
    too_many_unreadable,
)
from air_core.datasets.published import PUBLISHED
from air_core.models.configs import json_object
from air_core.models.families import check_denoiser
from air_core.models.weights import (
    CLIP_CONFIG,
    PIPELINE_CONFIG,
    SUFFIXES,
    find_backbone,
    generator_files,
    generator_folder,
    generator_parts,
    local_path,
    named_model,
)
from air_core.printable import printable
from air_core.specs import UNKNOWN
from orchestrator.formatting import plural
from orchestrator.planning.dataset_text import skipped_text

SHOWN = 3  # unreadable files and duplicates to list
# Memory: this many threads, each with an image of up to LARGE pixels, and one larger image.
THREADS = 4
LARGE = 2**24
DETAILED_PX = 48  # smaller images of a class look alike, so near duplicates mean nothing
CHUNK = 1024  # images given to the threads at once
ProgressWrapper = Callable[[Iterable[Any], int], Iterable[Any]]
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
    """Open every image of a dataset, search duplicates, and compare with the published counts.

    Args:
        name: a dataset, or folder:<path>.
        root: folder of real datasets.
        with_progress: wraps the iterable of results and may show its progress.

    Returns:
        The report; `difference` describes the first difference, None if everything matches.
    """
    report: dict[str, Any] = {
        "name": name,
        "classnames": [],
        "images": 0,
        "parts": {},
        "unreadable": {"count": 0, "first": []},
        "skipped": {},
        "duplicates": {},
    }
    try:
        dataset = get_dataset(name)
        examples = dataset.load(root)
        skipped = dataset.skipped()
    except ValueError as problem:
        return report | {"difference": str(problem)}
    names, counts = np.unique(examples.parts, return_counts=True)
    parts = dict(zip(names.tolist(), counts.tolist(), strict=True))
    looks = list(with_progress(_looks(examples), len(examples.images)))
    unreadable = [look.problem for look in looks if look.problem]
    duplicates = _duplicates(examples, looks)
    return report | {
        "name": dataset.name,
        "classnames": list(dataset.classnames),
        "images": len(examples.parts),
        "parts": {part: parts[part] for part in ("train", "val", "test", "free") if part in parts},
        "unreadable": {"count": len(unreadable), "first": unreadable[:SHOWN]},
        "skipped": skipped,
        "duplicates": duplicates,
        "difference": next(_differences(dataset, examples, parts, unreadable, duplicates), None),
    }


def dataset_lines(report: dict[str, Any]) -> list[str]:
    """A report as text; empty if the dataset could not be loaded."""
    if not report["parts"]:
        return []
    parts = "   ".join(f"{part} {count:,}" for part, count in report["parts"].items())
    lines = [
        f"{report['name']}: {report['images']:,} images of {len(report['classnames'])} classes",
        f"parts       {parts}",
        f"unreadable  {report['unreadable']['count']:,}",
        *(f"            {printable(problem)}" for problem in report["unreadable"]["first"]),
    ]
    if report["skipped"]:
        lines.append(f"skipped     {skipped_text(report['skipped'])}")
    for kind, found in report["duplicates"].items():
        if not found["pairs"]:
            continue
        lines.append(
            f"{kind:<11} {plural(found['pairs'], 'pair')} of {DUPLICATES[kind]}: "
            f"{found['two_classes']:,} in two classes, {found['train_and_test']:,} in train and "
            "test"
        )
        lines += [f"            {printable(' = '.join(pair))}" for pair in found["first"]]
    exact = report["duplicates"]["exact"]["pairs"]
    if exact and "free" in report["parts"]:
        lines.append("            split_seed can put one image of a pair into train, one into test")
    return lines


DUPLICATES = {"exact": "images with equal pixels", "near": "images that look alike"}


@dataclass(frozen=True)
class _Look:
    """What was seen of one image."""

    problem: str | None  # why it is unreadable
    digest: bytes = b""
    bits: bytes = bytes(32)  # of the difference hash; zeros are compared with nothing


def _looks(examples: Examples) -> Iterator[_Look]:
    """Open each image, in order. Threads decode; the memory does not depend on their number."""
    large = Lock()
    files = examples.images.files if isinstance(examples.images, ImageFiles) else None

    def look(index: int) -> _Look:
        is_large = files is not None and pixel_count(files[index]) > LARGE
        with large if is_large else nullcontext():
            return _look(examples, index)  # on return, the image is freed

    with ThreadPoolExecutor(THREADS) as threads:
        positions = range(len(examples.images))
        for start in positions[::CHUNK]:
            yield from threads.map(look, positions[start : start + CHUNK])


def _look(examples: Examples, index: int) -> _Look:
    try:
        image = examples.images[index]
    except Unreadable as problem:
        return _Look(str(problem))
    except OSError as problem:
        return _Look(f"{problem.filename} cannot be read: {problem.strerror}")
    digest = pixel_digest(image)
    if min(image.size) < DETAILED_PX:
        return _Look(None, digest)
    return _Look(None, digest, np.packbits(difference_hash(image)).tobytes())


def _duplicates(examples: Examples, looks: Sequence[_Look]) -> dict[str, Any]:
    """Numbers of pairs of readable images that are exact or near duplicates, and the worst ones."""
    seen = [i for i, look in enumerate(looks) if look.problem is None]
    exact = [(seen[i], seen[j]) for i, j in exact_pairs([looks[i].digest for i in seen])]
    repeated = {j for _, j in exact}
    firsts = [i for i in seen if i not in repeated]
    hashes = np.frombuffer(b"".join(looks[i].bits for i in firsts), np.uint8).reshape(-1, 32)
    near = [(firsts[i], firsts[j]) for i, j in near_pairs(hashes)]
    return {"exact": _pairs_report(examples, exact), "near": _pairs_report(examples, near)}


def _pairs_report(examples: Examples, pairs: Sequence[tuple[int, int]]) -> dict[str, Any]:
    labels, tests = examples.labels, examples.parts == "test"
    leaks = [bool(tests[i] != tests[j]) for i, j in pairs]
    mixed = [bool(labels[i] != labels[j] and UNKNOWN not in labels[[i, j]]) for i, j in pairs]
    worst = sorted(range(len(pairs)), key=lambda k: (not leaks[k], not mixed[k], k))
    return {
        "pairs": len(pairs),
        "two_classes": sum(mixed),
        "train_and_test": sum(leaks),
        "first": [[_image_name(examples, i) for i in pairs[k]] for k in worst[:SHOWN]],
    }


def _image_name(examples: Examples, index: int) -> str:
    if isinstance(examples.images, ImageFiles):
        return str(examples.images.files[index].relative_to(examples.images.home))
    return f"image {index}"


def _differences(
    dataset: Dataset,
    examples: Examples,
    parts: dict[str, int],
    unreadable: Sequence[str],
    duplicates: dict[str, Any],
) -> Iterator[str]:
    """Differences from the published dataset; too many unreadable images; test images in train."""
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
    problems, share = [*map(printable, unreadable)], 0 if published else BAD_SHARE
    if problem := too_many_unreadable(name, problems, len(examples.parts), share):
        yield problem
    leaks = duplicates["exact"]["train_and_test"]
    if leaks and name.startswith(PREFIX) and not permits_duplicates(Path(dataset.source)):
        yield leak_message(Path(dataset.source), leaks, duplicates["exact"]["first"][0])


# ---------------------------------------------------------------- models


def check_model(model: str, name: str = "") -> dict[str, Any]:
    """Check that a job can read a model, and describe the model.

    Args:
        model: a backbone or generator, written as in a sweep file.
        name: expected model, one of open_clip's or Stable Diffusion 1.5; empty: any.

    Raises:
        ValueError: the model is incomplete, cannot be read, or is not the expected one.
    """
    folder = local_path(model)
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

    generator_files(folder)
    check_classes(folder)
    parts = generator_parts(folder)
    unet = json_object(folder / "unet" / "config.json") if "unet" in parts else {}
    for key, value in U_NETS.get(name, {}).items():
        if unet.get(key) != value:
            raise ValueError(
                f"{folder} is not {name}: the {key} of its U-Net is {unet.get(key)}, but {value} "
                "in that model"
            )
    pipeline = json_object(folder / PIPELINE_CONFIG).get("_class_name")
    found = {"is": "generator", "pipeline": pipeline, "parts": sorted(parts), "lora": True}
    try:
        check_denoiser(folder)
    except ValueError as problem:
        found |= {"lora": False, "why_no_lora": str(problem)}
    return found

"""Checks of a dataset or a model on this machine, for `airsweep check`.

Every image of a dataset is opened, duplicates are searched, and the dataset is compared with the
published counts (`Dataset.published`); image folders of the user have no such counts.
CLIP weights are loaded like in a trial. Of a diffusers folder, which may hold gigabytes, each
part's configuration and the header of each weights file are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from air_core.datasets import Dataset, Examples, get_dataset
from air_core.datasets.class_folders import skipped_text
from air_core.datasets.duplicates import difference_hash, exact_pairs, near_pairs, pixel_digest
from air_core.datasets.image_folder import PREFIX, leak_message, permits_duplicates
from air_core.datasets.images import BAD_SHARE, ImageFiles, Unreadable, too_many_unreadable
from air_core.models.configs import PIPELINE_CONFIG, json_object
from air_core.models.families import check_denoiser
from air_core.models.weights import (
    CLIP_CONFIG,
    find_backbone,
    generator_files,
    generator_folder,
    is_known,
    local_path,
)
from air_core.settings import UNKNOWN, components
from air_core.tools.printable import printable
from orchestrator.formatting import plural

SHOWN = 3  # unreadable files and duplicates to list
CLASSES_SHOWN = 5
THREADS = 4
DETAILED_PX = 48  # smaller images of a class look alike, so near duplicates mean nothing
CHUNK = 1024  # images given to the threads at once
ProgressWrapper = Callable[[Iterable[Any], int], Iterable[Any]]


def is_dataset(name: str) -> bool:
    return name in components.DATASETS or name.startswith(PREFIX)


# ---------------------------------------------------------------- datasets


def check_dataset(
    name: str, root: Path | None, with_progress: ProgressWrapper = lambda results, total: results
) -> tuple[list[str], str | None]:
    """Open every image of a dataset, search duplicates, and compare with the published counts.

    Args:
        name: a dataset, or folder:<path>.
        root: folder of real datasets.
        with_progress: wraps the iterable of results and may show its progress.

    Returns:
        Lines that describe the dataset; the first difference, None if everything matches.

    Raises:
        ValueError: the dataset cannot be read.
    """
    dataset = get_dataset(name)
    examples = dataset.load(root)
    names, counts = np.unique(examples.parts, return_counts=True)
    parts = dict(zip(names.tolist(), counts.tolist(), strict=True))
    looks = list(with_progress(_looks(examples), len(examples.images)))
    unreadable = [printable(problem) for problem, _, _ in looks if problem]
    exact, near = _duplicates(examples, looks)
    each_part = (f"{part} {parts[part]:,}" for part in PARTS if part in parts)
    classnames = ", ".join(dataset.classnames[:CLASSES_SHOWN])
    more = len(dataset.classnames) - CLASSES_SHOWN
    skipped = skipped_text(dataset.skipped())
    lines = [
        f"{dataset.name}: {len(examples.parts):,} images of {len(dataset.classnames)} classes",
        f"classes     {printable(classnames)}{f' and {more} more' if more > 0 else ''}",
        f"template    {printable(dataset.template)}",
        f"parts       {'   '.join(each_part)}",
        f"unreadable  {len(unreadable):,}",
        *(f"            {problem}" for problem in unreadable[:SHOWN]),
        *([f"skipped     {skipped}"] if skipped else []),
        *_pair_lines(examples, "exact       {} of images with equal pixels", " = ", exact),
        *_pair_lines(examples, "near        {} of images that look alike", " ~ ", near),
    ]
    if exact and "free" in parts:
        lines.append("            split_seed can put one image of a pair into train, one into test")
    return lines, next(_differences(dataset, examples, parts, unreadable, exact), None)


PARTS = ("train", "val", "test", "free")
# Of an image: why it is unreadable, a digest of its pixels, and its difference hash; zeros are
# compared with nothing.
Look = tuple[str, bytes, bytes]
NO_HASH = bytes(32)


def _looks(examples: Examples) -> Iterator[Look]:
    """Open each image, in order."""
    with ThreadPoolExecutor(THREADS) as threads:
        positions = range(len(examples.images))
        for start in positions[::CHUNK]:
            yield from threads.map(partial(_look, examples), positions[start : start + CHUNK])


def _look(examples: Examples, index: int) -> Look:
    try:
        image = examples.images[index]
    except Unreadable as problem:
        return str(problem), b"", NO_HASH
    except OSError as problem:
        return f"{problem.filename} cannot be read: {problem.strerror}", b"", NO_HASH
    is_detailed = min(image.size) >= DETAILED_PX
    bits = np.packbits(difference_hash(image)).tobytes() if is_detailed else NO_HASH
    return "", pixel_digest(image), bits


Pair = tuple[int, int]  # positions of two images that are equal or look alike


def _duplicates(examples: Examples, looks: Sequence[Look]) -> tuple[list[Pair], list[Pair]]:
    """Exact and near duplicates among the readable images, the worst pairs first."""
    seen = [i for i, (problem, _, _) in enumerate(looks) if not problem]
    exact = [(seen[i], seen[j]) for i, j in exact_pairs([looks[i][1] for i in seen])]
    repeated = {j for _, j in exact}
    firsts = [i for i in seen if i not in repeated]
    hashes = np.frombuffer(b"".join(looks[i][2] for i in firsts), np.uint8).reshape(-1, 32)
    near = [(firsts[i], firsts[j]) for i, j in near_pairs(hashes)]

    def is_harmless(pair: Pair) -> tuple[bool, bool]:
        return not _is_leak(examples, pair), not _is_of_two_classes(examples, pair)

    return sorted(exact, key=is_harmless), sorted(near, key=is_harmless)


def _is_leak(examples: Examples, pair: Pair) -> bool:
    """Whether only one of the images is a test image."""
    return len({examples.parts[i] == "test" for i in pair}) == 2


def _is_of_two_classes(examples: Examples, pair: Pair) -> bool:
    labels = {int(examples.labels[i]) for i in pair}
    return len(labels) == 2 and UNKNOWN not in labels


def _image_name(examples: Examples, index: int) -> str:
    if isinstance(examples.images, ImageFiles):
        return str(examples.images.files[index].relative_to(examples.images.home))
    return f"image {index}"


def _pair_lines(examples: Examples, title: str, sign: str, pairs: Sequence[Pair]) -> list[str]:
    if not pairs:
        return []
    two_classes = sum(_is_of_two_classes(examples, pair) for pair in pairs)
    in_test = sum(_is_leak(examples, pair) for pair in pairs)
    names = (sign.join(_image_name(examples, i) for i in pair) for pair in pairs[:SHOWN])
    return [
        f"{title.format(plural(len(pairs), 'pair'))}: {two_classes:,} in two classes, "
        f"{in_test:,} in train and test",
        *(f"            {printable(each)}" for each in names),
    ]


def _differences(
    dataset: Dataset,
    examples: Examples,
    parts: dict[str, int],
    unreadable: Sequence[str],
    exact: Sequence[Pair],
) -> Iterator[str]:
    """Differences from the published dataset; too many unreadable images; test images in train."""
    name, published = dataset.name, dataset.published
    if published is not None:
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
    share = 0 if published else BAD_SHARE
    if problem := too_many_unreadable(name, unreadable, len(examples.parts), share):
        yield problem
    leaks = [pair for pair in exact if _is_leak(examples, pair)]
    if leaks and name.startswith(PREFIX) and not permits_duplicates(dataset):
        names = tuple(_image_name(examples, i) for i in leaks[0])
        yield leak_message(dataset, len(leaks), names)


# ---------------------------------------------------------------- models


def check_model(model: str) -> list[str]:
    """Check that a trial can read a model.

    Args:
        model: a backbone or generator, written as in a sweep file.

    Returns:
        Lines that describe the model.

    Raises:
        ValueError: the model is unknown, incomplete or cannot be read.
    """
    folder = local_path(model)
    is_backbone = "@" in model or model == "tiny" or is_known(model)
    if (folder / CLIP_CONFIG).is_file() or (is_backbone and not folder.exists()):
        return _check_backbone(model)
    if (folder / PIPELINE_CONFIG).is_file() or ("/" in model and not folder.exists()):
        return _check_generator(model)
    if not folder.exists():
        raise ValueError(
            f"unknown dataset or model {model!r}; datasets: "
            f"{', '.join(sorted(components.DATASETS))}, or folder:PATH; a model is written as in a "
            "sweep file"
        )
    raise ValueError(
        f"{folder} is not a model: it has neither {PIPELINE_CONFIG} (a diffusers folder) nor "
        f"{CLIP_CONFIG} (an open_clip folder); for a folder of images, write folder:{model}; for a "
        f"file of CLIP weights, write <architecture>@{model}"
    )


def _check_backbone(model: str) -> list[str]:
    from air_core.backbone.loading import load_backbone  # torch

    load_backbone(find_backbone(model))
    return _model_lines("backbone", model)


def _check_generator(model: str) -> list[str]:
    from air_core.diffusion.pipeline import check_classes  # diffusers takes seconds

    folder = generator_folder(model)
    generator_files(folder)
    check_classes(folder)
    lines = [f"pipeline: {json_object(folder / PIPELINE_CONFIG).get('_class_name')}"]
    try:
        check_denoiser(folder)
    except ValueError as problem:
        lines.append(f"no LoRA, no evidence: {problem}")
    return _model_lines("generator", model, lines)


def _model_lines(role: str, model: str, details: Sequence[str] = ()) -> list[str]:
    return [
        f"{model}: a complete {role}",
        *details,
        f"in the sweep file, under fixed:  {role}: {model}",
    ]

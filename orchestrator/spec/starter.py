"""`airsweep init`: write a first sweep file for a folder of images.

Only names of folders and files are read; no image is opened.
"""

from __future__ import annotations

import json
import os
import re
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from air_core.datasets.class_folders import READ_TEXT, images_in, skipped_clause, skipped_text
from air_core.datasets.dataset import some
from air_core.datasets.image_folder import (
    PREFIX,
    WANTED,
    check_folder,
    folder_dataset,
    unlabelled_dataset,
)
from air_core.datasets.unlabelled import (
    CLASSES,
    LABELS,
    Classes,
    is_unlabelled,
    parse_classes,
    read_classes,
)
from air_core.models.weights import local_path
from air_core.paradigms import TEST_SHARE
from orchestrator.spec.marked_yaml import parse
from orchestrator.spec.resources import gpu_lines
from orchestrator.spec.schema import NAME_PATTERN, NAME_WORDS
from orchestrator.spec.sweep_file import sweep_from_document

if TYPE_CHECKING:
    from air_core.datasets import Dataset

LISTED_CLASSES = 6  # classes that are listed with their number of images
TEMPLATE = Path(__file__).with_name("starter.yaml.j2")
CLASSNAMES = """\
CLIP reads the names of the folders as class names. Better names can be set in \
{images}/classnames.txt, one line per class: {first} = a longer name. {images}/template.txt may \
contain one line such as: a satellite photo of a {{}}"""
UNLABELLED = """\
{images}/classes.txt names the classes, one per line: name, or name = how to say it for CLIP. \
{images}/labels.csv may label images (image,class): for test or, with part val, validation, which \
chooses the best classifier. Labelled images are never in the pool that methods learn from."""


@dataclass(frozen=True)
class Starter:
    """A new sweep file and a description of its images."""

    file: Path
    summary: str  # of the images
    skipped: str  # see `skipped_text`
    unlabelled: bool  # no image has a label


def write_starter(
    name: str,
    images: str | Path | None,
    folder: Path,
    classes: str | None = None,
    gpus: bool = False,
) -> Starter:
    """Write NAME.yaml, and `classes.txt` beside images without class folders.

    Args:
        name: name of the sweep and of its file.
        images: path of the images; None: the digits.
        folder: folder of the new file.
        classes: class names with commas between them, or a file with one per line; None: the
            images are in class folders, or beside a `classes.txt`.
        gpus: let trials and generators use GPUs; otherwise a comment says how.

    Raises:
        ValueError: the name is invalid, a file exists, or images or classes are not a dataset.
    """
    name = name.removesuffix(".yaml")
    if not re.fullmatch(NAME_PATTERN, name):
        raise ValueError(f"{name!r} is not a valid name of a sweep; allowed: {NAME_WORDS}")
    file = folder / f"{name}.yaml"
    if file.exists():  # check before a large folder is listed
        raise ValueError(f"{file} already exists; {CHOOSE}")
    given = None if classes is None else _given_classes(classes, images)
    facts = DIGITS if images is None else _folder(str(images), given)
    if images is not None and folder.resolve() != Path.cwd() and str(images)[0] not in "/~":
        # Paths in a sweep file are relative to the file.
        facts = facts | {"dataset": f"{PREFIX}{os.path.relpath(images, folder)}"}
    text = _text(name, facts, gpus)
    sweep_from_document(parse(text, str(file)))
    if given is not None:
        _write_classes(local_path(str(images)), given)
    _write(file, text, CHOOSE)
    return Starter(file, facts["about"], facts.get("skipped", ""), not facts["tests"])


def _given_classes(classes: str, images: str | Path | None) -> Classes:
    """The classes of `--classes`: names with commas between them, or the path of a file.

    Raises:
        ValueError: they are not valid, or there are no images.
    """
    if images is None:
        raise ValueError("--classes names the classes of your images; add --images DIR")
    file = local_path(classes)
    if file.suffix == ".txt" or ("," not in classes and file.exists()):
        return read_classes(file)
    names = [name.strip() for name in classes.split(",")]
    return parse_classes(f"--classes {classes}", [("--classes", name) for name in names])


def _write_classes(images: Path, classes: Classes) -> None:
    """Write `classes.txt` beside the images, unless it exists with these classes.

    Raises:
        ValueError: it exists with other classes, or cannot be written.
    """
    file = images / CLASSES
    if not file.exists():
        _write(file, classes.text(), "put it there by hand, and leave --classes out")
    elif (found := read_classes(file)) != classes:
        raise ValueError(
            f"{file} exists with other classes ({some(found.names)}); edit that file and leave "
            "--classes out, or remove it"
        )


CHOOSE = "choose another name or remove the file"


def _write(file: Path, text: str, advice: str) -> None:
    try:
        with open(file, "x") as new:
            new.write(text)
    except OSError as problem:
        is_there = isinstance(problem, FileExistsError)
        why = "already exists" if is_there else f"cannot be written: {problem.strerror}"
        raise ValueError(f"{file} {why}; {advice}") from None


# What the template reads of the images: `note` stands above `dataset`, `tests` is approximate.
DIGITS: dict[str, Any] = {
    "subject": "these digits",
    "dataset": "digits",
    "about": "1,797 real digits, 540 of them for test",
    "note": "The digits that ship with airsweep. For your own images use `folder:<path>` with one "
    "folder per class (docs/your_images.md).",
    "tests": 540,
    "labelled": True,
}


def _folder(images: str, classes: Classes | None) -> dict[str, Any]:
    dataset = _dataset(images, classes)
    labelled, first = dataset.pool_labels == "known", dataset.classnames[0]
    about, tests = (_summary if labelled else _unlabelled_summary)(images, dataset)
    note = CLASSNAMES if labelled else UNLABELLED
    return {
        "subject": "my images",
        "dataset": f"{PREFIX}{images}",
        "about": about,
        "note": note.format(images=images, first=first) if first.isprintable() else "",
        "tests": tests,
        "labelled": labelled,
        "skipped": skipped_text(dataset.skipped()),
    }


def _dataset(images: str, classes: Classes | None) -> Dataset:
    """A folder as a dataset.

    Args:
        classes: of images without class folders; None: those of the folder.

    Raises:
        ValueError: the folder has no class folders, or its classes are not a dataset.
    """
    folder = local_path(images)
    if classes is not None:
        check_folder(folder)
        return unlabelled_dataset(folder, classes)
    if is_unlabelled(folder):
        return folder_dataset(f"{PREFIX}{images}")
    if folder.is_dir() and not any(entry.is_dir() for entry in folder.iterdir()):
        count = len(images_in(folder))
        if not count:
            raise ValueError(
                f"{folder} contains no images ({READ_TEXT}){skipped_clause(folder)}; {WANTED}"
            )
        raise ValueError(
            f"{folder} contains {count:,} images and no class folders, so the classes are unknown; "
            "name them with --classes cat,dog,... or --classes FILE, one class per line, or move "
            f"the images to {folder}/<class>/ (docs/your_images.md)"
        )
    return folder_dataset(f"{PREFIX}{images}")


def _unlabelled_summary(images: str, dataset: Dataset) -> tuple[str, int]:
    """A sentence about the content of a folder without class folders, and its test images."""
    counts = Counter(dataset.load(None).parts.tolist())
    words = (
        f"{counts['test']:,} labelled for test and {counts['val']:,} for validation in {LABELS}"
        if counts["test"] + counts["val"]
        else "none labelled, so no accuracy can be measured"
    )
    return (
        f"{images}: {counts.total():,} images for {len(dataset.classnames)} classes "
        f"({_listed(dataset.classnames)}); {counts['train']:,} unlabelled, {words}; "
        "names of folders are ignored"
    ), counts["test"]


def _summary(images: str, dataset: Dataset) -> tuple[str, int]:
    """A sentence about the content of a folder, and the approximate number of test images."""
    examples, names = dataset.load(None), dataset.classnames
    of_class, parts = Counter(examples.labels.tolist()), Counter(examples.parts.tolist())
    total = parts.total()
    tests = round(TEST_SHARE * total) if parts["free"] else parts["test"]
    split = (
        f"about {tests:,} for test, split by `split_seed`"
        if parts["free"]
        else f"{parts['train']:,} to learn from, {parts['test']:,} for test"
    )
    classes = _listed(names, [f" {of_class[i]:,}" for i in range(len(names))])
    return (
        f"{images}: {total:,} images of {len(names)} classes ({classes}); {split}, "
        f"{parts['val']:,} for validation, to choose the best classifier"
    ), tests


def _listed(names: Sequence[str], counts: Sequence[str] | None = None) -> str:
    """The first class names, with the numbers of their images."""
    pairs = zip(names, counts or [""] * len(names), strict=True)
    texts = [f"{name if name.isprintable() else repr(name)}{count}" for name, count in pairs]
    more = f" and {len(names) - LISTED_CLASSES} more" if len(names) > LISTED_CLASSES else ""
    return ", ".join(texts[:LISTED_CLASSES]) + more


def _text(name: str, facts: Mapping[str, Any], gpus: bool) -> str:
    import jinja2

    environment = jinja2.Environment(keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
    environment.filters["comment"] = _comment
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        facts,
        name=name,
        dataset=json.dumps(facts["dataset"], ensure_ascii=False),
        resources=gpu_lines() if gpus else f"# {gpu_lines()}",
    )


def _comment(text: str, indent: str = "") -> str:
    start = f"{indent}# "
    return textwrap.fill(
        text, 100, initial_indent=start, subsequent_indent=start, break_long_words=False
    )

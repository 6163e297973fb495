"""`folder:<path>`: a dataset of your images in class folders, or beside a `classes.txt`.

With `classes.txt` the names of folders mean nothing, see `air_core.datasets.unlabelled`. Without:

    <path>/train/<class>/*.jpg     fixed parts: train/ and test/, optionally val/; without val/ a
    <path>/test/<class>/*.jpg      tenth of train is for validation

    <path>/<class>/*.jpg           no parts: a tenth of each class is for validation, the same for
                                   every split, and `split_seed` splits the rest

    <path>/classnames.txt          optional: lines `folder = class name`; the class name of any
                                   other folder is its name, with spaces for underscores
    <path>/template.txt            optional: one line such as `a satellite photo of a {}`
    <path>/allow_duplicates        optional: permits images in both train/ and test/

Classes are sorted by folder name. Files that are not images directly in a class folder are not
read; `Dataset.skipped` counts them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from air_core.datasets.class_folders import (
    READ_TEXT,
    images_in,
    is_system_folder,
    other_files,
    skipped_clause,
)
from air_core.datasets.dataset import (
    TEMPLATE,
    Dataset,
    Listing,
    Row,
    is_template,
    listed,
    listing,
    some,
)
from air_core.datasets.images import ImageFiles
from air_core.datasets.places import Said, check_classnames, class_entries, said, text_lines
from air_core.datasets.split_files import with_validation
from air_core.datasets.unlabelled import (
    CLASSES,
    LABELS,
    Classes,
    is_unlabelled,
    read_classes,
    unlabelled_listing,
)
from air_core.models.weights import local_path

PREFIX = "folder:"
OWNERS = "the owner's"  # licence
PARTS = ("train", "val", "test")
WANTED = (
    "expected <class>/<image>, or train/<class>/<image> and test/<class>/<image> (val/ is "
    f"optional), or images in any folders beside a {CLASSES} with one class per line"
)
PERMIT = "allow_duplicates"
FEWEST = 5  # images of a class without fixed parts, so that two or more are in the pool


def folder_dataset(name: str) -> Dataset:
    """The dataset of `folder:<path>`; lists folders and opens no image.

    Raises:
        ValueError: it is not an image folder, or its parts have different classes.
    """
    home = local_path(name.removeprefix(PREFIX))
    check_folder(home)
    if is_unlabelled(home):
        return unlabelled_dataset(home, read_classes(home / CLASSES))
    parts = _parts(home)
    folders = _class_folders(home, parts)
    classnames = _classnames(home / "classnames.txt", folders)
    return _dataset(
        home,
        classnames,
        lambda: _listing(home, parts, folders, classnames),
        skipped=lambda: other_files(home, {at / name for at in parts.values() for name in folders}),
    )


def unlabelled_dataset(home: Path, classes: Classes) -> Dataset:
    """The dataset of a folder without class folders, see `air_core.datasets.unlabelled`."""
    return _dataset(
        home,
        classes.classnames,
        lambda: unlabelled_listing(home, classes),
        skipped=lambda: other_files(home),
        pool_labels="unknown",
    )


def _dataset(
    home: Path, classnames: tuple[str, ...], rows: Callable[[], Listing], **facts: Any
) -> Dataset:
    return listed(
        lambda root: rows(),
        name=f"{PREFIX}{home}",
        about=f"{home.name}, {len(classnames)} classes",
        classnames=classnames,
        template=_template(home / "template.txt"),
        source=str(home),
        licence=OWNERS,
        **facts,
    )


# ---------------------------------------------------------------- duplicates


def check_no_leak(dataset: Dataset, digests: Mapping[Path, str]) -> None:
    """Check that no test image of a folder is also a training or validation image.

    Args:
        digests: of the content of each file. Images in class folders without parts are not
            compared, since `split_seed` chooses their parts.

    Raises:
        ValueError: a file for test equals another one, and this is not permitted.
    """
    if len(set(digests.values())) == len(digests) or permits_duplicates(dataset):
        return
    examples = dataset.load(None)
    assert isinstance(examples.images, ImageFiles)
    part_of = dict(zip(examples.images.files, examples.parts.tolist(), strict=True))
    tests = {digests[file]: file for file, part in part_of.items() if part == "test"}
    pairs = [
        (tests[digests[file]], file)
        for file, part in part_of.items()
        if part != "test" and digests[file] in tests
    ]
    if pairs:
        first = [str(path.relative_to(dataset.source)) for path in pairs[0]]
        raise ValueError(leak_message(dataset, len(pairs), first))


def permits_duplicates(dataset: Dataset) -> bool:
    """Whether the owner of a folder permits test images that are also training images."""
    return Path(dataset.source, PERMIT).is_file()


def leak_message(dataset: Dataset, count: int, first: Sequence[str]) -> str:
    """The error for test images that are also training or validation images."""
    pairs = "1 pair" if count == 1 else f"{count:,} pairs"
    parts = "one in test/ and one in train/ or val/"
    if dataset.pool_labels == "unknown":
        parts = f"one for test in {LABELS} and one not"
    return (
        f"{dataset.source}: {pairs} of equal images, {parts}, so the test accuracy would be too "
        f"high; the first: {' = '.join(map(repr, first))}; remove one of each pair, or create the "
        f"file {dataset.source}/{PERMIT} to permit them"
    )


# ---------------------------------------------------------------- names


def check_folder(home: Path) -> None:
    """
    Raises:
        ValueError: the path is not a folder.
    """
    if not home.is_dir():
        raise ValueError(f"{PREFIX}{home} does not exist or is not a folder; {WANTED}")


def _parts(home: Path) -> dict[str, Path]:
    """The folder that contains the class folders, by part: train, test and maybe val, or free."""
    inside = _folders(home)
    parts = {part: home / part for part in PARTS if part in inside}
    if not {"train", "test"} <= parts.keys():
        if parts and parts.keys() == set(inside):
            lacking = "train" if "train" not in parts else "test"
            raise ValueError(
                f"{home} has {' and '.join(parts)}, but no {lacking}; add it, or remove the part "
                "folders so that split_seed splits the images"
            )
        return {"free": home}  # a class may be named "train"
    if others := sorted(set(inside) - parts.keys()):
        raise ValueError(
            f"{home} has {some(others)} beside its part folders; allowed are {', '.join(PARTS)}"
        )
    return parts


def _class_folders(home: Path, parts: dict[str, Path]) -> list[str]:
    of = {part: _folders(folder) for part, folder in parts.items()}
    every = sorted({name for names in of.values() for name in names})
    lacking = [
        f"{part}/ has no {some(missing)}"
        for part, names in of.items()
        if (missing := sorted(set(every) - set(names)))
    ]
    if lacking:
        raise ValueError(
            f"{home}: the parts have different classes: {'; '.join(lacking)}; "
            "every class needs a folder in every part"
        )
    if len(every) < 2:
        found = f"only one class, {every[0]!r}" if every else "no class folders"
        raise ValueError(f"{home} has {found}; a classifier needs two or more; {WANTED}")
    return every


def _classnames(file: Path, folders: Sequence[str]) -> tuple[str, ...]:
    given = class_entries(text_lines(file))
    for folder, (_, place) in given.items():
        if folder not in folders:
            raise ValueError(
                f"{place}: no class folder is named {folder!r}; class folders: {some(folders, 9)}"
            )
    names = [
        given.get(name, Said(said(name), f"{file}, class folder {name!r}")) for name in folders
    ]
    check_classnames(names)
    return tuple(name.classname for name in names)


def _template(file: Path) -> str:
    lines = [line for _, line in text_lines(file)]
    if not lines:
        return TEMPLATE
    if len(lines) > 1 or not is_template(lines[0]):
        raise ValueError(
            f"{file}: expected one line with {{}} once, for the class name, and no other brace or "
            f"invisible character, such as {TEMPLATE!r}"
        )
    return lines[0]


def _folders(folder: Path) -> list[str]:
    """
    Raises:
        ValueError: an entry is a broken link, maybe to a class folder.
    """
    entries = [entry for entry in folder.iterdir() if not is_system_folder(entry.name)]
    for entry in entries:
        if entry.is_symlink() and not entry.exists():
            raise ValueError(f"{entry} is a broken link; correct its target, or remove it")
    return sorted(entry.name for entry in entries if entry.is_dir())


# ---------------------------------------------------------------- images


def _listing(
    home: Path, parts: dict[str, Path], folders: Sequence[str], classnames: Sequence[str]
) -> Listing:
    rows = [
        Row(file.relative_to(home).as_posix(), label, part)
        for part, folder in parts.items()
        for label, name in enumerate(folders)
        for file in _images(home, folder / name)
    ]
    counts = Counter(row.label for row in rows)
    few = [name for label, name in enumerate(folders) if counts[label] < FEWEST]
    if few and "free" in parts:
        raise ValueError(
            f"{home}: fewer than {FEWEST} images of {some(few)}; without train/ and test/ each "
            f"class needs {FEWEST}, so that the pool has two or more of each"
        )
    rows = with_validation(rows, "free" if "free" in parts else "train")
    beside = [home / name for name in ("classnames.txt", "template.txt")]
    return listing(home, rows, classnames, beside=[file for file in beside if file.is_file()])


def _images(home: Path, folder: Path) -> list[Path]:
    found = images_in(folder)
    if not found:
        raise ValueError(
            f"{home}: no image in {folder.relative_to(home)}/; images end in {READ_TEXT} and must "
            f"be directly in the class folder{skipped_clause(folder)}"
        )
    return found

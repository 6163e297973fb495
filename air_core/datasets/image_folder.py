"""`folder:<path>`: a dataset of your images in class folders.

    <path>/train/<class>/*.jpg     fixed parts: train/ and test/, optionally val/; without val/ a
    <path>/test/<class>/*.jpg      tenth of train is for validation

    <path>/<class>/*.jpg           no parts: a tenth of each class is for validation, the same for
                                   every split, and `split_seed` splits the rest

    <path>/classnames.txt          optional: lines `folder = class name`; the class name of any
                                   other folder is its name, with spaces for underscores
    <path>/template.txt            optional: one line such as `a satellite photo of a {}`

Classes are sorted by folder name. Files that are not images are ignored.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from air_core.datasets.class_folders import SUFFIXES, images_in
from air_core.datasets.dataset import (
    TEMPLATE,
    Dataset,
    Listing,
    Row,
    first_hidden,
    is_template,
    listing,
    some,
)
from air_core.datasets.split_files import VAL_SHARE, held_out, with_validation
from air_core.tokens import as_read

PREFIX = "folder:"
OWNERS = "the owner's"  # licence
PARTS = ("train", "val", "test")
WANTED = (
    "expected <class>/<image>, or train/<class>/<image> and test/<class>/<image> (val/ is optional)"
)
FEWEST = 4  # images per class without fixed parts, so that every part gets some


@dataclass(frozen=True)
class Tree:
    """The parts of a folder dataset, each with the folder that contains its class folders."""

    home: Path
    parts: dict[str, Path]  # train, test and optionally val; or only free
    folders: tuple[str, ...]  # of the classes, sorted
    classnames: tuple[str, ...]


def folder_dataset(name: str) -> Dataset:
    """The dataset of `folder:<path>`; lists folders and opens no image.

    Raises:
        ValueError: it is not an image folder, or its parts have different classes.
    """
    home = Path(name.removeprefix(PREFIX)).expanduser().absolute()
    tree = _tree(home)
    return Dataset(
        name=f"{PREFIX}{home}",
        about=f"{home.name}, {len(tree.classnames)} classes",
        classnames=tree.classnames,
        template=_template(home / "template.txt"),
        recipe=1,
        source=str(home),
        licence=OWNERS,
        files=lambda root: _rows(tree).files,
        load=lambda root: _rows(tree).examples(),
        split=" and ".join(tree.parts) if "free" not in tree.parts else "split_seed",
    )


# ---------------------------------------------------------------- names


def _tree(home: Path) -> Tree:
    if not home.is_dir():
        raise ValueError(f"{PREFIX}{home} does not exist or is not a folder; {WANTED}")
    inside = _folders(home)
    if not inside:
        raise ValueError(f"{home} is not an image folder: it contains no folders; {WANTED}")
    parts = {part: home / part for part in PARTS if part in inside}
    if not {"train", "test"} <= parts.keys():
        if parts.keys() == set(inside):
            lacking = "train" if "train" not in parts else "test"
            raise ValueError(
                f"{home} has {' and '.join(parts)}, but no {lacking}; add it, or remove the part "
                "folders so that split_seed splits the images"
            )
        parts = {"free": home}  # a class may be named "train"
    elif others := sorted(set(inside) - parts.keys()):
        raise ValueError(
            f"{home} has {some(others)} beside its part folders; allowed are {', '.join(PARTS)}"
        )
    folders = _classes(home, parts)
    return Tree(home, parts, folders, _classnames(home / "classnames.txt", folders))


def _classes(home: Path, parts: dict[str, Path]) -> tuple[str, ...]:
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
        found = f"only one class, {every[0]!r}" if every else "no class folders in its parts"
        raise ValueError(f"{home} has {found}; a classifier needs two or more; {WANTED}")
    return tuple(every)


def _classnames(file: Path, folders: tuple[str, ...]) -> tuple[str, ...]:
    given: dict[str, str] = {}
    for number, line in enumerate(_lines(file), start=1):
        if not line or line.startswith("#"):
            continue
        folder, equals, name = (text.strip() for text in line.partition("="))
        if not equals or not name or "/" in name or folder in given:
            raise ValueError(
                f"{file}:{number}: {line!r} is not allowed; expected one line per folder, "
                "`folder = class name`, without / in the name"
            )
        if folder not in folders:
            raise ValueError(
                f"{file}:{number}: no class folder is named {folder!r}; class folders: "
                f"{some(folders, 9)}"
            )
        given[folder] = name
    names = tuple(given.get(folder, folder.replace("_", " ")) for folder in folders)
    _check_readable(file, names)
    return names


def _check_readable(file: Path, names: tuple[str, ...]) -> None:
    """Check that class names have no invisible characters and that they differ for CLIP.

    Raises:
        ValueError: a name is invisible or empty to CLIP, or two are the same.
    """
    known: dict[str, str] = {}
    for name in names:
        hidden = first_hidden(name)
        if hidden is not None:
            raise ValueError(
                f"{file.parent}: the class name {name!r} has an invisible character, "
                f"{hidden!r}; rename its folder, or give it another name in {file.name}"
            )
        read = as_read(name)
        if not read:
            raise ValueError(
                f"{file.parent}: the class name {name!r} is empty to CLIP; give it another name "
                f"in {file.name}"
            )
        if read in known:
            both = "" if known[read] == name else f" and {known[read]!r}, which CLIP reads alike"
            raise ValueError(
                f"{file.parent}: two classes are named {name!r}{both}; rename one in {file.name}"
            )
        known[read] = name


def _template(file: Path) -> str:
    lines = [line for line in _lines(file) if line]
    if not lines:
        return TEMPLATE
    if len(lines) > 1 or not is_template(lines[0]):
        raise ValueError(
            f"{file}: expected one line with {{}} once, for the class name, and no other "
            f"brace or invisible character, such as {TEMPLATE!r}; found {lines[0]!r}"
            + (" and more lines" if len(lines) > 1 else "")
        )
    return lines[0]


def _lines(file: Path) -> list[str]:
    # Editors on Windows write a byte order mark, which utf-8-sig removes.
    try:
        text = file.read_text(encoding="utf-8-sig") if file.is_file() else ""
    except UnicodeDecodeError as problem:
        raise ValueError(f"{file} is not UTF-8 text; save it as UTF-8") from problem
    return [line.strip() for line in text.splitlines()]


def _folders(folder: Path) -> list[str]:
    # Archives made on macOS contain a folder __MACOSX.
    return sorted(
        inside.name
        for inside in folder.iterdir()
        if inside.is_dir() and not inside.name.startswith(".") and inside.name != "__MACOSX"
    )


# ---------------------------------------------------------------- images


def _rows(tree: Tree) -> Listing:
    rows = [
        Row(file.relative_to(tree.home).as_posix(), label, part)
        for part, folder in tree.parts.items()
        for label, name in enumerate(tree.folders)
        for file in _images(tree.home, folder / name)
    ]
    rows = _with_free(tree, rows) if "free" in tree.parts else with_validation(rows)
    beside = [tree.home / name for name in ("classnames.txt", "template.txt")]
    return listing(
        f"{PREFIX}{tree.home}",
        tree.home,
        rows,
        tree.classnames,
        beside=[file for file in beside if file.is_file()],
    )


def _images(home: Path, folder: Path) -> list[Path]:
    found = images_in(folder)
    if not found:
        others = sorted(inside.name for inside in folder.iterdir())
        raise ValueError(
            f"{home}: no image in {folder.relative_to(home)}/, which contains "
            f"{some(others) if others else 'nothing'}; images end in {', '.join(sorted(SUFFIXES))} "
            "and must be directly in the class folder"
        )
    return found


def _with_free(tree: Tree, rows: list[Row]) -> list[Row]:
    labels = [row.label for row in rows]
    counts = Counter(labels)
    few = [name for label, name in enumerate(tree.folders) if counts[label] < FEWEST]
    if few:
        raise ValueError(
            f"{tree.home}: fewer than {FEWEST} images of {some(few)}; without train/ and test/ "
            f"each class needs {FEWEST}, so that every part gets some"
        )
    chosen = held_out([row.path for row in rows], labels, VAL_SHARE)
    return [row._replace(part="val") if row.path in chosen else row for row in rows]

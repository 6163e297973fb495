"""Broken folders of images: `check` and `plan` refuse them, or name what they skip.

To test another text file of a folder, write a name and such as `free/classnames.txt = "cat = x"`
into `tests/golden/messages/folder_texts.txt`; `make golden` adds the message.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_image

from tests.helpers.dataset_trees import draw, make_tree
from tests.helpers.golden import check_golden_cases, check_sweeps
from tests.helpers.sweeps import write_sweep

Harm = Callable[[Path], object]  # given the folder, of a published dataset its data root


def free(home: Path) -> None:
    for name in ("cat", "dog"):
        for i in range(5):
            draw(home / name / f"{i}.png", size=32)


def parted(home: Path) -> None:
    for part, count in (("train", 4), ("test", 2)):
        for name in ("cat", "dog"):
            for i in range(count):
                draw(home / part / name / f"{i}.png", size=32)


def photos(home: Path) -> None:
    for i in range(8):
        draw(home / f"{i}.png")
    written("classes.txt", "cat\nsea_lion = a sea lion\n")(home)


MAKE: dict[str, Callable[[Path], None]] = {"free": free, "parted": parted, "photos": photos}


def written(path: str, content: bytes | str) -> Harm:
    data = content.encode() if isinstance(content, str) else content
    return lambda home: (home / path).write_bytes(data)


def drawn(*paths: str) -> Harm:
    return lambda home: [draw(home / path) for path in paths]


def moved(path: str, to: str) -> Harm:
    return lambda home: (home / path).rename(home / to)


def copied(path: str, to: str, *more: str) -> Harm:
    return lambda home: (
        shutil.copy(home / path, home / to),
        [(home / other).touch() for other in more],
    )


def encoded(kind: str) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, kind)
    return file.getvalue()


def photographed(home: Path) -> None:
    image = Image.fromarray(load_sample_image("china.jpg"))  # 640 x 427
    image.save(home / "cat/photo.png")
    image.resize((320, 213)).save(home / "dog/photo.jpg", quality=80)


def saved_again(home: Path) -> None:
    """Files that differ are equal only once they are decoded, which a plan does not do."""
    with Image.open(home / "train/cat/0.png") as image:
        image.save(home / "test/cat/z.bmp")


# What makes a folder, what is done to it.
CASES: dict[str, tuple[str, Harm]] = {
    "a pipe": ("free", lambda home: os.mkfifo(home / "cat/x.png")),
    "a link to nothing": ("free", lambda home: (home / "fox").symlink_to("nowhere")),
    "a class without images": ("free", lambda home: (home / "fox").mkdir()),
    "only videos in a class": ("free", lambda h: [f.rename(f"{f}.mov") for f in h.glob("cat/*")]),
    "no folder": ("free", lambda home: [shutil.rmtree(f) for f in home.iterdir()]),
    "a file": ("free", lambda home: (shutil.rmtree(home), home.touch())),
    "one class": ("free", lambda home: shutil.rmtree(home / "dog")),
    "two classes in different case": ("free", drawn(*(f"Cat/{i}.png" for i in range(5)))),
    "too few images": ("free", lambda home: (home / "dog/0.png").unlink()),
    "a name in Latin-1": ("free", moved("cat/0.png", os.fsdecode(b"cat/caf\xe9.png"))),
    "class names in Latin-1": ("free", written("classnames.txt", b"cat = \xe9")),
    "other classes in test": ("parted", moved("test/dog", "test/fox")),
    "no test": ("parted", moved("test", "val")),
    "no train": ("parted", moved("train", "val")),
    "a folder beside parts": ("parted", drawn("valid/cat/0.jpg")),
    "equal files in train and test": ("parted", copied("train/cat/0.png", "test/cat/z.png")),
    "equal files in val and test": ("parted", lambda h: shutil.copytree(h / "test", h / "val")),
    "equal pixels in train and test": ("parted", saved_again),
    "permitted copies": ("parted", copied("train/cat/0.png", "test/cat/z.png", "allow_duplicates")),
    "a copy without a label": ("photos", lambda home: (copied("0.png", "a.png")(home), ONE(home))),
    "all labelled": ("photos", written("labels.csv", "image,class\n0.png,cat\n1.png,cat\n")),
    "no images": ("photos", lambda home: [file.unlink() for file in home.glob("*.png")]),
    "an empty image": ("free", written("cat/0.png", b"")),
    "a pointer of Git LFS": ("free", written("cat/0.png", b"version https://git-lfs.github.com/")),
    "an image that is cut off": ("free", written("cat/0.png", encoded("PNG")[:-600])),
    "an image that is too large": ("free", written("cat/0.png", b"P6 60000 60000 255\n")),
    "files that are skipped": (
        "free",
        lambda home: (drawn("cat/more/deep/1.png")(home), written("cat/IMG_0001", "x")(home)),
    ),
    "an image above classes": ("parted", drawn("test/1.png")),
    "a copy in another class": ("free", copied("cat/0.png", "dog/z.png")),
    "a smaller copy in another class": ("free", photographed),
    "CoOp's list of numbers": (
        "eurosat",
        written("eurosat/split_zhou_EuroSAT.json", '{"train": [1]}'),
    ),
    "a damaged .mat file": ("flowers102", written("flowers102/flowers-102/setid.mat", "x")),
    "birds without labels": ("cub", written("cub/CUB_200_2011/image_class_labels.txt", "1 1\n")),
    "an image in train and test": (
        "eurosat",
        lambda r: [written(f"eurosat/{p}.txt", "River/River_2.jpg")(r) for p in ("train", "test")],
    ),
    "a list with an unknown class": ("eurosat", written("eurosat/test.txt", "Rever/River_2.jpg")),
    "a class folder is missing": ("eurosat", moved("eurosat/2750/Forest", "Forest")),
    "a class folder is empty": (
        "eurosat",
        lambda root: [file.unlink() for file in root.glob("eurosat/2750/Forest/*")],
    ),
    "a published image is missing": ("dtd", moved("dtd/dtd/images/lined/lined_0000.jpg", "a.jpg")),
}
ONE = written("labels.csv", "image,class\n0.png,cat\n")


def test_what_is_broken_skipped_or_repeated_is_named_before_anything_starts(tmp_path, command):
    found = {}
    for number, (case, (start, harm)) in enumerate(CASES.items()):
        folder = tmp_path / str(number)
        home, data, root = folder / "data", start, ["--data-root", folder / "data"]
        if start in MAKE:
            MAKE[start](home)
            data, root = f"folder:{home}", []
        else:
            make_tree(start, home)
        harm(home)
        sweep = write_sweep(folder, "x", f"fixed: {{method: zero_shot, dataset: '{data}'}}\n")
        code, out, err = command("check", data, *root)
        planned = command("plan", sweep, "--store", folder / "runs", *root)
        lines = [line for line in f"{out}{err}".splitlines() if not line.startswith(HEAD)]
        text = "\n".join([f"check: exit code {code}", *lines, f"plan: exit code {planned[0]}"])
        found[case] = f"{text}\n{planned[2]}".rstrip().replace(str(folder), "<folder>")
        assert not (folder / "runs").exists(), case
    check_golden_cases("messages/broken_folders.txt", found)


HEAD = ("folder:", "classes ", "template ")  # lines of `check` about any folder


def test_a_wrong_text_file_of_a_folder_is_an_error_with_its_place(tmp_path, command):
    numbers = itertools.count()

    def message(case: str) -> str:
        place, _, text = case.partition(" = ")
        start, _, file = place.partition("/")
        home = tmp_path / str(next(numbers))
        MAKE[start](home)
        (home / file).write_text(json.loads(text), encoding="utf-8")
        code, out, err = command("check", f"folder:{home}")
        assert (code, out) == (2, ""), case
        return err.rstrip().replace(str(home), "<folder>")

    check_sweeps("messages/folder_texts.txt", message, before="")

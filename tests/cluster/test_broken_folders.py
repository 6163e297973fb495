"""Broken folders of images: `check`, `plan` and `run` refuse them, or name what they skip."""

from __future__ import annotations

import io
import os
import re
import shutil
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_image

from tests.helpers.dataset_trees import draw, make_tree, png
from tests.helpers.sweeps import write_sweep

Harm = Callable[[Path], object]  # given the data root for published datasets, else the folder


def free(home: Path) -> None:
    for name in ("cat", "dog"):
        for i in range(5):
            draw(home / name / f"{i}.png", size=32)


def parted(home: Path) -> None:
    for part, count in (("train", 4), ("test", 2)):
        for name in ("cat", "dog"):
            for i in range(count):
                draw(home / part / name / f"{i}.png", size=32)


MAKE: dict[str, Callable[[Path], None]] = {"free": free, "parted": parted}


def written(path: str, content: bytes | str) -> Harm:
    data = content.encode() if isinstance(content, str) else content
    return lambda home: (home / path).write_bytes(data)


def linked(path: str, target: str) -> Harm:
    return lambda home: (home / path).symlink_to(target)


def renamed_in_latin1(path: str, name: bytes) -> Harm:
    return lambda home: os.rename(home / path, os.fsencode((home / path).parent) + b"/" + name)


PAIRS = "of equal images, one in test/ and one in train/ or val/.*allow_duplicates to permit"


def cut(home: Path) -> None:
    (home / "cat/0.png").write_bytes((home / "cat/0.png").read_bytes()[:-40])


UNREAD = "1 of 10 images cannot be read, at most 0 are allowed; .*0.png cannot be read: "

# Refused before anything starts, with the file and a remedy.
REFUSED: list[tuple[str, str, Harm, str]] = [
    ("pipe", "free", lambda h: os.mkfifo(h / "cat/x.png"), "x.png has the name of an image but is"),
    ("dangling class", "free", linked("fox", "nowhere"), "fox is a broken link; correct"),
    ("class that is its parent", "free", linked("fox", "."), "no image in fox/, which contains"),
    ("cut image", "free", cut, f"{UNREAD}.*; remove or replace them"),
    ("empty class", "free", lambda h: (h / "fox").mkdir(), "no image in fox/, which contains noth"),
    (
        "only videos",
        "free",
        lambda h: [file.rename(file.with_suffix(".mov")) for file in (h / "cat").iterdir()],
        "no image in cat/, which contains '0.mov'.*; skipped: 5 .mov",
    ),
    ("nothing", "free", lambda h: [shutil.rmtree(f) for f in h.iterdir()], "contains no folders"),
    ("home is a file", "free", lambda h: (shutil.rmtree(h), h.touch()), "unpack an archive"),
    ("classnames is a loop", "free", linked("classnames.txt", "classnames.txt"), "a broken link"),
    ("class in latin1", "free", renamed_in_latin1("cat", b"caf\xe9"), r"caf\\xe9: this name is no"),
    (
        "image in latin1",
        "free",
        renamed_in_latin1("cat/0.png", b"caf\xe9.png"),
        r"cat/caf\\xe9.png: this name is not UTF-8; rename it",
    ),
    ("classnames in latin1", "free", written("classnames.txt", b"cat = \xe9"), "txt is not UTF-8"),
    (
        "equal files in train and test",
        "parted",
        lambda h: shutil.copy(h / "train/cat/0.png", h / "test/cat/z.png"),
        f"1 pair {PAIRS}",
    ),
    (
        "a test image under another class of val",
        "parted",
        lambda h: (
            shutil.copytree(h / "test", h / "val"),
            [f.unlink() for f in h.glob("val/*/1.png")],
            (h / "val/cat/0.png").rename(h / "val/dog/1.png"),
            draw(h / "val/cat/2.png"),
        ),
        f"2 pairs {PAIRS}",
    ),
    (
        "EuroSAT: JSON of numbers",
        "eurosat",
        written("eurosat/split_zhou_EuroSAT.json", '{"train": [1]}'),
        "split_zhou_EuroSAT.json is no split file; expected JSON such as",
    ),
    (
        "flowers: damaged setid",
        "flowers102",
        written("flowers102/flowers-102/setid.mat", "x"),
        "setid.mat or imagelabels.mat in .* cannot be read .*; get both again",
    ),
    (
        "flowers: label without a class",
        "flowers102",
        lambda root: save_labels(root / "flowers102/flowers-102/imagelabels.mat"),
        "has the label 998, counted from 0, but there are 102 classes",
    ),
    (
        "birds: labels are cut off",
        "cub",
        written("cub/CUB_200_2011/image_class_labels.txt", "1 1\n"),
        "lists in .*/CUB_200_2011 do not match each other: one of them lacks '10'; unpack",
    ),
    (
        "aircraft: no variant",
        "fgvc_aircraft",
        written("fgvc_aircraft/fgvc-aircraft-2013b/data/images_variant_test.txt", "0034956\n"),
        "but '' is none of 100",
    ),
]


def save_labels(file: Path) -> None:
    from scipy.io import savemat

    savemat(file, {"labels": np.full((1, 408), 999)})


def encoded(kind: str) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, kind)
    return file.getvalue()


BLOATED = b"zTXtbomb\0\0" + zlib.compress(bytes(80 * 2**20))
# Files named `cat/0.png` that are no readable image, with the reason that is given.
UNREADABLE: list[tuple[str, bytes, str]] = [
    ("empty", b"", "it is empty"),
    ("LFS pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "not an image"),
    ("cut PNG", encoded("PNG")[:-600], "truncated"),
    ("claimed size", png(60000, 60000), "too large, over 178,956,970 pixels"),
    ("text bomb", png(8, 8, BLOATED), "cannot be read"),
]


def outcomes(
    command, names: Sequence[str], data: str, root: Path | None, folder: Path
) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of `check`, `plan` or `run`."""
    sweep = write_sweep(folder, "broken", f"fixed: {{method: zero_shot, dataset: '{data}'}}\n")
    roots = ["--data-root", root] if root else []
    words = {
        "check": ("check", data, *roots),
        "plan": ("plan", sweep, "--store", folder / "runs", *roots),
        "run": ("run", sweep, "--store", folder / "runs", *roots),
    }
    return [command(*words[name]) for name in names]


@pytest.mark.parametrize(
    ("start", "harm", "message"), [pytest.param(*case, id=name) for name, *case in REFUSED]
)
def test_a_broken_folder_is_refused_with_its_file(start, harm, message, tmp_path, command):
    home = tmp_path / "data"
    if start in MAKE:
        MAKE[start](home)
        data, root = f"folder:{home}", None
    else:
        make_tree(start, home)
        data, root = start, home
    harm(home)
    for code, out, err in outcomes(command, ("check", "plan", "run"), data, root, tmp_path):
        assert code == 2, (out, err)
        assert re.search(message, err), err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("content", "reason"), [pytest.param(*case, id=name) for name, *case in UNREADABLE]
)
def test_a_file_that_is_no_image_is_named_with_a_reason(content, reason, tmp_path, command):
    free(tmp_path)
    (tmp_path / "cat/0.png").write_bytes(content)
    code, out, err = command("check", f"folder:{tmp_path}")
    assert code == 2
    assert "unreadable  1\n" in out
    assert "1 of 10 images cannot be read, at most 0 are allowed" in err
    assert re.search(rf"/cat/0\.png cannot be read: .*{reason}|/cat/0\.png {reason}", err)


def turned(home: Path) -> None:
    with Image.open(home / "cat/0.png") as image:
        ImageOps.mirror(image).save(home / "cat/5.png")


def resized(home: Path) -> None:
    image = Image.fromarray(load_sample_image("china.jpg"))  # a photograph, 640 x 427
    image.save(home / "cat/photo.png")
    image.resize((320, 213)).save(home / "dog/photo.jpg", quality=80)


FREE_PAIR = "split_seed can put one image of a pair into train, one into test"
# Accepted, with what `check` states after the numbers of images.
REPORTED: list[tuple[str, str, Harm, str]] = [
    ("subfolder", "free", lambda h: draw(h / "cat/more/deep/1.png"), "skipped     1 in subfolders"),
    ("no suffix", "free", written("cat/IMG_0001", "x"), "skipped     1 without suffix"),
    ("some raw", "free", written("cat/1.NEF", "x"), "-exec dcraw_emu -w {} +"),
    ("above", "parted", lambda h: draw(h / "test/1.png"), "skipped     1 beside class folders"),
    (
        "copy in another class",
        "free",
        lambda h: shutil.copy(h / "cat/0.png", h / "dog/z.png"),
        "exact       1 pair of images with equal pixels: 1 in two classes, 0 in train and test\n"
        f"            cat/0.png = dog/z.png\n            {FREE_PAIR}",
    ),
    (
        "smaller copy",
        "free",
        resized,
        "near        1 pair of images that look alike: 1 in two classes, 0 in train and test\n"
        "            cat/photo.png ~ dog/photo.jpg\n"
        "            look at them; of equal ones remove one",
    ),
    ("mirrored", "free", turned, "unreadable  0"),
    (
        "permitted copies",
        "parted",
        lambda h: (
            shutil.copy(h / "train/cat/0.png", h / "test/cat/z.png"),
            (h / "allow_duplicates").touch(),
        ),
        "exact       1 pair of images with equal pixels: 0 in two classes, 1 in train and test\n"
        "            test/cat/z.png = train/cat/0.png",
    ),
]


@pytest.mark.parametrize(
    ("start", "harm", "end"), [pytest.param(*case, id=name) for name, *case in REPORTED]
)
def test_what_is_skipped_or_repeated_is_stated(start, harm, end, tmp_path, command):
    home = tmp_path / "data"
    MAKE[start](home)
    harm(home)
    checked, planned = outcomes(command, ("check", "plan"), f"folder:{home}", None, tmp_path)
    assert (checked[0], planned[0]) == (0, 0), (checked, planned)
    assert checked[1].rstrip().endswith(end)


def test_copies_with_equal_pixels_in_train_and_test_are_refused(tmp_path, command):
    """Files that differ are equal only once they are decoded, which a plan does not do."""
    parted(tmp_path)
    with Image.open(tmp_path / "train/cat/0.png") as image:
        image.save(tmp_path / "test/cat/z.bmp")
    code, out, err = command("check", f"folder:{tmp_path}")
    assert code == 2
    assert re.search(f"1 pair {PAIRS}", err)
    assert out.splitlines()[-2:] == [
        "exact       1 pair of images with equal pixels: 0 in two classes, 1 in train and test",
        "            test/cat/z.bmp = train/cat/0.png",
    ]

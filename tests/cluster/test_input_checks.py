"""`airsweep check`; plans refuse incomplete weights."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from zipfile import ZipFile

import pytest

from air_core.datasets import DATASETS
from air_core.datasets.dataset import Counts
from air_core.models.weights import generator_folder, tiny_folder
from orchestrator.cluster.input_checks import check_dataset, check_model
from tests.helpers.dataset_trees import draw, small, small_root
from tests.helpers.sweeps import write_sweep

CLIP = "open_clip_model.safetensors"


def as_published(name: str) -> Counts:
    """Counts of the small dataset, to take the place of the published counts."""
    counts = {part: (small(name).parts == part).sum() for part in ("train", "val", "test", "free")}
    published = DATASETS[name].published.parts
    return Counts({part: int(sum(counts[one] for one in part.split("+"))) for part in published})


@pytest.mark.parametrize("name", DATASETS)
def test_a_dataset_as_published_has_no_difference(name, monkeypatch):
    monkeypatch.setitem(DATASETS, name, replace(DATASETS[name], published=as_published(name)))
    lines, difference = check_dataset(name, small_root(name))
    assert difference is None
    images, classes = len(small(name).labels), len(DATASETS[name].classnames)
    assert lines[0] == f"{name}: {images:,} images of {classes} classes"
    assert "unreadable  0" in lines


def test_missing_images_are_reported_for_their_class():
    difference = "resisc45: class 'airplane' has 10 images, published 700"
    assert check_dataset("resisc45", small_root("resisc45"))[1] == difference


def test_unreadable_images_of_a_published_dataset_are_a_difference(tmp_path, monkeypatch):
    shutil.copytree(small_root("dtd"), tmp_path, dirs_exist_ok=True)
    monkeypatch.setitem(DATASETS, "dtd", replace(DATASETS["dtd"], published=as_published("dtd")))
    for file in sorted((tmp_path / "dtd/dtd/images/lined").iterdir())[:5]:
        file.write_bytes(b"")
    lines, difference = check_dataset("dtd", tmp_path)
    assert lines[4] == "unreadable  5"
    message = "5 of 282 images cannot be read, at most 0 are allowed; the first: "
    assert message in str(difference)


def test_a_few_unreadable_images_of_a_user_s_folder_are_allowed_but_not_many(tmp_path):
    for name in ("cat", "dog"):
        for i in range(100):
            draw(tmp_path / name / f"{i:02}.png", size=4)
    for i, allowed in enumerate((True, True, False)):
        (tmp_path / "dog" / f"{i:02}.png").write_bytes(b"no image")
        lines, difference = check_dataset(f"folder:{tmp_path}", None)
        assert f"unreadable  {i + 1}" in lines
        assert (difference is None) == allowed


def test_check_prints_counts_and_exits_with_the_first_difference(tmp_path, command):
    code, out, err = command("check", "digits")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "digits: 1,797 images of 10 classes",
        "classes     digit zero, digit one, digit two, digit three, digit four and 5 more",
        "template    a photo of a {}",
        "parts       val 180   free 1,617",
        "unreadable  0",
    ]
    code, out, err = command("check", "eurosat", "--data-root", small_root("eurosat"))
    assert code == 2
    assert "parts       train 71   val 10   test 19\n" in out
    assert err.startswith("airsweep: eurosat: train+val has 81 images, published 22,000")
    for name, why in (
        ("cub", f"cub is not in {tmp_path}: looked for"),
        (f"folder:{tmp_path}/nope", "does not exist"),
        ("digitz", "unknown dataset or model 'digitz'; datasets: cub, digits"),
    ):
        code, out, err = command("check", name, "--data-root", tmp_path)
        assert (code, out) == (2, "")
        assert why in err


# ---------------------------------------------------------------- models


def test_the_line_for_the_sweep_file_is_printed(tmp_path, command):
    clip = shutil.copytree(tiny_folder(), tmp_path / "clip")
    sd = shutil.copytree(generator_folder("tiny"), tmp_path / "sd")
    for role, model in (("backbone", clip), ("generator", sd), ("backbone", "tiny")):
        code, out, err = command("check", model)
        assert code == 0, err
        assert f"in the sweep file, under fixed:  {role}: {model}" in out


def test_a_single_weights_file_is_checked_with_its_architecture(tmp_path):
    import open_clip
    from safetensors.torch import save_file

    clip = open_clip.create_model("ViT-B-32", pretrained=None).half()
    save_file(clip.state_dict(), tmp_path / "clip.safetensors")
    del clip  # 300 MB
    model = f"ViT-B-32-quickgelu@{tmp_path / 'clip.safetensors'}"
    assert "complete backbone" in check_model(model)[0]


def test_what_is_no_model_is_refused(tmp_path, command):
    clip = tiny_folder()
    for model, message in (
        (f"ViT-B-32@{clip / CLIP}", f"{CLIP} cannot be loaded as ViT-B-32"),
        (tmp_path, f"for a folder of images, write folder:{tmp_path}"),
        (clip / CLIP, f"write <architecture>@{clip / CLIP}"),
        (tmp_path / "nothing", "does not exist"),
    ):
        code, out, err = command("check", model)
        assert (code, out) == (2, ""), model
        assert message in err


def cut(folder: Path, file: str) -> None:
    data = (folder / file).read_bytes()
    (folder / file).write_bytes(data[:-10])


def emptied(folder: Path, file: str) -> None:
    (folder / file).write_bytes(b"")


def pointer(folder: Path, file: str) -> None:
    (folder / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def renamed(folder: Path, file: str, to: str) -> None:
    (folder / file).rename(folder / to)


UNET = "unet/diffusion_pytorch_model.safetensors"
PICKLE = "unet/diffusion_pytorch_model.bin"
HALF = "unet/diffusion_pytorch_model.fp16.safetensors"


def zipped(folder: Path) -> None:
    shutil.rmtree(folder)
    with ZipFile(folder, "w") as archive:
        archive.writestr("model_index.json", "{}")


def sharded(folder: Path, index: str) -> None:
    (folder / UNET).unlink()
    (folder / f"{UNET}.index.json").write_text(index)


def piped(folder: Path, file: str) -> None:
    (folder / file).unlink()
    os.mkfifo(folder / file)


def pickled(folder: Path, size: int) -> None:
    """Replace the weights by an archive as of torch.save."""
    (folder / CLIP).unlink()
    file = folder / "open_clip_pytorch_model.bin"
    with ZipFile(file, "w") as archive:
        archive.writestr("model/data.pkl", b"pickled")
    file.write_bytes(file.read_bytes()[:size])


TOKENIZER = "tokenizer/tokenizer.json"


@pytest.mark.parametrize(
    ("role", "harm", "arguments", "message"),
    [
        ("generator", renamed, ("vae", "other"), "it has no folder vae"),
        ("generator", cut, (UNET,), f"{UNET} cannot be read: .*download or copy it again"),
        ("generator", pointer, (UNET,), f"{UNET} cannot be read: .*header"),
        ("generator", piped, (UNET,), "unet has no diffusion_pytorch_model.safetensors"),
        ("generator", renamed, (UNET, PICKLE), "other weights .*pytorch_model.bin.* pickles"),
        ("generator", renamed, (UNET, HALF), "other weights .*fp16.safetensors.* variants"),
        ("generator", sharded, ('{"weight_map": {"a": 3}}',), "unet has no 3;"),
        ("generator", cut, ("vae/config.json",), "vae/config.json cannot be read"),
        ("generator", renamed, (TOKENIZER, "tokenizer/a"), "it has no vocabulary"),
        ("backbone", zipped, (), "model is a file; unpack an archive first|model is not a model"),
        ("backbone", cut, (CLIP,), f"{CLIP} cannot be read: .*download or copy it again"),
        ("backbone", piped, (CLIP,), f"{CLIP} is missing, or is no file but a broken link"),
        ("backbone", renamed, (CLIP, "other"), "contains no weights"),
        ("backbone", emptied, ("merges.txt.gz",), "merges.txt.gz is empty"),
        ("backbone", pickled, (-30,), "model.bin cannot be read: File is not a zip file"),
    ],
)
def test_check_and_plan_refuse_a_damaged_model(role, harm, arguments, message, tmp_path, command):
    source = tiny_folder() if role == "backbone" else generator_folder("tiny")
    folder = Path(shutil.copytree(source, tmp_path / "model"))
    harm(folder, *arguments)
    sweep = write_sweep(tmp_path, "half", f"fixed: {{method: air, {role}: {folder}}}\n")
    plan = ("plan", sweep, "--store", tmp_path / "runs")
    for words in (("check", folder), plan):
        code, out, err = command(*words)
        assert (code, out) == (2, ""), words
        assert re.search(message, err), err

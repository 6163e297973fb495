"""`airsweep data stage` and `models stage`: whole and checked at its place, or not there at all."""

from __future__ import annotations

import io
import json
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

from air_core.backbone.loading import load_backbone
from air_core.datasets import DATASETS
from air_core.datasets.published import ARCHIVES, PUBLISHED
from air_core.diffusion.pipeline import PipelineGenerator
from air_core.specs import GenerationSettings
from air_core.weights import generator_folder, tiny_folder
from orchestrator import presets
from orchestrator.datacheck import check
from orchestrator.resolve import Resolver
from orchestrator.stages import build_features
from orchestrator.staging import stage_dataset, stage_model
from orchestrator.store import ArtifactStore
from orchestrator.trial import run_trial
from orchestrator.unpacking import Unsafe, checksum, open_source
from orchestrator.workshop import Workshop
from tests.air_core.dataset_trees import MAKERS, draw, small_root
from tests.disks import small_disk
from tests.orchestrator.test_datacheck import as_published
from tests.sweeps import airsweep, environment, write_sweep

TREES = [name for name, maker in MAKERS.items() if maker is not None]
COMPRESSION = {".tar": "w", ".tar.gz": "w:gz", ".tgz": "w:gz", ".tar.xz": "w:xz"}


@pytest.fixture
def as_small(monkeypatch):
    """The small trees count as published."""
    for name in TREES:
        monkeypatch.setitem(PUBLISHED, name, as_published(name))
        monkeypatch.setitem(ARCHIVES, name, {})


def packed(folder: Path, file: Path) -> Path:
    """An archive of what a folder holds."""
    if file.suffix == ".zip":
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(folder.rglob("*")):
                archive.write(path, path.relative_to(folder))
        return file
    suffix = next(suffix for suffix in COMPRESSION if file.name.endswith(suffix))
    with tarfile.open(file, COMPRESSION[suffix]) as archive:
        archive.add(folder, ".")
    return file


def leaves(folder: Path, each: int = 5) -> Path:
    """A folder of one's own images."""
    for name in ("oak", "ash"):
        for i in range(each):
            draw(folder / name / f"{i:04}.png", size=4)
    return folder


def below(folder: Path) -> set[str]:
    """What lies there, locks apart."""
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if not path.name.endswith(".lock")
    }


# ---------------------------------------------------------------- datasets


@pytest.mark.parametrize(
    ("name", "ending"),
    list(zip(TREES, (".tgz", ".tar.gz", ".tar", ".zip", ".zip", ".tar.xz", ".tgz"), strict=True)),
)
def test_a_published_archive_is_unpacked_where_the_dataset_is_looked_for(
    name, ending, tmp_path, as_small
):
    archive = packed(small_root(name) / name, tmp_path / f"downloaded{ending}")
    found = stage_dataset(name, [archive], tmp_path / "data")
    assert not found.found
    assert found.place == tmp_path / "data" / name
    assert check(name, tmp_path / "data").difference is None
    here = Resolver(tmp_path / "a.json", tmp_path / "data").dataset(DATASETS[name])
    there = Resolver(tmp_path / "b.json", small_root(name)).dataset(DATASETS[name])
    assert here == there  # and so keys are the same
    assert below(tmp_path / "data") - {f"{name}.staged.json"} == {
        name,
        *(f"{name}/{one}" for one in below(small_root(name) / name)),
    }


def test_an_archive_and_the_lists_beside_it_come_together(tmp_path, as_small):
    home = small_root("flowers102") / "flowers102/flowers-102"
    shutil.copytree(home / "jpg", tmp_path / "pictures/jpg")
    archive = packed(tmp_path / "pictures", tmp_path / "102flowers.tgz")
    lists = [home / "imagelabels.mat", home / "setid.mat"]
    stage_dataset("flowers102", [archive, *lists], tmp_path / "data")
    assert check("flowers102", tmp_path / "data").difference is None


@pytest.mark.parametrize("given", ["", "cub", "cub/CUB_200_2011"])
def test_an_unpacked_folder_is_copied_from_whichever_level_is_given(given, tmp_path, as_small):
    shutil.copytree(small_root("cub"), tmp_path / "old")
    leaves(tmp_path / "old/another dataset")
    stage_dataset("cub", [tmp_path / "old" / given], tmp_path / "data")
    assert check("cub", tmp_path / "data").difference is None
    assert not list((tmp_path / "data").rglob("another*"))


def test_another_dataset_than_the_published_one_is_not_put_there(tmp_path, command):
    archive = packed(small_root("dtd") / "dtd", tmp_path / "dtd.tgz")
    code, out, err = command("data", "stage", "dtd", "--from", archive, "--to", tmp_path / "data")
    assert (code, out) == (2, "")
    assert "dtd: class 'banded' has 6 images, published 120; nothing was staged" in err
    assert below(tmp_path / "data") == set()


def test_what_is_there_is_found_again_without_its_archive_and_a_changed_file_is_named(
    tmp_path, command
):
    root = tmp_path / "data"
    words = ("data", "stage", f"folder:{leaves(tmp_path / 'leaves')}", "--to", root)
    code, out, _ = command(*words)
    assert code == 0
    assert "10 files" in out
    assert f"dataset: folder:{root / 'leaves'}" in out
    shutil.rmtree(tmp_path / "leaves")
    written = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    code, out, _ = command(*words, "--json")
    found = json.loads(out)
    assert (code, found["found"], found["count"]) == (0, True, 10)
    assert found["use"] == {"dataset": f"folder:{root / 'leaves'}"}
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == written
    assert command(*words, "--verify")[0] == 0
    file = root / "leaves/oak/0001.png"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + b"!")
    assert command(*words)[0] == 0  # of the same size
    code, _, err = command(*words, "--verify")
    assert code == 2
    assert "oak/0001.png has other bytes" in err
    file.write_bytes(data[:-1])
    code, _, err = command(*words)
    assert code == 2
    assert "oak/0001.png has" in err
    file.write_bytes(data)
    (root / "leaves/ash/more.png").write_bytes(data)
    assert "ash/more.png has come to it" in command(*words)[2]


def test_a_manifest_says_what_it_is_made_of_and_by_whom_and_is_sealed(
    tmp_path, monkeypatch, as_small, command
):
    monkeypatch.setenv("AIRSWEEP_USER", "mina")
    archive = packed(small_root("cub") / "cub", tmp_path / "CUB_200_2011.tgz")
    root = tmp_path / "data"
    stage_dataset("cub", [archive], root)
    manifest = root / "cub.staged.json"
    known = json.loads(manifest.read_text())
    assert (known["kind"], known["name"], known["user"]) == ("dataset", "cub", "mina")
    [source] = known["sources"]
    assert source["file"] == "CUB_200_2011.tgz"
    assert source["sha256"] == checksum(archive, "sha256")
    assert known["bytes"] == sum(f.stat().st_size for f in (root / "cub").rglob("*") if f.is_file())
    manifest.write_text(manifest.read_text().replace("mina", "tom"))
    code, _, err = command("data", "stage", "cub", "--to", root)
    assert code == 2
    assert "not as it was written" in err


def test_what_somebody_unpacked_there_by_hand_is_left_alone(tmp_path, command):
    leaves(tmp_path / "data/leaves")
    before = below(tmp_path / "data")
    words = ("data", "stage", f"folder:{leaves(tmp_path / 'leaves')}", "--to", tmp_path / "data")
    code, _, err = command(*words)
    assert code == 2
    assert "was not staged" in err
    assert below(tmp_path / "data") == before


def test_others_may_read_what_was_staged_whatever_the_archive_says(tmp_path):
    leaves(tmp_path / "leaves")
    (tmp_path / "leaves/oak/0001.png").chmod(0o600)
    (tmp_path / "leaves/oak").chmod(0o700)
    old = os.umask(0o077)
    try:
        found = stage_dataset(f"folder:{tmp_path / 'leaves'}", [], tmp_path / "data")
    finally:
        os.umask(old)
    modes = {path.is_dir(): stat.S_IMODE(path.stat().st_mode) for path in found.place.rglob("*")}
    assert modes == {True: 0o755, False: 0o644}


def test_digits_and_names_that_nobody_knows_are_told(tmp_path, command):
    for name, why in (("digits", "there is nothing to stage"), ("digitz", "unknown dataset")):
        code, _, err = command("data", "stage", name, "--to", tmp_path)
        assert code == 2
        assert why in err
    code, _, err = command("data", "stage", "cub", "--to", tmp_path)
    assert code == 2
    assert "give what it is made of with --from" in err


# ---------------------------------------------------------------- checksums, damage


def test_a_checksum_that_does_not_fit_refuses_its_archive(tmp_path, as_small, command):
    archive = packed(small_root("cub") / "cub", tmp_path / "cub.tgz")
    words = ("data", "stage", "cub", "--from", archive, "--to", tmp_path / "data", "--checksum")
    code, _, err = command(*words, "sha256:" + "0" * 64)
    assert code == 2
    assert f"{archive} has sha256 {checksum(archive, 'sha256')}, but --checksum says" in err
    assert "wanted <algorithm>:<hex digits>" in command(*words, "sha256:beef")[2]
    assert below(tmp_path / "data") == set()
    assert command(*words, f"md5:{checksum(archive, 'md5')}")[0] == 0


def test_a_file_of_a_published_name_is_held_against_its_published_checksum(tmp_path, command):
    archive = packed(small_root("dtd") / "dtd", tmp_path / "dtd-r1.0.1.tar.gz")
    code, _, err = command("data", "stage", "dtd", "--from", archive, "--to", tmp_path / "data")
    assert code == 2
    assert "it was published with fff73e5086ae6bdbea199a49dfb8a4c1" in err


@pytest.mark.parametrize("ending", [".zip", ".tgz", ".tar"])
def test_an_archive_that_was_not_downloaded_to_its_end_is_told(ending, tmp_path, as_small):
    archive = packed(small_root("cub") / "cub", tmp_path / f"cub{ending}")
    data = archive.read_bytes()
    for kept in (len(data) // 2, 700):
        archive.write_bytes(data[:kept])
        with pytest.raises(ValueError, match="damaged or was not downloaded to its end"):
            stage_dataset("cub", [archive], tmp_path / "data")
    assert below(tmp_path / "data") == set()


def test_archives_of_kinds_that_are_not_read_are_told(tmp_path):
    (tmp_path / "NWPU-RESISC45.rar").write_bytes(b"Rar!")
    with pytest.raises(ValueError, match="unpack it and give the folder"):
        open_source(tmp_path / "NWPU-RESISC45.rar")


def test_the_same_file_in_two_sources_is_refused(tmp_path, as_small):
    archive = packed(small_root("cub") / "cub", tmp_path / "cub.tgz")
    with pytest.raises(ValueError, match="give one of the two"):
        stage_dataset("cub", [archive, small_root("cub") / "cub"], tmp_path / "data")


# ---------------------------------------------------------------- archives that mean harm


def tar_with(file: Path, *members: tuple[str, bytes, str]) -> Path:
    """A tar of members: name, kind, where a link leads."""
    with tarfile.open(file, "w:gz") as archive:
        for name, kind, target in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            info.size = 4 if kind == tarfile.REGTYPE else 0
            archive.addfile(info, io.BytesIO(b"evil") if info.size else None)
    return file


FILE, LINK, HARD = tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE
HARMFUL = {
    "above": [("ok.txt", FILE, ""), ("images/../../above.txt", FILE, "")],
    "absolute": [("/tmp/absolute.txt", FILE, "")],
    "link_above": [("images", LINK, "../..")],
    "link_absolute": [("images/passwd", LINK, "/etc/passwd")],
    "hard_link": [("images/passwd", HARD, "../../etc/passwd")],
    "device": [("null", tarfile.CHRTYPE, "")],
    "pipe": [("pipe", tarfile.FIFOTYPE, "")],
    # Where a link leads is seen when it is there; then its neighbour is written through it.
    "behind_a_link": [("a", LINK, "b"), ("a/x.txt", FILE, "")],
    "over_a_link": [("a", LINK, "b"), ("a", FILE, "")],
    "links_on_links": [("a", LINK, "."), ("a/b", LINK, "..")],
    "hard_link_behind": [("a", LINK, "b"), ("c", HARD, "a/x")],
    "long": [("/".join(["d" * 200] * 6) + "/x", FILE, "")],
}


@pytest.mark.parametrize("harm", HARMFUL)
def test_a_tar_that_leads_out_of_its_target_is_refused_before_anything_is_written(
    harm, tmp_path, command
):
    archive = tar_with(tmp_path / "cub.tgz", *HARMFUL[harm])
    before = below(tmp_path)
    code, _, err = command(
        "data", "stage", "cub", "--from", archive, "--to", tmp_path / "deep/data"
    )
    assert code == 2
    assert f"{archive}: its member " in err
    assert HARMFUL[harm][-1][0][:80] in err
    assert "nothing of it was unpacked" in err
    assert below(tmp_path) - before == {"deep", "deep/data"}


@pytest.mark.parametrize("harm", ["../above.txt", "/tmp/absolute.txt", "a\\..\\..\\b", "C:\\x"])
def test_a_zip_that_leads_out_of_its_target_is_refused(harm, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("ok.txt", "ok")
        info = zipfile.ZipInfo("x")
        info.filename = harm
        archive.writestr(info, "evil")
    with pytest.raises(Unsafe):
        open_source(tmp_path / "a.zip").members()


def test_links_in_a_zip_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        info = zipfile.ZipInfo("link")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(Unsafe, match="'link' is a link"):
        open_source(tmp_path / "a.zip").members()


@pytest.mark.parametrize("ending", [".zip", ".tar"])
def test_a_name_that_is_a_file_and_a_folder_is_told(ending, tmp_path, command):
    if ending == ".zip":
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            archive.writestr("cub", "x")
            archive.writestr("cub/images", "x")
    else:
        tar_with(tmp_path / "a.tar", ("cub", FILE, ""), ("cub/images", FILE, ""))
    words = ("data", "stage", "cub", "--from", tmp_path / f"a{ending}", "--to", tmp_path / "data")
    code, _, err = command(*words)
    assert code == 2
    assert "one name is a file and a folder" in err


def test_links_within_a_tar_are_unpacked(tmp_path):
    leaves(tmp_path / "leaves")
    (tmp_path / "leaves/oak/again.png").symlink_to("0001.png")
    source = open_source(packed(tmp_path / "leaves", tmp_path / "leaves.tgz"))
    assert len(source.members()) == 10
    (tmp_path / "out").mkdir()
    assert len(list(source.unpack(tmp_path / "out"))) == 10
    same = (tmp_path / "out/oak" / name for name in ("again.png", "0001.png"))
    assert len({file.read_bytes() for file in same}) == 1


def test_pipes_and_circles_of_links_in_a_folder_are_told(tmp_path):
    (leaves(tmp_path / "a") / "circle").symlink_to(tmp_path / "a")
    with pytest.raises(ValueError, match="a circle of links"):
        open_source(tmp_path / "a").members()
    os.mkfifo(leaves(tmp_path / "b") / "oak/pipe")
    with pytest.raises(ValueError, match="pipe is no file"):
        open_source(tmp_path / "b").members()


# ---------------------------------------------------------------- no room, kills, two at once


def staged_in(disk, source: str, *more: str | Path) -> subprocess.CompletedProcess[str]:
    words = ["data", "stage", source, "--to", str(disk.place / "data"), *map(str, more)]
    return subprocess.run(
        [*disk.inside, sys.executable, "-m", "orchestrator", *words],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )


def test_where_there_is_no_room_nothing_is_left_and_it_is_said_how_much_is_needed(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(2**24))
    assert (tmp_path / "bomb.zip").stat().st_size < 2**15
    # 400 files of some bytes: less than what is free, and more, since each takes a page.
    leaves(tmp_path / "leaves", each=200)
    with small_disk(tmp_path / "small", 2**20) as disk:
        done = staged_in(disk, "cub", "--from", tmp_path / "bomb.zip")
        assert done.returncode == 3
        assert "16.0 MiB are needed" in done.stderr
        done = staged_in(disk, f"folder:{tmp_path / 'leaves'}")
        assert done.returncode == 3
        assert "no room below" in done.stderr
        assert below(disk.seen / "data") == set()
        disk.resize(2**23)
        assert staged_in(disk, f"folder:{tmp_path / 'leaves'}").returncode == 0


def started(source: Path, root: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "orchestrator", "data", "stage", f"folder:{source}", "--to", root],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )


def test_one_that_is_killed_leaves_nothing_that_looks_whole_and_the_next_cleans_up(tmp_path):
    leaves(tmp_path / "leaves", each=1500)
    root = tmp_path / "data"
    process = started(tmp_path / "leaves", root)
    while not any(root.glob(".staging-*/leaves/*/*")):
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert not (root / "leaves").exists()
    assert list(root.glob(".staging-*/leaves"))
    done = airsweep("data", "stage", f"folder:{tmp_path / 'leaves'}", "--to", root)
    assert "3,000 files" in done.stdout
    assert {path.name for path in root.iterdir()} == {
        "leaves",
        "leaves.staged.json",
        ".staging-leaves.lock",
    }


def test_one_that_is_killed_before_its_last_step_is_as_if_it_had_not_been(tmp_path, command):
    words = ("data", "stage", f"folder:{leaves(tmp_path / 'leaves')}", "--to", tmp_path / "data")
    assert command(*words)[0] == 0
    shutil.rmtree(tmp_path / "data/leaves")  # the manifest is there before the rename
    code, out, _ = command(*words)
    assert code == 0
    assert "written and checked" in out


def test_of_two_at_once_one_writes_and_the_other_finds_it(tmp_path):
    leaves(tmp_path / "leaves", each=500)
    both = [started(tmp_path / "leaves", tmp_path / "data") for _ in range(2)]
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("written and checked" in out for out in said) == 1
    assert sum("there since" in out for out in said) == 1


# ---------------------------------------------------------------- models


def test_staged_models_are_read_by_a_plan_under_the_keys_of_the_ones_they_came_from(
    tmp_path, command
):
    use = {}
    for name, source in (("clip", tiny_folder()), ("team/sd", generator_folder("tiny"))):
        words = ("models", "stage", name, "--from", source, "--to", tmp_path / "models")
        code, out, err = command(*words, "--json")
        assert code == 0, err
        use |= json.loads(out)["use"]
    assert use == {
        "backbone": str(tmp_path / "models/clip"),
        "generator": str(tmp_path / "models/team/sd"),
    }
    resolver = Resolver(tmp_path / "digests.json", None)
    for role, place in use.items():
        assert resolver.weights(role, place).digest == resolver.weights(role, "tiny").digest
    fixed = "".join(f"  {role}: {place}\n" for role, place in use.items())
    sweep = write_sweep(tmp_path, "staged", f"fixed:\n  method: air\n{fixed}")
    code, out, err = command("plan", sweep, "--store", tmp_path / "runs")
    assert code == 0, err
    assert "to make  features" in out
    assert "images/v" in out


def test_a_trial_reads_a_staged_backbone(tmp_path):
    place = stage_model("clip", tiny_folder(), tmp_path / "models").place
    store = ArtifactStore(tmp_path / "runs")
    flat = {**presets.defaults("zero_shot", {}), "backbone": str(place)}
    trial = Resolver(tmp_path / "digests.json", None).trial(flat)
    build_features(trial.features, Workshop(store))
    assert run_trial(trial, store).metrics["test/accuracy"] > 0.4  # 0.1 is chance


def test_a_weights_file_becomes_a_folder_that_says_how_it_is_built(tmp_path):
    import open_clip
    import torch
    from safetensors.torch import save_file

    file = tmp_path / "vit_base_patch32.safetensors"
    torch.manual_seed(0)
    state = open_clip.create_model("ViT-B-32", pretrained=None).state_dict()
    save_file({n: t.half() if t.is_floating_point() else t for n, t in state.items()}, file)
    place = stage_model("ViT-B-32/openai", file, tmp_path / "models").place
    assert below(place) == {"open_clip_config.json", "open_clip_model.safetensors"}
    staged, named = load_backbone(place), load_backbone(f"ViT-B-32-quickgelu@{file}")
    kinds = {type(module).__name__ for module in staged.model.modules()}
    assert "QuickGELU" in kinds  # as those weights were trained; the architecture alone has none
    pixels = [repr(one.preprocess).translate(str.maketrans("[]", "()")) for one in (staged, named)]
    assert pixels[0] == pixels[1]
    # Another name of the same file is another model.
    plain = stage_model("ViT-B-32", file, tmp_path / "models/other").place
    assert "quick_gelu" not in (plain / "open_clip_config.json").read_text()


def test_weights_that_would_run_code_are_refused(tmp_path):
    import torch

    torch.save({"weights": Path("x")}, tmp_path / "code.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        stage_model("RN50", tmp_path / "code.pt", tmp_path / "models")
    assert below(tmp_path / "models") == set()


def test_a_staged_generator_draws_what_the_one_draws_that_it_came_from(tmp_path):
    found = stage_model("sd", generator_folder("tiny"), tmp_path)
    settings = GenerationSettings(num_inference_steps=2, size=32)
    drawn = [
        PipelineGenerator(folder, settings).generate("three", [0], [0])
        for folder in (generator_folder("tiny"), found.place)
    ]
    assert (drawn[0] == drawn[1]).all()


def test_a_model_is_found_again_and_a_changed_one_is_told(tmp_path, command):
    words = ("models", "stage", "clip", "--to", tmp_path / "models")
    assert command(*words, "--from", tiny_folder())[0] == 0
    code, out, _ = command(*words, "--verify")
    assert code == 0
    assert f"backbone: {tmp_path / 'models/clip'}" in out
    config = tmp_path / "models/clip/open_clip_config.json"
    config.write_text(config.read_text().replace("128", "129"))
    assert command(*words)[0] == 0
    assert "has other bytes" in command(*words, "--verify")[2]


def test_another_model_than_the_name_says_is_refused(tmp_path, command):
    clip, sd = tiny_folder(), generator_folder("tiny")
    for name, source, why in (
        ("ViT-B-32/openai", clip, "embed_dim is 128 there and 512"),
        ("ViT-B-32/opnai", clip, "open_clip knows no weights 'opnai' of ViT-B-32"),
        ("ViT-B-32/openai", clip / "open_clip_model.safetensors", "text_projection is (128, 128)"),
        ("ViT-B-32/openai", sd, "is a diffusers folder"),
        ("tiny", clip / "open_clip_model.safetensors", "<architecture>/<tag>"),
        ("stable-diffusion-v1-5", sd, "cross_attention_dim of its U-Net is 128"),
        ("../clip", clip, "cannot be the name"),
        ("clip", tmp_path, "is no model"),
        ("clip", tmp_path / "nothing", "is not there"),
    ):
        code, out, err = command("models", "stage", name, "--from", source, "--to", tmp_path / "m")
        assert (code, out) == (2, ""), name
        assert why in err
        assert ".staging-" not in err
    assert below(tmp_path / "m") == set()


def without(folder: Path, part: str) -> None:
    shutil.rmtree(folder / part)


def cut(folder: Path, file: str) -> None:
    data = (folder / file).read_bytes()
    (folder / file).write_bytes(data[:-10])


def pointer(folder: Path, file: str) -> None:
    (folder / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def renamed(folder: Path, file: str, to: str) -> None:
    (folder / file).rename(folder / to)


def edited(folder: Path, file: str, old: str, new: str) -> None:
    (folder / file).write_text((folder / file).read_text().replace(old, new))


UNET = "unet/diffusion_pytorch_model.safetensors"
PICKLE = "unet/diffusion_pytorch_model.bin"
HALF = "unet/diffusion_pytorch_model.fp16.safetensors"


@pytest.mark.parametrize(
    ("harm", "arguments", "why"),
    [
        (without, ("vae",), "names vae, and there is no such folder"),
        (cut, (UNET,), "was it fetched to its end"),
        (pointer, (UNET,), "a pointer of Git LFS"),
        (renamed, (UNET, PICKLE), "a pickle"),
        (renamed, (UNET, HALF), "no diffusion_pytorch_model.safetensors"),
        (renamed, ("vae/config.json", "vae/other.json"), "it has none of config.json"),
        (edited, ("model_index.json", '"diffusers"', '"their_code"'), "is of their_code"),
        (edited, ("model_index.json", "}", ""), "model_index.json cannot be read"),
    ],
)
def test_a_diffusers_folder_that_is_not_whole_is_refused(harm, arguments, why, tmp_path):
    shutil.copytree(generator_folder("tiny"), tmp_path / "sd")
    harm(tmp_path / "sd", *arguments)
    with pytest.raises(ValueError, match=why):
        stage_model("sd", tmp_path / "sd", tmp_path / "models")
    assert not list((tmp_path / "models").glob("sd*"))


EVIL = """
open({marker!r}, "w").close()
from transformers import PreTrainedTokenizerFast
class Evil(PreTrainedTokenizerFast): pass
"""


def with_code(source: Path, folder: Path, marker: Path, changes: dict[str, dict]) -> Path:
    """A copy of a model's folder with keys of its JSON files replaced, and `evil.py` beside them.

    Running that file leaves the file `marker`."""
    shutil.copytree(source, folder)
    for name, values in changes.items():
        file = folder / name
        held = json.loads(file.read_text()) if file.exists() else {}
        for key, value in values.items():
            *sections, last = key.split(".")
            section = held
            for one in sections:
                section = section[one]
            section[last] = value
        file.write_text(json.dumps(held))
        (file.parent / "evil.py").write_text(EVIL.format(marker=str(marker)))
    return folder


TRUST = {"trust_remote_code": True}
AUTO_MAP = {"tokenizer_config.json": {"auto_map": {"AutoTokenizer": [None, "evil.Evil"]}}}
HF_TOKENIZER = {"model_cfg.text_cfg.hf_tokenizer_name": "someone/elsewhere"}


@pytest.mark.parametrize(
    ("source", "changes", "why"),
    [
        (
            tiny_folder(),
            {
                "open_clip_config.json": {
                    **HF_TOKENIZER,
                    "model_cfg.text_cfg.tokenizer_kwargs": TRUST,
                },
                **AUTO_MAP,
            },
            "trust_remote_code is no setting",
        ),
        (
            tiny_folder(),
            {"open_clip_config.json": HF_TOKENIZER, **AUTO_MAP},
            "holds no tokenizer that can be read",
        ),
        (
            generator_folder("tiny"),
            {"model_index.json": {"_class_name": ["evil", "Evil"]}},
            "allowed: the name of a pipeline",
        ),
        (
            generator_folder("tiny"),
            {"model_index.json": {"unet": ["diffusers", "AutoModel"]}, "unet/config.json": {}},
            "its unet is a AutoModel, which is no model",
        ),
        (
            generator_folder("tiny"),
            {"text_encoder/config.json": {"auto_map": {"AutoModel": "evil.Evil"}}},
            "has auto_map",
        ),
    ],
)
def test_a_folder_with_code_is_refused_and_the_code_is_not_run(
    source, changes, why, tmp_path, command, monkeypatch
):
    marker = tmp_path / "ran"
    folder = with_code(source, tmp_path / "given", marker, changes)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))  # whoever is asked agrees
    modules = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
    monkeypatch.setattr("sys.path", [*sys.path])
    code, out, err = command("models", "stage", "m", "--from", folder, "--to", tmp_path / "models")
    assert (code, out) == (2, "")
    assert why in err
    assert not marker.exists()
    assert below(tmp_path / "models") == set()


@pytest.mark.parametrize("text", ["{", "[]", '{"model_cfg": []}'])
def test_a_plan_with_a_backbone_whose_configuration_is_damaged_is_refused(text, tmp_path, command):
    folder = Path(shutil.copytree(tiny_folder(), tmp_path / "clip"))
    (folder / "open_clip_config.json").write_text(text)
    sweep = write_sweep(tmp_path, "bad", f"fixed: {{method: zero_shot, backbone: {folder}}}\n")
    code, _, err = command("plan", sweep, "--store", tmp_path / "runs")
    assert code == 2
    assert f"{folder}/open_clip_config.json" in err
    assert "Traceback" not in err


def test_weights_in_the_hubs_cache_are_staged_as_files(tmp_path):
    cache = tmp_path / "models--team--sd"
    shutil.copytree(generator_folder("tiny"), cache / "blobs")
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("0123")
    for file in (path for path in (cache / "blobs").rglob("*") if path.is_file()):
        link = cache / "snapshots/0123" / file.relative_to(cache / "blobs")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
    found = stage_model("sd", cache, tmp_path / "models")
    assert not any(path.is_symlink() for path in found.place.rglob("*"))
    assert (found.place / UNET).is_file()

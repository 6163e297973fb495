"""Contract tests of all datasets in the table, and tests of image files.

The tests create small trees with the layout of the archives; `airsweep check` compares real ones
with the published counts.
"""

from __future__ import annotations

import errno
import gzip
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from air_core.datasets import DATASETS, images
from air_core.datasets.class_folders import SUFFIXES
from air_core.datasets.dataset import Listing, is_template
from air_core.datasets.images import ImageFiles, Unreadable, open_image
from air_core.datasets.places import archive
from air_core.datasets.split_files import PARTS, held_out
from orchestrator.planning import Resolver
from tests.helpers.dataset_trees import EACH, MAKERS, make_tree, small, small_root
from tests.helpers.sweeps import python

EVERY = pytest.mark.parametrize("name", DATASETS)
assert MAKERS.keys() == DATASETS.keys()
OF_FILES = [name for name, maker in MAKERS.items() if maker and name != "fashion_mnist"]


# ---------------------------------------------------------------- every dataset


@EVERY
def test_every_dataset_has_a_complete_description(name):
    dataset = DATASETS[name]
    assert dataset.name == name
    for classname in dataset.classnames:  # plain words that are valid folder names
        assert classname == classname.strip()
        assert not set("/\\_\t") & set(classname)
    assert len(set(dataset.classnames)) == len(dataset.classnames)
    assert is_template(dataset.template)
    assert all((dataset.source, dataset.licence, dataset.published))


@EVERY
def test_every_image_has_a_class_and_a_part_and_every_part_every_class(name):
    examples = small(name)
    assert len(examples.images) == len(examples.labels) == len(examples.parts)
    assert examples.labels.dtype == np.int64
    parts = set(examples.parts.tolist())
    assert {part for key in DATASETS[name].published.parts for part in key.split("+")} <= parts
    # If `split_seed` decides between pool and test (`free`), the source defines no parts.
    assert parts in ({"free", "val"}, {"train", "val", "test"})
    for part in parts:
        classes = np.unique(examples.labels[examples.parts == part])
        assert np.array_equal(classes, np.arange(len(DATASETS[name].classnames)))


@EVERY
def test_loading_the_listed_files_again_gives_the_same_images_in_the_same_order(name, tmp_path):
    first, root = small(name), small_root(name)
    for file in DATASETS[name].files(root) if root else ():
        (tmp_path / file.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, tmp_path / file.relative_to(root))
    again = DATASETS[name].load(root and tmp_path)
    assert np.array_equal(first.labels, again.labels)
    assert np.array_equal(first.parts, again.parts)
    images = first.images
    for i in range(0, len(images), max(1, len(images) // 50)):
        assert images[i].tobytes() == again.images[i].tobytes()
        assert images[i].mode == "RGB"
    assert [image.tobytes() for image in images[2:7:2]] == [images[i].tobytes() for i in (2, 4, 6)]
    assert images[np.int64(-1)].tobytes() == images[len(images) - 1].tobytes()


@EVERY
def test_files_are_listed_once_in_a_fixed_order(name, tmp_path):
    files = DATASETS[name].files(small_root(name))
    assert files == sorted({*files})
    assert files
    assert all(file.is_file() for file in files)
    if name in OF_FILES:  # a file that is two images could be for training and for test
        images = small(name).images
        assert [*images.files] == sorted(images.files)
        planned = Resolver(tmp_path / "digests.json", small_root(name)).dataset(DATASETS[name])
        assert planned.images == len({*images.files}) == len(images)


# ---------------------------------------------------------------- layouts


@pytest.mark.parametrize("name", OF_FILES)
def test_labels_are_those_of_the_source(name, tmp_path):
    expected, dataset = make_tree(name, tmp_path), DATASETS[name]
    examples = dataset.load(tmp_path)
    labels = zip(examples.images.files, examples.labels, strict=True)
    assert {file: dataset.classnames[label] for file, label in labels} == expected


@pytest.mark.parametrize(
    ("name", "inside"),
    [("dtd", "dtd"), ("fgvc_aircraft", "fgvc-aircraft-2013b"), ("eurosat", "2750")],
)
def test_the_root_can_be_the_archives_folder_or_its_parent(name, inside):
    root = small_root(name)
    for folder in (root / name, root / name / inside):
        examples = DATASETS[name].load(folder)
        assert np.array_equal(examples.labels, small(name).labels)
        assert np.array_equal(examples.parts, small(name).parts)


def test_eurosat_is_found_under_its_newer_name_too(tmp_path):
    shutil.copytree(small_root("eurosat") / "eurosat/2750", tmp_path / "EuroSAT_RGB")
    assert len(DATASETS["eurosat"].load(tmp_path).labels) == 10 * EACH


# ---------------------------------------------------------------- splits


def test_held_out_images_are_a_rounded_share_and_the_same_share_of_each_class():
    labels = np.repeat(np.arange(10), [3000] * 5 + [2500] * 4 + [2000]).tolist()
    paths = [f"{c}/{i}" for i, c in enumerate(labels)]
    from air_core.datasets.eurosat import TEST_SHARE

    chosen = held_out(paths, labels, TEST_SHARE)
    assert len(chosen) == 5000
    assert chosen == held_out(paths[::-1], labels[::-1], TEST_SHARE)
    counts = Counter(int(path.split("/")[0]) for path in chosen)
    assert {counts[c] for c in range(5)} <= {555, 556}
    assert {counts[c] for c in range(5, 9)} == {463}  # the largest remainder
    assert counts[9] == 370


def test_a_class_of_two_images_contributes_one_and_a_single_image_is_never_held_out():
    from fractions import Fraction

    chosen = held_out(["a/1", "b/1", "b/2", "c/1", "c/2"], [0, 1, 1, 2, 2], Fraction(1, 10))
    assert sorted(path[0] for path in chosen) == ["b", "c"]


def test_the_parts_of_all_images_never_change():
    """Of EuroSAT, RESISC45 and birds a rule holds images out. A changed digest means that all
    splits change: increase the recipes instead."""
    from hashlib import sha256

    parts = {}
    for name in DIGESTS:
        examples, home = small(name), small_root(name) / name
        rows = [
            f"{file.relative_to(home)} {part}"
            for file, part in zip(examples.images.files, examples.parts.tolist(), strict=True)
        ]
        parts[name] = sha256("\n".join(rows).encode()).hexdigest()[:12]
    assert parts == DIGESTS


DIGESTS = {
    "flowers102": "e6d54230e836",
    "dtd": "12564efa7108",
    "fgvc_aircraft": "907e8b6e7018",
    "eurosat": "3f3929bbbb40",
    "resisc45": "d02f0003876e",
    "cub": "46f420eb1fa3",
}


def parts_of(root: Path, name: str) -> dict[str, str]:
    examples = DATASETS[name].load(root)
    files = [f"{file.parent.name}/{file.name}" for file in examples.images.files]
    return dict(zip(files, examples.parts.tolist(), strict=True))


def test_a_test_list_alone_makes_all_other_images_training_images(tmp_path):
    """Published code trains on every file of a folder, including those of the test list."""
    from air_core.datasets.eurosat import FOLDERS

    make_tree("eurosat", tmp_path)
    file = tmp_path / "eurosat/2750/test.txt"
    # As ELEVATER, and names without folders.
    file.write_text("".join(f"test.zip@{c}/{c}_2.jpg 3\n{c}_5.jpg\n" for c in FOLDERS))
    parts = parts_of(tmp_path, "eurosat")
    assert {path for path, part in parts.items() if part == "test"} == {
        f"{c}/{c}_{i}.jpg" for c in FOLDERS for i in (2, 5)
    }
    assert Counter(parts.values()) == {"train": 70, "val": 10, "test": 20}
    assert file in DATASETS["eurosat"].files(tmp_path)


def coco_lists(classes: list[str], parts: dict[str, int]) -> dict[str, str]:
    lists = {
        part: [{"file_name": f"{part}.zip@{c}/{c}_{i:03}.jpg"} for c in classes]
        for part, i in parts.items()
    }
    return {f"{part}.json": json.dumps({"images": images}) for part, images in lists.items()}


def coops_list(classes: list[str], parts: dict[str, int]) -> dict[str, str]:
    lists = {
        part: [[f"{c}/{c}_{i}.jpg", n, c] for n, c in enumerate(classes)]
        for part, i in parts.items()
    }
    return {"split_zhou_EuroSAT.json": json.dumps(lists)}


@pytest.mark.parametrize(("name", "lists"), [("resisc45", coco_lists), ("eurosat", coops_list)])
def test_lists_of_three_parts_are_used_unchanged(tmp_path, name, lists):
    make_tree(name, tmp_path)
    folders = sorted(path.name for path in tmp_path.glob(f"{name}/*/*"))
    for file, text in lists(folders, {"train": 1, "val": 2, "test": 3}).items():
        (tmp_path / name / file).write_text(text)
    parts = parts_of(tmp_path, name)
    assert Counter(parts.values()) == dict.fromkeys(("train", "val", "test"), len(folders))
    numbers = {part: {file[-5] for file, of in parts.items() if of == part} for part in PARTS}
    assert numbers == {"train": {"1"}, "val": {"2"}, "test": {"3"}}


def test_lists_outside_of_the_root_are_not_read(tmp_path):
    """If the class folders are directly in the root, its parent can belong to other users."""
    shutil.copytree(small_root("eurosat") / "eurosat/2750", tmp_path / "data")
    (tmp_path / "test.txt").write_text("River_1.jpg\n")
    assert Counter(parts_of(tmp_path / "data", "eurosat").values())["test"] == round(100 * 5 / 27)


# ---------------------------------------------------------------- fashion-mnist


def test_fashion_mnist_is_found_unpacked(tmp_path):
    packed = small_root("fashion_mnist") / "fashion_mnist/FashionMNIST/raw"
    (tmp_path / "fashion_mnist").mkdir()
    for file in packed.iterdir():
        plain = tmp_path / "fashion_mnist" / file.stem
        plain.write_bytes(gzip.decompress(file.read_bytes()))
    examples = DATASETS["fashion_mnist"].load(tmp_path)
    assert np.array_equal(examples.parts, small("fashion_mnist").parts)
    assert examples.images[9].tobytes() == small("fashion_mnist").images[9].tobytes()
    assert examples.images[0].size == (28, 28)


def test_files_that_could_be_mnist_are_not_used_as_fashion_mnist(tmp_path, monkeypatch):
    monkeypatch.setattr("air_core.datasets.fashion_mnist.DEBIAN", tmp_path / "not installed")
    root = tmp_path / "mnist"
    shutil.copytree(small_root("fashion_mnist") / "fashion_mnist/FashionMNIST/raw", root)
    (root / "fashion_mnist").mkdir()  # with one of four files
    shutil.copy(root / "t10k-images-idx3-ubyte.gz", root / "fashion_mnist")
    with pytest.raises(ValueError, match=r"fashion_mnist: none of .*apt-get install"):
        DATASETS["fashion_mnist"].files(root)


def test_a_cut_off_file_of_fashion_mnist_is_an_error_with_its_name(tmp_path):
    shutil.copytree(small_root("fashion_mnist"), tmp_path, dirs_exist_ok=True)
    file = tmp_path / "fashion_mnist/FashionMNIST/raw/t10k-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte\.gz is damaged: .*ended before"):
        DATASETS["fashion_mnist"].load(tmp_path)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("name", OF_FILES)
def test_the_error_without_a_data_root_names_the_source(name):
    with pytest.raises(ValueError, match=rf"{name} needs a data root: --data-root DIR.*https://"):
        DATASETS[name].files(None)


def test_an_error_of_the_disk_is_not_one_of_the_dataset(tmp_path):
    def fail(home: Path, classnames: tuple[str, ...]) -> Listing:
        raise OSError(errno.EIO, "Input/output error")

    dataset = archive("dtd", fail, (), (), get="", source="", licence="")
    with pytest.raises(OSError, match="Input/output error"):
        dataset.files(tmp_path)


def test_the_error_for_a_missing_dataset_names_the_folders(tmp_path):
    message = r"dtd is not in .*: looked for labels in \S*/dtd/dtd, \S*/dtd, \S*; unpack https://"
    with pytest.raises(ValueError, match=message):
        DATASETS["dtd"].files(tmp_path)


# ---------------------------------------------------------------- images


def saved(image: Image.Image, file: Path, **options: object) -> Image.Image:
    image.save(file, **options)
    return ImageFiles((file,))[0]


def pixel(image: Image.Image, at: tuple[int, int] = (0, 0)) -> tuple[int, ...]:
    assert image.mode == "RGB"
    return image.getpixel(at)


def dotted(mode: str, ground: object, **dots: object) -> Image.Image:
    """4 x 4 pixels of one colour, except for the second and third of the first row."""
    image = Image.new(mode, (4, 4), ground)
    for name, colour in dots.items():
        image.putpixel(({"second": 1, "third": 2}[name], 0), colour)
    if mode == "P":
        image.putpalette([10, 20, 30, 200, 100, 50])
    return image


PALETTE = dotted("P", 0, second=1)
CLEAR = dotted("RGBA", (0, 0, 0, 0), second=(100, 0, 0, 255), third=(0, 0, 0, 51))
DEEP = Image.fromarray(np.array([[257, 32896, 65535]], dtype=np.uint16))
WHITE = (255, 255, 255)


@pytest.mark.parametrize(
    ("image", "ending", "options", "first", "second", "third"),
    [
        (PALETTE, "gif", {}, (10, 20, 30), (200, 100, 50), (10, 20, 30)),
        (PALETTE, "png", {"transparency": 0}, WHITE, (200, 100, 50), WHITE),
        (CLEAR, "png", {}, WHITE, (100, 0, 0), (204, 204, 204)),
        (DEEP, "png", {}, (1, 1, 1), (128, 128, 128), WHITE),  # 16 bits: scaled and not clipped
    ],
)
def test_an_image_is_put_on_white(tmp_path, image, ending, options, first, second, third):
    shown = saved(image, tmp_path / f"a.{ending}", **options)
    assert [pixel(shown, (x, 0)) for x in range(3)] == [first, second, third]


@pytest.mark.parametrize(
    "values",
    [np.array([[0.5]], np.float32), np.array([[70000]], np.int32)],
    ids=["float", "32 bit"],
)
def test_pixels_of_unknown_range_are_unreadable(tmp_path, values):
    with pytest.raises(Unreadable, match=r"a\.tif cannot be read: .*unknown range; save 8 or 16"):
        saved(Image.fromarray(values), tmp_path / "a.tif")


def test_a_photograph_is_rotated_to_the_orientation_of_the_camera(tmp_path):
    image = Image.new("RGB", (16, 8), "white")
    image.paste("black", (0, 0, 8, 8))  # left half
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to the right
    shown = saved(image, tmp_path / "a.jpg", exif=exif)
    assert shown.size == (8, 16)
    assert pixel(shown, (4, 2))[0] < 50  # the left half is now at the top
    assert pixel(shown, (4, 14))[0] > 200


def test_an_image_with_damaged_exif_data_is_readable(tmp_path):
    image = Image.new("RGB", (8, 8), (50, 100, 150))
    shown = saved(image, tmp_path / "a.jpg", exif=b"Exif\0\0 nonsense", quality=95)
    assert shown.size == (8, 8)


EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 32 32
%%EndComments
0 0 32 32 rectfill
showpage
%%EOF
"""


def test_postscript_named_like_a_photograph_is_not_opened(tmp_path):
    """Pillow would start Ghostscript to decode it."""
    file = tmp_path / "harmless.jpg"
    file.write_bytes(EPS)
    with Image.open(file) as image:
        assert image.format == "EPS"
    with pytest.raises(Unreadable, match=r"harmless\.jpg .*not an image of an allowed format"):
        ImageFiles((file,))[0]


@pytest.mark.parametrize("suffix", sorted(SUFFIXES))
def test_every_image_suffix_has_a_format_that_is_opened(tmp_path, suffix):
    assert saved(Image.new("RGB", (8, 8), "red"), tmp_path / f"a{suffix}").size == (8, 8)


def test_the_first_image_of_a_file_is_read(tmp_path):
    first, second = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
    options = {"format": "MPO", "save_all": True, "append_images": [second]}  # as cameras do
    red, _, blue = pixel(saved(first, tmp_path / "a.jpg", **options))
    assert red > 240
    assert blue < 15


def test_an_image_above_the_limit_is_unreadable(tmp_path):
    saved(Image.new("RGB", (8, 8)), tmp_path / "a.png")
    with pytest.raises(Unreadable, match=r"a\.png cannot be read: .*over 63 pixels"):
        open_image(tmp_path / "a.png", most_pixels=63)


def test_a_pipe_does_not_block_and_a_missing_file_is_an_error_of_the_disk(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    with pytest.raises(Unreadable, match=r"a\.jpg cannot be read: it is a folder or a device"):
        ImageFiles((tmp_path / "a.jpg",))[0]
    with pytest.raises(FileNotFoundError):
        ImageFiles((tmp_path / "missing.jpg",))[0]


# ---------------------------------------------------------------- the table


LISTING = """
import sys
from pathlib import Path
from air_core.datasets import DATASETS, get_dataset
assert DATASETS["digits"].files(None)[0].is_file()
assert DATASETS["eurosat"].files(Path(sys.argv[1]))[0].is_file()
assert get_dataset("folder:" + sys.argv[1] + "/eurosat/2750").files(None)[0].is_file()
print(*sorted({"numpy", "PIL", "scipy", "sklearn", "torch"} & set(sys.modules)))
"""


def test_listing_files_opens_no_image():
    assert python("-c", LISTING, small_root("eurosat")).stdout.split() == []


def test_the_module_that_opens_images_needs_nothing_of_airsweep():
    """Served models contain a copy of it."""
    code = "import runpy, sys; runpy.run_path(sys.argv[1]); print('air_core' in sys.modules)"
    assert python("-c", code, images.__file__).stdout == "False\n"

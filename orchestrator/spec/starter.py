"""A first sweep file for somebody's own images, written by `airsweep init`.

Looks at names of folders and files alone; no image is opened.
"""

from __future__ import annotations

import json
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from air_core.datasets.class_folders import SUFFIXES, images_in
from air_core.datasets.image_folder import PREFIX, WANTED, folder_dataset
from air_core.paradigms import TEST_SHARE
from orchestrator.files import write_new
from orchestrator.spec.marked_yaml import parse
from orchestrator.spec.sweep_file import checked
from orchestrator.spec.validation import NAME_PATTERN, NAME_WORDS

if TYPE_CHECKING:
    from air_core.datasets import Dataset

SHOWN = 6  # classes that are counted one by one
FEW_TESTS = 100  # test images that leave intervals of some ten points

TEXT = """\
{question}
version: 1
name: {name}

# Every combination of what stands under `grid` is a cell of its own, and a row of the table.
grid:
{methods}
  method: [zero_shot, fpl, cpl, air, cpl_real]

fixed:
{dataset}
  # What comes with airsweep: tiny models, which know printed digits, letters, shapes and some
  # clothes in 32 pixels. They show that all works, not what is gained on photographs.
  backbone: tiny
  generator: tiny
  # Real ones, fetched before (docs/reproduce.md); they want a GPU, see `resources` below:
  # backbone: ViT-B-32/openai
  # generator: stable-diffusion-v1-5/stable-diffusion-v1-5
  lora.rounds: 1
  images_per_class: 32  # synthetic images of each class; 120 with real models
  # iterations: 10      # rounds of pseudo-labels and prompt learning
  # paradigm: ssl       # two labelled images of each class train as well
  # shots: 2

# Each row is the mean over these; three are the fewest that show a spread.
seeds: [1, 2, 3]

# resources: {{trial: {{gpu: 0.25}}, generator: {{gpu: 1}}}}
# budget: {{gpu_hours: 10}}
"""
METHODS = """\
Plain CLIP; two methods that learn from pseudo-labels alone; AiR, which adds synthetic images;
and its control, the same with real images and no diffusion."""
QUESTION = "Is it worth it for {whose}: pseudo-labels, a LoRA, synthetic images, or plain CLIP?"
COST = (
    "Cost: `airsweep plan {name}.yaml` says it; a run with --smoke first measures a little of it."
)
EXPECT = "Expect: read air beside cpl_real; an interval that holds 0 tells nothing."
FEW = (
    "Expect: about {tests} test images tell little below 10 points; read air beside cpl_real, and "
    "an interval that holds 0 tells nothing."
)
CLASSNAMES = """\
The words that CLIP reads are the folders' names. Better ones go into {images}/classnames.txt, a
line each: {first} = a longer name. {images}/template.txt may hold one line such as: a satellite
photo of a {{}}"""


@dataclass(frozen=True)
class Starter:
    """A sweep file that was written, and what was found for it."""

    file: Path
    found: str


def write_starter(name: str, images: str | Path | None, folder: Path) -> Starter:
    """Write NAME.yaml.

    Args:
        images: of one's own, in class folders; None: the digits.
        folder: where the file goes.

    Raises:
        ValueError: it is no name, the file is there, or the images are no dataset.
    """
    name = name.removesuffix(".yaml")
    if not re.fullmatch(NAME_PATTERN, name):
        raise ValueError(f"{name!r} is no name of a sweep; allowed: {NAME_WORDS}")
    file = folder / f"{name}.yaml"
    there = f"{file} is there already; take another name, or remove it"
    if file.exists():  # said before a large folder is listed
        raise ValueError(there)
    found = DIGITS if images is None else _folder(str(images))
    text = _text(name, found)
    checked(parse(text, str(file)))
    try:
        write_new(file, text)
    except FileExistsError:
        raise ValueError(there) from None
    except OSError as problem:
        raise ValueError(f"{file} cannot be written: {problem.strerror}") from None
    return Starter(file, found.about)


@dataclass(frozen=True)
class _Found:
    """What a sweep file says of its images."""

    whose: str
    dataset: str
    about: str  # one sentence
    comment: str  # above `dataset`
    tests: int  # test images, about


DIGITS = _Found(
    "these digits",
    "digits",
    "1,797 real digits, 540 of them for test",
    "the digits that come with airsweep; your own images are `folder:<path>`, one folder a class "
    "(docs/your_images.md)",
    540,
)


def _folder(images: str) -> _Found:
    if not images.isprintable():
        raise ValueError(f"{images!r} cannot stand in a sweep file; rename the folder")
    dataset = _own(images)
    first = dataset.classnames[0]
    comment = CLASSNAMES.format(images=images, first=first) if first.isprintable() else ""
    about, tests = _counted(images, dataset)
    return _Found("my images", f"{PREFIX}{images}", about, comment, tests)


def _own(images: str) -> Dataset:
    """A folder as a dataset.

    Raises:
        ValueError: what it holds instead, and what to do.
    """
    home = Path(images).expanduser()
    if home.is_dir() and not any(inside.is_dir() for inside in home.iterdir()):
        count = len(images_in(home))
        if not count:
            raise ValueError(f"{home} holds no image ({', '.join(sorted(SUFFIXES))}); {WANTED}")
        raise ValueError(
            f"{home} holds {count:,} images and no class folders, so nothing says which classes "
            "there are and nothing can be tested; sort some of each class into "
            f"{home}/test/<class>/ and put the others into {home}/train/<class>/, where their "
            "classes may be wrong (docs/your_images.md)"
        )
    return folder_dataset(f"{PREFIX}{images}")


def _counted(images: str, dataset: Dataset) -> tuple[str, int]:
    """What a folder holds, in one sentence, and how many test images that will be, about."""
    import numpy as np

    examples = dataset.load(None)
    names, total = dataset.classnames, len(examples.labels)
    each = np.bincount(examples.labels, minlength=len(names)).tolist()
    classes = ", ".join(
        f"{name if name.isprintable() else repr(name)} {count:,}"
        for name, count in list(zip(names, each, strict=True))[:SHOWN]
    )
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    parts = {part: int((examples.parts == part).sum()) for part in ("train", "val", "test", "free")}
    free = parts["free"]
    tests = round(TEST_SHARE * total) if free else parts["test"]
    split = (
        f"{parts['val']:,} for validation, about {tests:,} for test, as `split_seed` parts them"
        if free
        else f"train {parts['train']:,}, val {parts['val']:,}, test {parts['test']:,}"
    )
    return f"{images}: {total:,} images of {len(names)} classes ({classes}{more}); {split}", tests


def _text(name: str, found: _Found) -> str:
    expect = (FEW if found.tests < FEW_TESTS else EXPECT).format(tests=found.tests)
    head = (QUESTION.format(whose=found.whose), f"{found.about}.", COST.format(name=name), expect)
    dataset = f"  dataset: {json.dumps(found.dataset, ensure_ascii=False)}"
    return TEXT.format(
        question="\n".join(_comment(line) for line in head),
        name=name,
        methods=_comment(METHODS, "  "),
        dataset="\n".join([_comment(found.comment, "  "), dataset] if found.comment else [dataset]),
    )


def _comment(text: str, indent: str = "") -> str:
    start = f"{indent}# "
    return textwrap.fill(
        text, 100, initial_indent=start, subsequent_indent=start, break_long_words=False
    )

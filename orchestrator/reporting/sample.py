"""A sample of the pool of a sweep to label by hand: a contact sheet and a CSV file.

The pool is sorted by the class and the probability that zero-shot CLIP predicts, and cut into as
many equal groups as images are wanted; one image is drawn from each group. So every image has
nearly the same chance, and the sample is spread over classes and over confidence. The sheet shows
no prediction, which would influence labels.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from air_core.classifiers import text_classifier
from air_core.datasets import get_dataset
from air_core.datasets.images import ImageFiles, Unreadable
from air_core.datasets.unlabelled import COLUMNS, LABELS, listed_images
from orchestrator.files import write_atomic
from orchestrator.planning import Plan
from orchestrator.stages import features
from orchestrator.stages.context import WorkerContext, ignore, one_thread
from orchestrator.stages.pictures import Picture, tile_sheet
from orchestrator.stages.trial import TrialSpec
from orchestrator.store import SweepLocation

SEED = 0
PER_LINE, THUMB_PX = 10, 80


@dataclass(frozen=True)
class Sample:
    """The files of a sample."""

    sheet: Path
    labels: Path
    target: Path  # the `labels.csv` beside the images
    images: int
    basis: str  # of whose predictions they are spread over


def write_sample(
    plan: Plan,
    location: SweepLocation,
    count: int,
    output: Path,
    report: Callable[[int, int], None] = ignore,
) -> Sample:
    """Draw unlabelled images of a sweep; write `<output>-sample.png` and `<output>-labels.csv`.

    The other arguments and the exceptions are those of `airsweep.sample`.
    """
    specs = (slot.spec for slot in plan.slots)
    unlabelled = (s for s in specs if get_dataset(s.dataset.name).pool_labels == "unknown")
    spec = next(unlabelled, None)
    if spec is None:
        raise ValueError(
            f"{plan.sweep.name} has no unlabelled images to label: allowed is a dataset "
            "folder:PATH with a classes.txt, such as `airsweep init --classes` makes"
        )
    dataset = get_dataset(spec.dataset.name)
    home = Path(dataset.source)
    sheet, labels = (output.with_name(f"{output.name}-{x}") for x in ("sample.png", "labels.csv"))
    for file in (sheet, labels):
        if file.exists():
            raise ValueError(f"{file} exists already; remove it, or choose other files with -o")
    if home in sheet.absolute().parents:
        raise ValueError(
            f"{sheet} would become one of the images in {home}; choose another folder with -o"
        )
    gpu = plan.sweep.resources.process_resources(spec.features.process).gpu
    device = "cuda" if gpu and torch.cuda.is_available() else "cpu"
    worker = WorkerContext(location.store, location.data_root, device)
    features.build(spec.features, worker, report)
    pool, order = _by_prediction(spec, replace(worker, device="cpu"))
    images = worker.examples(spec.dataset).images
    assert isinstance(images, ImageFiles)
    of = [file.relative_to(home).as_posix() for file in images.files]
    listed = listed_images((home / LABELS, *output.absolute().parent.glob("*-labels.csv")))
    left = np.array([i for i in order if of[pool[i]] not in listed], dtype=int)
    if not len(left):
        raise ValueError("each unlabelled image is in a sample, a *-labels.csv; fill in its class")
    generator = np.random.default_rng(SEED)
    basis = f"spread over the predictions of zero-shot {spec.backbone.name}"
    if count > len(left):
        basis = "all that have no label and are in no earlier sample"
    chosen = [generator.choice(group) for group in np.array_split(left, min(count, len(left)))]
    pictures: list[Picture] = []
    paths: list[str] = []
    for i in generator.permutation(pool[chosen]).tolist():
        with suppress(Unreadable):
            pictures.append((images[i], str(len(paths) + 1)))
            paths.append(of[i])
    heading = (
        f"{plan.sweep.name}: {len(paths)} of {len(left):,} unlabelled images; "
        f"write the class of image n into {labels.name}, where the number is n\n"
        f"classes: {', '.join(dataset.classnames)}"
    )
    lines = [pictures[i : i + PER_LINE] for i in range(0, len(pictures), PER_LINE)]
    write_atomic(sheet, tile_sheet([""] * len(lines), {heading: lines}, PER_LINE, THUMB_PX))
    try:
        with open(labels, "x") as new:
            new.write(_csv(paths))
    except OSError:
        sheet.unlink()
        raise
    return Sample(sheet, labels, home / LABELS, len(paths), basis)


@one_thread()
def _by_prediction(spec: TrialSpec, worker: WorkerContext) -> tuple[np.ndarray, np.ndarray]:
    """(P,) positions of the pool images in the dataset, and their order by predicted class and
    probability."""
    target = features.read_target(spec.features, spec.split, worker.store)
    text = target.text
    backbone = worker.backbone(spec.backbone, spec.precision)
    classifier = text_classifier(backbone, text.classnames, text.template)
    with torch.no_grad():
        scores = classifier.logits(target.batch(target.split.pool)).softmax(dim=-1)
    best = scores.max(dim=-1)
    return target.split.pool.numpy(), np.lexsort((best.values.cpu(), best.indices.cpu()))


def _csv(paths: list[str]) -> str:
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(("number", *COLUMNS))
    lines.writerows((i, path, "", "" if i % 3 else "val") for i, path in enumerate(paths, start=1))
    return text.getvalue()

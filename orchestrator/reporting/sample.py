"""A sample of the pool of a sweep, for somebody to label: a contact sheet and a CSV file.

The pool is sorted by predicted class and probability and cut into as many equal groups as images
are wanted; one image is drawn from each group. So every image has nearly the same chance, and the
sample is spread over classes and over confidence. The surest and the least sure image are always in
it. The sheet does not show predictions, since these would influence the labels.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image

from air_core.classifiers import text_classifier
from air_core.datasets import Dataset, get_dataset
from air_core.datasets.images import ImageFiles, Unreadable
from air_core.datasets.unlabelled import COLUMNS, LABELS, listed_images
from orchestrator.files import write_atomic, write_new
from orchestrator.planning import Plan, Slot
from orchestrator.stages import TrialSpec, features
from orchestrator.stages.context import WorkerContext, ignore, one_thread
from orchestrator.stages.pictures import captioned_sheet
from orchestrator.store import ArtifactStore, SweepLocation, read_trial

SEED = 0


@dataclass(frozen=True)
class Sample:
    """The files of a sample."""

    sheet: Path
    labels: Path
    target: Path  # the `labels.csv` beside the images
    images: int
    basis: str  # of whose predictions they are spread over


@dataclass(frozen=True)
class _Pool:
    index: np.ndarray  # (P,) positions in the dataset
    predictions: np.ndarray  # (P,) classes
    probabilities: np.ndarray  # (P,) of the predictions
    basis: str


def write_sample(
    plan: Plan,
    location: SweepLocation,
    count: int,
    output: Path,
    best: tuple[Slot, str] | None = None,
    report: Callable[[int, int], None] = ignore,
) -> Sample:
    """Draw unlabelled images of a sweep; write `<output>-sample.png` and `<output>-labels.csv`.

    Args:
        count: number of images; at most the whole pool.
        best: trial and name of the classifier whose predictions the sample is spread over; None:
            zero-shot CLIP. Its features of the images are made if the store lacks them.
        report: called with the number of encoded images and of all images.

    Raises:
        ValueError: no dataset of the sweep has unlabelled images, or a file exists already or
            would become one of the images.
    """
    spec, dataset = _unlabelled(plan)
    home = Path(dataset.source)
    sheet, labels = (
        output.with_name(f"{output.name}-{end}") for end in ("sample.png", "labels.csv")
    )
    for file in (sheet, labels):
        if file.exists():
            raise ValueError(f"{file} exists already; remove it, or choose other files with -o")
    if home in sheet.absolute().parents:
        raise ValueError(
            f"{sheet} would become one of the images in {home}; choose another folder with -o"
        )
    worker = WorkerContext(location.store, location.data_root)
    examples = worker.examples(spec.dataset)
    assert isinstance(examples.images, ImageFiles)
    pool = None
    if best is not None and best[0].spec.dataset == spec.dataset:
        pool = _of_trial(*best, location.store)
    if pool is None:
        gpu = plan.sweep.resources.process_resources(spec.features.process).gpu
        device = "cuda" if gpu and torch.cuda.is_available() else "cpu"
        features.build(spec.features, replace(worker, device=device), report)
        pool = _zero_shot(spec, worker)
        if best is not None:
            why = "since images or labels have changed after the run"
            pool = replace(pool, basis=f"{pool.basis}, {why}")
    listed = listed_images((home / LABELS, *output.absolute().parent.glob("*-labels.csv")))
    of = [file.relative_to(home).as_posix() for file in examples.images.files]
    left = np.array([of[i] not in listed for i in pool.index])
    unlabelled, basis = len(left), pool.basis
    if not left.any():
        raise ValueError("each unlabelled image is in a sample, a *-labels.csv; fill in its class")
    pool = _Pool(pool.index[left], pool.predictions[left], pool.probabilities[left], pool.basis)
    if count > len(pool.index):
        basis = "all that have no label and are in no earlier sample"
    generator = np.random.default_rng(SEED)
    chosen = pool.index[_spread(pool, count, generator)]
    pictures: list[Image] = []
    paths: list[str] = []
    for i in generator.permutation(chosen).tolist():
        with suppress(Unreadable):
            pictures.append(examples.images[i])
            paths.append(of[i])
    foot = f"write the class of image n into {labels.name}, where the number is n"
    title = f"{plan.sweep.name}: {len(paths)} of {unlabelled:,} unlabelled images"
    names, classnames = [Path(path).stem for path in paths], ", ".join(dataset.classnames)
    write_atomic(sheet, captioned_sheet(title, classnames, pictures, names, foot))
    try:
        write_new(labels, _csv(paths))
    except OSError:
        sheet.unlink()
        raise
    return Sample(sheet, labels, home / LABELS, len(paths), basis)


def _unlabelled(plan: Plan) -> tuple[TrialSpec, Dataset]:
    """The first trial on a dataset of unlabelled images."""
    for slot in plan.slots:
        dataset = get_dataset(slot.spec.dataset.name)
        if dataset.pool_labels == "unknown":
            return slot.spec, dataset
    raise ValueError(
        f"{plan.sweep.name} has no unlabelled images to label: allowed is a dataset "
        "folder:PATH with a classes.txt, such as `airsweep init --classes` makes"
    )


@one_thread()
def _zero_shot(spec: TrialSpec, worker: WorkerContext) -> _Pool:
    target = features.read_target(spec.features, spec.split, worker.store)
    text = target.text
    backbone = worker.backbone(spec.backbone, spec.precision)
    classifier = text_classifier(backbone, text.classnames, text.template)
    with torch.no_grad():
        scores = classifier.logits(target.batch(target.split.pool)).softmax(dim=-1)
    best = scores.max(dim=-1)
    return _Pool(
        target.split.pool.numpy(),
        best.indices.cpu().numpy(),
        best.values.cpu().numpy(),
        f"spread over the predictions of zero-shot {spec.backbone.name}",
    )


def _of_trial(slot: Slot, classifier: str, store: ArtifactStore) -> _Pool | None:
    """Predictions of a trial for the pool; None: it has none."""
    arrays = read_trial(slot.spec, store).pool_arrays()
    if not arrays:
        return None
    return _Pool(
        arrays["index"],
        arrays[classifier],
        arrays[f"probability_{classifier}"].astype(float),
        f"spread over the predictions of the {classifier} classifier of {slot.id}",
    )


def _spread(pool: _Pool, count: int, generator: np.random.Generator) -> np.ndarray:
    """Positions in the pool of `count` images, spread over classes and confidence."""
    size = len(pool.index)
    if count >= size:
        return np.arange(size)
    order = np.lexsort((pool.probabilities, pool.predictions))
    groups = np.array_split(order, count)
    drawn = [generator.choice(group) for group in groups]
    for extreme in (pool.probabilities.argmin(), pool.probabilities.argmax()):
        [at] = [k for k, group in enumerate(groups) if extreme in group]
        drawn[at] = extreme
    return np.array(drawn)


def _csv(paths: Sequence[str]) -> str:
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(("number", *COLUMNS))
    lines.writerows((i, path, "", "" if i % 3 else "val") for i, path in enumerate(paths, start=1))
    return text.getvalue()

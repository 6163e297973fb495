"""A sample of the pool of a sweep, for somebody to label: a contact sheet and a CSV file.

The pool is sorted by predicted class and probability and cut into as many equal groups as images
are wanted; one image is drawn from each group. So every image has nearly the same chance, and the
sample is spread over classes and over confidence. The surest and the least sure image are always in
it. The sheet does not show predictions, since these would influence the labels.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from air_core.classifiers import text_classifier
from air_core.datasets import Dataset, Examples, get_dataset
from air_core.datasets.images import ImageFiles, Unreadable
from air_core.datasets.unlabelled import LABELS
from air_core.specs import TrialSpec
from orchestrator.errors import MissingArtifact
from orchestrator.files import write_atomic, write_new
from orchestrator.planning import Plan
from orchestrator.stages.context import WorkerContext, one_thread
from orchestrator.stages.features import read_target
from orchestrator.stages.pictures import Tile, captioned_sheet
from orchestrator.store import ArtifactStore, SweepLocation, read_trial

SEED = 0


@dataclass(frozen=True)
class Sample:
    """The files of a sample."""

    sheet: Path
    labels: Path
    target: Path  # the `labels.csv` beside the images
    images: int
    basis: str  # how they were drawn, such as `at random`


@dataclass(frozen=True)
class _Pool:
    index: np.ndarray  # (P,) positions in the dataset
    predictions: np.ndarray | None  # (P,) classes; None: unknown
    probabilities: np.ndarray | None  # (P,) of the predictions
    basis: str


def write_sample(plan: Plan, location: SweepLocation, count: int, output: Path) -> Sample:
    """Draw unlabelled images of a sweep; write `<output>-sample.png` and `<output>-labels.csv`.

    The predictions are those of the finished trial with the highest mutual information, else of
    zero-shot CLIP, else unknown: every image then has the same chance.

    Args:
        count: number of images; at most the whole pool.

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
    pool = _pool(plan, spec, examples, worker)
    generator = np.random.default_rng(SEED)
    chosen = pool.index[_spread(pool, count, generator)]
    tiles: list[Tile] = []
    paths: list[str] = []
    for i in generator.permutation(chosen).tolist():
        with suppress(Unreadable):
            file = examples.images.files[i]
            tiles.append(Tile(examples.images[i], str(len(tiles) + 1), file.name))
            paths.append(file.relative_to(home).as_posix())
    foot = f"line n + 1 of {labels.name} is image n; write its class there"
    title = f"{plan.sweep.name}: {len(tiles)} of {len(pool.index):,} unlabelled images"
    write_atomic(sheet, captioned_sheet(title, ", ".join(dataset.classnames), tiles, foot))
    try:
        write_new(labels, _csv(paths))
    except OSError:
        sheet.unlink()
        raise
    return Sample(sheet, labels, home / LABELS, len(paths), pool.basis)


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
def _pool(plan: Plan, spec: TrialSpec, examples: Examples, worker: WorkerContext) -> _Pool:
    if (found := _of_trial(plan, spec, worker.store)) is not None:
        return found
    try:
        target = read_target(spec.features, spec.split, worker.store)
    except MissingArtifact:
        index = np.flatnonzero(examples.parts == "train")
        return _Pool(index, None, None, "at random, since the sweep has no features yet")
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


def _of_trial(plan: Plan, spec: TrialSpec, store: ArtifactStore) -> _Pool | None:
    """Pool predictions of the finished trial with the highest mutual information."""
    of_dataset = [slot for slot in plan.slots if slot.spec.dataset == spec.dataset]
    finished = [(slot, read_trial(slot.spec, store)) for slot in of_dataset if store.has(slot.spec)]
    records = [(slot, record) for slot, record in finished if record.pool_arrays()]
    if not records:
        return None
    slot, record = max(records, key=lambda pair: pair[1].objectives["mutual_information"])
    arrays = record.pool_arrays()
    name = "fused" if "fused" in arrays else "text"
    probabilities = arrays[f"probability_{name}"].astype(float)
    return _Pool(
        arrays["index"],
        arrays[name],
        probabilities,
        f"spread over the predictions of trial {slot.id} ({name})",
    )


def _spread(pool: _Pool, count: int, generator: np.random.Generator) -> np.ndarray:
    """Positions in the pool of `count` images, spread over classes and confidence."""
    size = len(pool.index)
    if count >= size:
        return np.arange(size)
    if pool.predictions is None or pool.probabilities is None:
        return generator.choice(size, count, replace=False)
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
    lines.writerow(("image", "class"))
    lines.writerows((path, "") for path in paths)
    return text.getvalue()

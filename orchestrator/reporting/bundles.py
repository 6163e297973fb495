"""Bundles of a store's trials: which trial, what goes in, and whether it is still as it was.

A bundle holds the classifier whose predictions are the trial's test predictions, and that is
checked on the stored features before it is published.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from air_core.bundle import load_bundle
from air_core.bundle.checks import PROMPT, TEST, TEXT, tested_by
from air_core.bundle.manifest import (
    LICENCE,
    Manifest,
    check_free,
    weights_said,
    write_bundle,
)
from air_core.datasets import DATASETS, get_dataset
from air_core.normal import normalised
from air_core.paradigms import seen_unseen
from air_core.specs import Ref, TrialSpec, uses_auxiliary
from orchestrator.errors import MissingArtifact
from orchestrator.formatting import counted, percent, show
from orchestrator.keys import artifact_key
from orchestrator.planning import Resolver, plan_of, refs_of
from orchestrator.planning.dataset_text import DatasetText, licence, recorded_text
from orchestrator.planning.inputs import spec_json
from orchestrator.reporting.results import NAMED, results_of
from orchestrator.reporting.rows import Row, named, worlds_of
from orchestrator.spec import Cell, SweepSpec
from orchestrator.spec.sweep_file import only_values
from orchestrator.store import ArtifactStore, SweepLocation, TrialRecord, read_trial

BEST = "best"
RUN_BY = "mutual_information"  # the objective that reads no label at all
# What a record says of its making that another reader of a bundle has a use for.
MADE = ("commit", "dirty", "code", "device", "versions")
CHUNK = 64  # images that are decoded at a time


class Differs(RuntimeError):
    """The classifier that would be exported is not the one that was tested."""


def _say(line: str) -> None:
    show(line, file=sys.stderr)  # stdout has the folder alone


@dataclass(frozen=True)
class Chosen:
    """A done trial that is to be exported."""

    spec: TrialSpec
    record: TrialRecord
    sweep: str | None  # PROJECT/NAME
    slot: str | None
    how: Mapping[str, Any] | None = None  # how `best` came to it; None: it was named


# ---------------------------------------------------------------- which trial


def best_trial(sweep: SweepSpec, location: SweepLocation, only: Sequence[str]) -> Chosen:
    """The row of the sweep's table with the best mean, and of its runs one that no label chose.

    The point of a searched cell is the one that the table shows, which no test label picked. The
    row *is* picked by test accuracy, as a reader of the table would; this is said.

    Args:
        only: `key=value[,value]` each: rows of these cells of the grid.

    Raises:
        ValueError: nothing is done, or rows are of different datasets, paradigms or modalities.
    """
    store = location.store
    plan = plan_of(sweep, location)
    every = results_of(plan, store).rows
    cells = _cells(plan.cells, only_values(sweep, only))
    kept = [row for row in every if row.cell in cells]
    if not kept:
        raise ValueError(_nothing(sweep, only, every))
    worlds = worlds_of(kept)
    if len(worlds) > 1:
        there = "; ".join("/".join(world) for world in worlds)
        keys = [key for key in NAMED if key in sweep.grid and key != "method"] or ["method"]
        raise ValueError(
            f"best of {sweep.name} is not one row, since these cannot be compared: {there}; "
            f"give --only KEY=VALUE with {', '.join(keys)}"
        )
    row = max(kept, key=lambda one: one.mean)  # of equal ones the first
    runs = {
        slot.key.digest: slot
        for slot in plan.slots
        if (slot.cell.id, slot.point) == (row.cell, row.point) and store.has(slot.spec)
    }
    found = [(slot, read_trial(slot.spec, store)) for slot in runs.values()]
    slot, record = max(found, key=lambda one: one[1].objectives[RUN_BY])
    open_ones = plan.total - plan.done - plan.reused - len(plan.pruned)
    how = {
        "row": {"method": row.method, "settings": row.settings, "mean": row.mean, "n": row.n},
        "rows": len(kept),
        "row_by": f"mean test {row.metric.replace('_', ' ')}",
        "run_by": RUN_BY,
        "trials_left": open_ones,
        "note": _caveat(len(kept)),
    }
    of_one = f"; the one with most {RUN_BY}, which reads no label" if row.n > 1 else ""
    _say(
        f"best row: {named(row, [*row.settings])}, {how['row_by']} {percent(row.mean)} % over "
        f"{counted(row.n, 'run')}"
    )
    _say(f"run:      {slot.id}, {percent(record.headline)} %{of_one}")
    _say(f"note:     {how['note']}")
    if open_ones:
        left = counted(open_ones, "trial")
        _say(f"note:     the sweep has {left} left to run, which may change it")
    spec = normalised(slot.spec)
    return Chosen(spec, record, f"{location.project}/{location.name}", slot.id, how)


def _cells(cells: Iterable[Cell], kept: Mapping[str, Sequence[Any]]) -> set[str]:
    """Ids of the cells that have these values, or to which a key does not apply."""
    found = set()
    for cell in cells:
        named = {**cell.flat, "method": cell.method}
        of = cell.chosen | {key: named.get(key) for key in NAMED}
        if all(key not in of or of[key] in values for key, values in kept.items()):
            found.add(cell.id)
    return found


def _nothing(sweep: SweepSpec, only: Sequence[str], every: Sequence[Row]) -> str:
    if not every:
        return f"no trial of {sweep.name} is done yet; `airsweep run` it first"
    there = "; ".join(dict.fromkeys(f"{'/'.join(row.world)} {row.method}" for row in every))
    return f"--only {' --only '.join(only)}: no done trial of {sweep.name} fits; there: {there}"


def _caveat(candidates: int) -> str:
    if candidates == 1:
        return "The only row: nothing was picked by a test label."
    return (
        f"The row is the best of {candidates} by their test images, so its accuracy on these is "
        "somewhat better than on new ones; its setting and its run were picked by no test label."
    )


# ---------------------------------------------------------------- what goes in


def export(
    chosen: Chosen,
    store: ArtifactStore,
    resolver: Resolver,
    folder: Path,
    replaces: bool = False,
) -> None:
    """Write the bundle of a trial.

    Args:
        replaces: take the place of another bundle.

    Raises:
        ValueError: what was tested is no prompt, an input is another one now, or the folder is
            taken.
        Differs: the prompt does not give the recorded predictions here.
    """
    check_free(folder, replaces)
    spec, record = chosen.spec, chosen.record
    if spec.iterations == 0 and spec.test_dataset is None:
        _refuse_fused(chosen)
    tested = _tested_text(spec, store, resolver)
    _check_same(spec.backbone, resolver.weights("backbone", spec.backbone.name))
    backbone, arrays = _classifier(spec, record, store, tested)
    described = weights_said(spec.backbone.name)
    index, predictions, labels = record.predictions()
    arrays[TEST] = {"index": index, "predictions": predictions, "labels": labels}
    model = described["open_clip"]["model_name"]
    # Where the backbone lies on this machine concerns no reader of a bundle.
    named = replace(spec, backbone=replace(spec.backbone, name=described["name"] or model))
    said = {
        "made_by": f"airsweep {version('airsweep')}",
        "classnames": list(tested.classnames),
        "template": tested.template,
        "modality": spec.modality,
        "prompt": asdict(spec.prompt) if spec.iterations else None,
        "backbone": {
            **described,
            "digest": spec.backbone.digest,
            "precision": spec.precision,
            "preprocess": dict(backbone.model.visual.preprocess_cfg),
        },
        # JSON has no NaN, which an accuracy over no image is.
        "metrics": {name: v for name, v in record.metrics.items() if math.isfinite(v)},
        "test": _test(spec, tested, len(index)),
        "lineage": {
            "trial_key": record.key,
            "sweep": chosen.sweep,
            "slot": chosen.slot,
            "inputs": {name: asdict(ref) for name, ref in refs_of(named).items()},
            "spec": json.loads(spec_json(named, str(artifact_key(spec)))),
            **{name: record.made.get(name) for name in MADE},
        },
        "chosen": chosen.how,
        "licence": LICENCE,
        "licences": {
            ref.name: licence(ref.name) for ref in (spec.dataset, spec.test_dataset or spec.dataset)
        },
    }

    def check(manifest: Manifest) -> None:
        _check_predictions(manifest, backbone, chosen, store)

    write_bundle(folder, said, arrays, replaces, check)


def _refuse_fused(chosen: Chosen) -> None:
    """Where nothing was learned, images or pool may still have changed the classifier."""
    spec, name = chosen.spec, chosen.slot or chosen.record.path.name
    if uses_auxiliary(spec):
        what = "the text classifier fused with an auxiliary classifier of images"
    elif spec.transduction != "none":
        what = "text scores refined over the whole pool"
    else:
        return
    raise ValueError(
        f"{name} learns no prompt: what it tests is {what}, which is no bundle; export a trial "
        "with iterations > 0, or zero_shot"
        + ("; with best, --only method=... leaves this one out" if chosen.how else "")
    )


def _tested_text(spec: TrialSpec, store: ArtifactStore, resolver: Resolver) -> DatasetText:
    """Class names and template that the trial was tested with: as recorded with the features, or
    of the dataset, if that is still the same."""
    recorded = recorded_text(spec.test_features or spec.features, store)
    if recorded is not None:
        return recorded
    then = spec.test_dataset or spec.dataset
    dataset = get_dataset(then.name)
    try:
        now = resolver.dataset(dataset)
    except ValueError:
        _say(f"note:     {then.name} is not here; its class names are those that airsweep knows")
    else:
        _check_same(then, now)
    return DatasetText(dataset.classnames, dataset.template)


def _check_same(then: Ref, now: Ref) -> None:
    """With other weights or other class names it would be another classifier."""
    if then.digest != now.digest:
        raise ValueError(
            f"{then.name} is another one now ({now.digest[:12]}) than in the trial "
            f"({then.digest[:12]}); put the former back, or run the sweep again"
        )


def _classifier(
    spec: TrialSpec, record: TrialRecord, store: ArtifactStore, tested: DatasetText
) -> tuple[Any, dict[str, dict[str, np.ndarray]]]:
    """The backbone, and the arrays of a bundle but those of the test."""
    import torch

    from air_core.backbone.loading import load_backbone
    from air_core.classifiers import class_texts

    torch.set_num_threads(1)  # as in the trial, which can so be repeated bit for bit
    there = record.made.get("device") or "cpu"
    device = "cuda" if there == "cuda" and torch.cuda.is_available() else "cpu"
    backbone = load_backbone(spec.backbone.name, device, spec.precision)
    arrays: dict[str, dict[str, np.ndarray]] = {}
    if spec.iterations:
        # A prompt that is tested elsewhere was learned by the trial at home.
        home = read_trial(replace(spec, test_dataset=None), store)
        arrays[PROMPT] = {"prompt": home.prompt()}
    if spec.iterations and spec.modality == "text":
        context = torch.from_numpy(arrays[PROMPT]["prompt"]).to(device)
        with torch.no_grad():
            texts = backbone.encode_context(context, tested.classnames)
    else:
        texts = class_texts(backbone, tested.classnames, tested.template)
    scale = np.array(backbone.logit_scale, dtype=np.float32)
    arrays[TEXT] = {"text_features": texts.cpu().numpy(), "logit_scale": scale}
    return backbone, arrays


def _test(spec: TrialSpec, tested: DatasetText, images: int) -> dict[str, Any]:
    ref = spec.test_dataset or spec.dataset
    unseen = None
    if spec.paradigm == "trzsl":
        unseen = list(seen_unseen(len(tested.classnames), spec.class_seed)[1])
    return {"dataset": ref.name, "digest": ref.digest, "images": images, "unseen": unseen}


def _check_predictions(
    manifest: Manifest, backbone: Any, chosen: Chosen, store: ArtifactStore
) -> None:
    """On the features that the trial was tested with, it predicts what the trial predicted."""
    import torch
    from safetensors.torch import load_file

    from air_core.bundle.classifier import Bundle

    spec = chosen.spec
    features = spec.test_features or spec.features
    read = (spec.test_tokens if spec.test_dataset else spec.tokens) or features
    try:
        file = store.get(read).path / "features.safetensors"
    except MissingArtifact:
        _say(
            "note:     not checked against the recorded predictions: the store has no features of "
            f"{read.dataset.name} any more; `airsweep verify` does it from the images"
        )
        return
    test = manifest.arrays[TEST]
    encoded = load_file(file)["features"][torch.from_numpy(test["index"])]
    guess = Bundle(manifest, backbone).logits_of(encoded).argmax(dim=-1).numpy()
    apart = int((guess != test["predictions"]).sum())
    if apart:
        raise Differs(
            f"with the prompt of {chosen.record.path.name}, {apart} of {len(guess)} test images "
            f"are told otherwise here than in the trial, on {chosen.record.made.get('device')} and "
            f"commit {chosen.record.made.get('commit')}; nothing was written: export it there, or "
            "run the sweep again"
        )


# ---------------------------------------------------------------- is it still so


@dataclass(frozen=True)
class Verified:
    """A bundle scored again on the images that its trial was tested on."""

    folder: str
    dataset: str
    metric: str
    images: int
    then: float  # the metric as recorded
    now: float
    told_otherwise: int  # images
    margin: float  # the largest of these between both classes, in logits

    @property
    def same(self) -> bool:
        return self.then == self.now and not self.told_otherwise

    def json(self) -> dict[str, Any]:
        return {"same": self.same, **asdict(self)}

    def lines(self) -> list[str]:
        what = f"{self.images:,} test images of {self.dataset}"
        if self.same:
            return [
                f"{self.folder}: equal, image for image; {self.metric} {percent(self.now)} % "
                f"on {what}"
            ]
        return [
            f"{self.folder}: different; {self.metric} {percent(self.now)} % now and "
            f"{percent(self.then)} % recorded ({100 * (self.now - self.then):+.2f} points), {what}",
            f"  {counted(self.told_otherwise, 'image')} told otherwise, by up to "
            f"{self.margin:.2g} in logits" + (": rounding" if self.margin < 1e-3 else ""),
        ]


Watch = Callable[[Iterable[int], int], Iterable[int]]


def verify(
    folder: Path,
    resolver: Resolver,
    weights: str | None = None,
    device: str = "cpu",
    watch: Watch = lambda starts, batches: starts,
    dataset_name: str | None = None,
) -> Verified:
    """Score a bundle on the images, not the stored features, that its trial was tested on.

    Args:
        watch: passes the batches on.
        dataset_name: of the dataset on this machine; None: as the bundle names it, which may then
            be no folder.

    Raises:
        ValueError: no bundle, another backbone, or the dataset is not here or another one.
    """
    import torch

    from air_core.evaluation import measured

    bundle = load_bundle(folder, weights, device)
    manifest = bundle.manifest
    test = manifest.said["test"]
    name = dataset_name or test["dataset"]
    if dataset_name is None and name not in DATASETS:
        raise ValueError(
            f"{folder} was tested on {name!r}, and no folder that a bundle names is opened; give "
            "--dataset folder:PATH, the folder that has these images here"
        )
    dataset = get_dataset(name)
    here = resolver.dataset(dataset).digest
    if here != test["digest"]:
        raise ValueError(
            f"{dataset.name} is another one here ({here[:12]}) than what {folder} was tested on "
            f"({test['digest'][:12]}), so they cannot be compared; --data-root says where it lies"
        )
    examples = dataset.load(resolver.data_root)
    index = manifest.arrays[TEST]["index"]
    if index.max() >= len(examples.images) or examples.labels.max() >= len(manifest.classnames):
        raise ValueError(
            f"{folder} is not a bundle: it was tested on other images or classes than "
            f"{dataset.name} has; export it again"
        )
    starts = range(0, len(index), CHUNK)
    parts = []
    for start in watch(starts, len(starts)):
        chunk = index[start : start + CHUNK]
        parts.append(bundle.logits([examples.images[int(i)] for i in chunk]))
    logits = torch.cat(parts)
    guess = logits.argmax(dim=-1)
    before = torch.from_numpy(manifest.arrays[TEST]["predictions"]).long()
    other = guess != before
    margins = (logits.amax(dim=-1) - logits.gather(1, before[:, None])[:, 0])[other]
    unseen = None if test["unseen"] is None else torch.tensor(test["unseen"])
    found = measured(
        guess, torch.from_numpy(examples.labels[index]), len(manifest.classnames), unseen
    )
    metric = tested_by(test)
    return Verified(
        folder=str(folder),
        dataset=dataset.name,
        metric=metric.removeprefix("test/").replace("_", " "),
        images=len(index),
        then=manifest.said["metrics"][metric],
        now=found.headline,
        told_otherwise=int(other.sum()),
        margin=float(margins.max()) if len(margins) else 0.0,
    )

"""A little of the real work, to know how long all of it takes: of kinds that were never measured.

In this process, on this machine's device, without Ray: some images through CLIP, some steps of a
LoRA, some blocks of images, some steps and one labelling of trials. What they make is thrown away;
seconds are kept (`estimate.remember_probed`), until a run has measured the same kind.

What a probe leaves out is what comes once: a LoRA's images through the autoencoder, a trial's
inputs from disk.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import normalize

from air_core.backbone import Backbone
from air_core.classifiers import class_texts
from air_core.datasets import Examples, get_dataset
from air_core.datasets.images import Unreadable
from air_core.diffusion.lora import add_adapters, square, train_lora
from air_core.diffusion.pipeline import PipelineGenerator
from air_core.method import Progress, TrialData, learning
from air_core.normal import normalised
from air_core.paradigms import make_split
from air_core.specs import (
    ClipPrecision,
    FeaturesSpec,
    GeneratedImages,
    LabelsSpec,
    LoraSpec,
    Ref,
    SplitSettings,
    SyntheticFeaturesSpec,
    TrialSpec,
)
from air_core.training import fit
from air_core.types import Batch, Labelled
from orchestrator.dataset_text import text_of
from orchestrator.estimate import (
    CPU,
    Pace,
    Work,
    gpu_share,
    read_history,
    remember_probed,
)
from orchestrator.image_rows import build_image_block, open_generator
from orchestrator.replicas import side_by_side
from orchestrator.resolve import images_folder
from orchestrator.stages import Target, pseudo_labelled
from orchestrator.store import ArtifactStore
from orchestrator.sweep import Resources
from orchestrator.trial import data_of
from orchestrator.workshop import Workshop, one_thread

LONG = 10.0  # seconds after which nothing more of a kind is measured
IMAGES = 64  # that go through CLIP at a time
BATCHES = 4
LORA_IMAGES = 8
LORA_STEPS = 12
BLOCKS = 4
STEPS = 100  # of a trial's training
UNITS = {
    "features": "a dataset",
    "labels": "a labelling",
    "lora": "a step",
    "images": "an image",
    "trials": "a trial",
}


class _Enough(Exception):
    """Ends real work in its midst."""


def probe_work(
    work: Iterable[Work], shop: Workshop, resources: Resources, say: Callable[[str], None]
) -> None:
    """Measure what the store's history does not know and keep it in the store.

    A kind that cannot be tried, for want of its inputs say, is kept with the reason.

    Args:
        shop: where; its device is chosen for each kind: a GPU where the sweep asks for one and
            there is one.
        say: told of each kind.
    """
    history = read_history(shop.store)
    unknown: dict[tuple[str, str], Work] = {}
    for one in work:
        if one.kind not in history.get(one.stage, {}):
            unknown.setdefault((one.stage, one.kind), one)
    found: dict[tuple[str, str], Pace | str] = {}
    for (stage, kind), one in unknown.items():
        device = "cuda" if gpu_share(stage, resources) and torch.cuda.is_available() else "cpu"
        started = time.monotonic()
        try:
            with one_thread():
                seconds, once = PROBES[stage](one.examples, replace(shop, device=device))
        except Exception as problem:  # of one kind; the others can be tried
            found[stage, kind] = f"{type(problem).__name__}: {problem}"
            say(f"{stage} ({kind}): {found[stage, kind]}")
            continue
        found[stage, kind] = pace = Pace(seconds, once, _device_name(device))
        loading = f" and {once:.1f} s once" if once else ""
        say(
            f"{stage} ({kind}): {seconds:.3g} s {UNITS[stage]}{loading} on {pace.device}, "
            f"probed in {time.monotonic() - started:.1f} s"
        )
    if found:
        remember_probed(shop.store, found)


def _device_name(device: str) -> str:
    return CPU if device == "cpu" else torch.cuda.get_device_name(device)


def _now(device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize(device)
    return time.monotonic()


# ---------------------------------------------------------------- stages


def _features(examples: Sequence[FeaturesSpec], shop: Workshop) -> tuple[float, float]:
    spec = examples[0]
    loading = _loading(shop, spec.backbone, spec.precision)
    started = _now(shop.device)
    data = shop.examples(spec.dataset)
    shop.encoded(_pictures(data, 1), spec)
    first = _now(shop.device)
    done = 0
    for pictures in _parts(_places(data, BATCHES * IMAGES), IMAGES):
        shop.encoded(_opened(data, pictures), spec)
        done += len(pictures)
        if _now(shop.device) - first > LONG:
            break
    each = (_now(shop.device) - first) / done
    return each * len(data.images), loading + max(0.0, first - started - each)


@cache  # the second time it is there already
def _loading(shop: Workshop, backbone: Ref, precision: ClipPrecision) -> float:
    """Seconds until a CLIP can be used, which every stage pays in a process of its own."""
    started = _now(shop.device)
    shop.backbone(backbone, precision)
    return _now(shop.device) - started


def _labels(examples: Sequence[LabelsSpec], shop: Workshop) -> tuple[float, float]:
    spec = replace(examples[0], images=None)  # an auxiliary classifier is little beside the texts
    loading = _loading(shop, spec.features.backbone, spec.features.precision)
    backbone = shop.backbone(spec.features.backbone, spec.features.precision)
    target = _target(spec.features, spec.split, backbone, shop)
    started = _now(shop.device)
    pseudo_labelled(spec, target, shop)
    return _now(shop.device) - started, loading


def _lora(examples: Sequence[LoraSpec], shop: Workshop) -> tuple[float, float]:
    spec = examples[0]
    features = spec.labels.features
    dataset, data = get_dataset(features.dataset.name), shop.examples(features.dataset)
    places = _places(data, LORA_IMAGES)
    pixels = np.stack([square(one, spec.size) for one in _opened(data, places)])
    names = [dataset.classnames[data.labels[i]].replace("_", " ") for i in places]
    ends: list[float] = []

    def report(step: int, steps: int, loss: float) -> None:
        ends.append(_now(shop.device))
        _stop_if_enough(ends, LORA_STEPS, ends[0])  # when it was loaded nobody says

    started = _now(shop.device)
    with tempfile.TemporaryDirectory() as folder, suppress(_Enough):
        train_lora(
            torch.from_numpy(pixels),
            [spec.training.caption.format(name) for name in names],
            images_folder(spec.model.name),
            spec.training,
            spec.size,
            Path(folder),
            device=shop.device,
            report=report,
        )
    return _pace(started, started, ends)


def _images(examples: Sequence[SyntheticFeaturesSpec], shop: Workshop) -> tuple[float, float]:
    spec = examples[0]
    images, lora = spec.images, None
    if isinstance(images, GeneratedImages):
        images, lora = replace(images, lora=None, lora_scale=1.0), images.lora
        spec = replace(spec, images=images)
    started = _now(shop.device)
    generator = open_generator(images, shop)
    if lora is not None and isinstance(generator, PipelineGenerator):
        # One that was never trained takes as long, which is about a tenth of the time.
        add_adapters(generator.pipeline.unet, lora.training.rank, 0)
    loaded = _now(shop.device)
    ends: list[float] = []
    with tempfile.TemporaryDirectory() as folder, suppress(_Enough):
        there = replace(shop, store=ArtifactStore(Path(folder)))
        for c in range(len(images.classnames)):
            build_image_block(spec, c, 0, there, lambda: generator)
            ends.append(_now(shop.device))
            _stop_if_enough(ends, BLOCKS, loaded)
    block, once = _pace(started, loaded, ends)
    return block / images.block_size, once


def _stop_if_enough(ends: Sequence[float], most: int, since: float) -> None:
    """
    Raises:
        _Enough: so many parts were timed, or it takes long.
    """
    if len(ends) >= most or ends[-1] - since > LONG:
        raise _Enough


def _pace(started: float, loaded: float, ends: Sequence[float]) -> tuple[float, float]:
    """Seconds of one of several equal parts that ended then, and what came before the first.

    The first one warms up and is no measure, unless it took so long that it is the only one.
    """
    if len(ends) == 1:
        return ends[0] - loaded, loaded - started
    each = (ends[-1] - ends[0]) / (len(ends) - 1)
    return each, max(0.0, ends[0] - started - each)


# ---------------------------------------------------------------- trials


def _trials(examples: Sequence[TrialSpec], shop: Workshop) -> tuple[float, float]:
    """Trials of one point, side by side as they will run.

    Seconds of one: what it does first, its training, each later labelling, its end.
    """
    distinct = list(dict.fromkeys(replace(normalised(one), test_dataset=None) for one in examples))
    group = side_by_side(distinct, shop.device)[0]
    spec, count = group[0], len(group)
    data = [_trial_data(one, shop) for one in group]
    marks: list[tuple[float, float]] = []  # when, and the share of all training that was done

    def told(share: float) -> None:
        marks.append((_now(shop.device), share))
        _stop_if_enough([at for at, _ in marks], STEPS, first)

    started = first = _now(shop.device)
    trials = [
        learning(one, its, _looked_at(one, its), told if i == 0 else lambda share: None)
        for i, (one, its) in enumerate(zip(group, data, strict=True))
    ]
    if not spec.iterations:
        for one in trials:
            with suppress(StopIteration):
                next(one)
        return (_now(shop.device) - started) / count, 0.0
    trainings = [next(one) for one in trials]
    first = _now(shop.device)
    with suppress(_Enough):
        fit(trainings)
    training = _extrapolated(first, marks)
    for one in trials:
        one.close()
    again = (spec.iterations - 1) * _later(spec, data[0], shop.device)
    end = _end(spec, data[0], shop.device)
    return (first - started + training) / count + again + end, 0.0


def _extrapolated(started: float, marks: Sequence[tuple[float, float]]) -> float:
    """Seconds of all training, from when how much of it was done."""
    (since, before), (until, done) = marks[0], marks[-1]
    if len(marks) == 1:
        since, before = started, 0.0
    return (until - since) / (done - before)


def _later(spec: TrialSpec, data: TrialData, device: str) -> float:
    """Seconds between two rounds of training: a look at the prompt and a labelling by it."""
    if spec.iterations < 2:
        return 0.0
    some, share = _less(spec, data)
    trial = learning(spec, some, _looked_at(spec, some))
    next(trial)
    started = _now(device)
    trial.send(0.0)
    taken = _now(device) - started
    trial.close()
    return taken * share


def _end(spec: TrialSpec, data: TrialData, device: str) -> float:
    """Seconds after the last training: a look at the prompt, pool and test once more."""
    some, share = _less(spec, data)
    trial = learning(replace(spec, iterations=1), some, _looked_at(spec, some))
    next(trial)
    started = _now(device)
    with suppress(StopIteration):
        trial.send(0.0)
    return (_now(device) - started) * share


def _looked_at(spec: TrialSpec, data: TrialData) -> Callable[[Progress], None]:
    """Who watches a real trial tests the prompt of each round, where that is cheap."""

    @torch.no_grad()
    def look(progress: Progress) -> None:
        if spec.modality == "text":
            progress.learned.logits(data.test.batch)

    return look


def _less(spec: TrialSpec, data: TrialData) -> tuple[TrialData, float]:
    """For a visual prompt fewer images, since each goes through the tower; and how many times
    as many there are."""
    if spec.modality == "text":
        return data, 1.0
    most = max(IMAGES, 2 * len(data.classnames))
    pool, test = (_spread(len(of), most) for of in (data.pool, data.test))
    some = replace(data, pool=data.pool[pool], test=data.test[test])
    return some, (len(data.pool) + len(data.test)) / (len(pool) + len(test))


def _trial_data(spec: TrialSpec, shop: Workshop) -> TrialData:
    """Inputs of a trial as to sizes, classes and labels; features are drawn around the texts of
    their classes, so that pseudo-labels spread as they do."""
    backbone = shop.backbone(spec.backbone, spec.precision)
    target = _target(spec.features, spec.split, backbone, shop, spec.tokens)
    row = spec.synthetic_features
    if row is None:
        return data_of(spec, target, backbone, None)
    unseen = target.split.unseen
    classes = torch.arange(len(row.images.classnames)) if unseen is None else unseen
    labels = classes.repeat_interleave(spec.images_per_class)
    features = _drawn(spec.features, labels, backbone)
    tokens = None
    if target.tokens is not None and spec.synthetic_tokens is not None:
        tokens = target.tokens[:1].expand(len(labels), -1, -1)
    return data_of(spec, target, backbone, Labelled(Batch(features, tokens), labels))


def _target(
    spec: FeaturesSpec,
    split: SplitSettings,
    backbone: Backbone,
    shop: Workshop,
    tokens: FeaturesSpec | None = None,
) -> Target:
    """A dataset with its real split. All images have the patch tokens of one: they take no room."""
    data = shop.examples(spec.dataset)
    labels = torch.from_numpy(data.labels)
    patches = None
    if tokens is not None:
        one = torch.from_numpy(shop.encoded(_pictures(data, 1), tokens))  # (1, T, V)
        patches = one.expand(len(labels), -1, -1)
    return Target(
        features=_drawn(spec, labels, backbone),
        labels=labels,
        split=make_split(data.labels, data.parts, split),
        text=text_of(spec, shop.store),
        tokens=patches,
    )


def _drawn(spec: FeaturesSpec, labels: Tensor, backbone: Backbone) -> Tensor:
    """(N, D) unit vectors, each as near to its class's text as to chance."""
    dataset = get_dataset(spec.dataset.name)
    texts = class_texts(backbone, dataset.classnames, dataset.template).cpu().float()  # (C, D)
    noise = torch.randn(len(labels), texts.shape[1], generator=torch.Generator().manual_seed(0))
    return normalize(texts[labels] + normalize(noise, dim=-1), dim=-1)


# ---------------------------------------------------------------- images of a dataset


def _pictures(data: Examples, count: int) -> list[Image]:
    return _opened(data, _places(data, count))


def _opened(data: Examples, places: Sequence[int]) -> list[Image]:
    return [data.images[i] for i in places]


def _places(data: Examples, count: int) -> list[int]:
    """Positions of images that can be read, spread over the dataset: sizes differ by class.

    Raises:
        ValueError: none of those that were tried can be read.
    """
    found = []
    for i in _spread(len(data.images), count).tolist():
        with suppress(Unreadable):
            data.images[i]
            found.append(i)
    if not found:
        raise ValueError(f"none of {count} images can be read; see `airsweep data check`")
    return found


def _spread(images: int, count: int) -> Tensor:
    """At most `count` positions among so many, at equal distances."""
    return torch.linspace(0, images - 1, min(images, count)).round().long()


def _parts(places: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(places), size):
        yield places[start : start + size]


PROBES: dict[str, Callable[[Sequence[Any], Workshop], tuple[float, float]]] = {
    "features": _features,
    "labels": _labels,
    "lora": _lora,
    "images": _images,
    "trials": _trials,
}

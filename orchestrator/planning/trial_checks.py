"""Check that the inputs of a trial are sufficient, before anything runs."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from air_core.datasets.unlabelled import LABELS
from air_core.models.families import FAMILIES, check_denoiser
from air_core.models.tokens import check_room
from air_core.models.weights import check_image_tower, generator_folder
from air_core.paradigms import label_problem
from air_core.settings.conditions import (
    can_transfer,
    has_context,
    is_folder,
    reads_tokens,
    uses_evidence,
    uses_generator,
)
from air_core.tools.captions import caption_problem
from orchestrator.stages import TrialSpec
from orchestrator.stages.inputs import MissingInput

if TYPE_CHECKING:
    from orchestrator.planning.resolve import DatasetInput, Resolver


class InvalidSetting(MissingInput):
    """The value of a trial key does not fit the inputs.

    Args:
        key: the trial key.
        message: what is wrong with its value, and what is allowed.
        value: that of the setting; `Resolver.trial` fills it in.
    """

    def __init__(self, key: str, message: str, value: Any = None) -> None:
        super().__init__(key, message, value)  # pickle needs all arguments
        self.key, self.message, self.value = key, message, value

    def __str__(self) -> str:
        return self.message


@contextmanager
def checking(key: str) -> Iterator[None]:
    """Name the trial key whose value an error is about.

    Raises:
        InvalidSetting: the block raised another ValueError.
    """
    try:
        yield
    except ValueError as problem:
        raise InvalidSetting(key, str(problem)) from problem


def check_trial(trial: TrialSpec, datasets: Mapping[str, DatasetInput], resolver: Resolver) -> None:
    """Check the inputs of a normalised trial.

    Args:
        datasets: by the trial key that names them.

    Raises:
        InvalidSetting: a class name is too long, images are too few or have no labels that a
            setting needs, a LoRA does not fit the generator, or the evidence has no time step.
    """
    for key, message in _problems(trial, datasets, resolver):
        if message:
            raise InvalidSetting(key, message)
    if trial.paradigm == "ssl":
        with checking("shots"):
            resolver.pool_images(trial)
    if uses_generator(trial):
        with checking("generator"):
            _check_generator(trial, resolver)


def _problems(
    trial: TrialSpec, datasets: Mapping[str, DatasetInput], resolver: Resolver
) -> Iterator[tuple[str, str | None]]:
    """Keys, each with what is wrong with its value, or with None."""
    learned = trial.prompt.length if has_context(trial) else 0
    for key, dataset in datasets.items():
        with checking(key):
            check_room(trial.backbone.name, dataset.classnames, dataset.template, learned)
    captions = {  # the texts that the diffusion model reads
        "lora.caption": trial.lora and trial.lora.caption,
        "generation.template": trial.generation.template,
        "evidence.template": trial.evidence.template,
    }
    for key, texts in captions.items():
        yield key, caption_problem(texts, trial.classnames) if texts else None
    if reads_tokens(trial):
        with checking("backbone"):
            check_image_tower(trial.backbone.name)
    if datasets["dataset"].pool_labels == "unknown":
        yield "dataset", label_problem(trial.split)
        if trial.images_from == "true_labels" or trial.initial_labels.true_share is not None:
            yield "dataset", NEEDS_LABELS
    if trial.test_dataset is not None:
        if not resolver.has_images(trial.test_dataset.name, "test"):
            name = trial.test_dataset.name
            yield "test_dataset", f"{name} has no test images; label some in its {LABELS}"
        if not can_transfer(trial):
            yield (
                "test_dataset",
                f"the learner {trial.modality!r} works with the class names that it learned only, "
                "so it cannot be tested on another dataset; set test_dataset: null",
            )
    low, high = trial.evidence.low, trial.evidence.high
    if uses_evidence(trial) and low > high:
        message = f"evidence.low is {low}, but evidence.high is {high}; allowed: low <= high"
        yield "evidence.low", message


NEEDS_LABELS = (
    "images_from: true_labels (method air_ceiling) and initial_labels.true_share (method "
    "air_labels) read the classes of the pool images, but they have no labels; leave the "
    "method out, or sort your images into class folders"
)


def _check_generator(trial: TrialSpec, resolver: Resolver) -> None:
    """
    Raises:
        ValueError: the model does not draw from text, LoRA and evidence cannot use it, or a class
            has too few ready images.
    """
    name = trial.generator.name
    if not is_folder(trial.generator):
        if trial.generator.kind and trial.generator.kind not in FAMILIES:
            _check_classes(generator_folder(name))
        remedies = {"lora: null": trial.lora, "evidence.draws: 0": uses_evidence(trial)}
        if needed := " and ".join(setting for setting, used in remedies.items() if used):
            check_denoiser(generator_folder(name), f"set {needed} to draw images only")
        return
    if uses_evidence(trial):
        raise ValueError(
            f"generator {name!r} is a folder of images, but evidence.draws needs a diffusion "
            "model; set evidence.draws: 0, or name a diffusers folder"
        )
    fewest, classname = resolver.fewest_ready_images(name, trial.classnames)
    if fewest < trial.images_per_class:
        raise ValueError(
            f"generator {name!r}: class {classname!r} has {fewest} images, but images_per_class "
            f"is {trial.images_per_class}; add images, or lower images_per_class"
        )


@functools.cache  # importing the classes of a pipeline outside of the families takes seconds
def _check_classes(folder: Path) -> None:
    from air_core.diffusion.pipeline import check_classes

    check_classes(folder)

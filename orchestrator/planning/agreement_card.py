"""Agreement of text, auxiliary classifier and evidence on a pool, as data and as text.

An agreement card says, before any trial runs, what synthetic images and denoising errors know about
the pool. `orchestrator.stages.agreement` computes the cards. This module imports no torch.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any

from air_core.specs import FeaturesSpec, SplitSettings, TrialSpec
from air_core.specs.conditions import uses_generator
from air_core.specs.normal import normalised
from orchestrator.formatting import aligned_table, format_percent, format_value
from orchestrator.keys import artifact_key, digest
from orchestrator.planning.plan import Requirement, possible_trials, requirements_of
from orchestrator.planning.resolve import Resolver
from orchestrator.spec import Cell
from orchestrator.store import ArtifactStore

EDITION = 1  # increase it when other numbers are computed for the same classifiers
EVIDENCE = "evidence"  # name of the classifier by denoising errors
WIDTH = 80  # columns of the screen
MAX_SHOWN = 8  # classifiers and methods on the screen; `audit --json` lists all


@dataclass(frozen=True)
class AgreementRow:
    """Trials with the same pool that use a diffusion model, for one card."""

    features: FeaturesSpec
    split: SplitSettings
    # Label and spec of trials that differ in more than seed and training; the specs train nothing.
    trials: tuple[tuple[str, TrialSpec], ...]

    @property
    def requirements(self) -> list[Requirement]:
        """The inputs of the trials, which a run makes as well."""
        return requirements_of(spec for _, spec in self.trials)

    def complete_trials(self, store: ArtifactStore) -> tuple[tuple[str, TrialSpec], ...]:
        """The trials whose inputs all exist."""
        return tuple(
            (label, spec)
            for label, spec in self.trials
            if all(each.is_complete(store) for each in requirements_of([spec]))
        )

    @property
    def name(self) -> str:
        """Stem of the card's file."""
        identity = digest([artifact_key(self.features).digest, asdict(self.split)])
        return f"audit-agreement-{self.features.slug}-{identity[:12]}"

    @property
    def inputs_digest(self) -> str:
        """Digest of everything that the card depends on."""
        trials = [(label, artifact_key(spec).digest) for label, spec in self.trials]
        return digest([EDITION, self.name, trials])


def agreement_rows(
    cells: Sequence[Cell], assignments: Sequence[Mapping[str, int]], resolver: Resolver
) -> list[AgreementRow]:
    """List the pools of a sweep with the trials that use a diffusion model on them.

    Bounds, which read true or wrong labels of the pool, are left out.
    """
    cells_by_pool: dict[tuple[FeaturesSpec, SplitSettings], dict[TrialSpec, Cell]] = {}
    for cell in cells:
        for trial in possible_trials([cell], assignments, resolver):
            if trial.images_from == "generator":
                untrained = normalised(
                    replace(trial, iterations=0, modality="text", test_dataset=None)
                )
                if uses_generator(untrained):
                    pool = cells_by_pool.setdefault((trial.features, trial.split), {})
                    pool.setdefault(untrained, cell)
    return [
        AgreementRow(features, split, tuple(_labelled(found)))
        for (features, split), found in cells_by_pool.items()
    ]


def _labelled(cells: Mapping[TrialSpec, Cell]) -> Iterator[tuple[str, TrialSpec]]:
    """Each spec with its method, and with the settings in which specs of the method differ."""
    for spec, cell in cells.items():
        others = [other for other in cells.values() if other.method == cell.method]
        settings = [
            f"{key} {format_value(value)}"
            for key, value in cell.chosen.items()
            if any(other.chosen.get(key) != value for other in others)
        ]
        yield ", ".join([cell.method, *settings]), spec


# ---------------------------------------------------------------- the card


@dataclass(frozen=True)
class AgreementCard:
    """What classifiers know about a pool. No label of the pool is read. Fractions in [0, 1]."""

    inputs_digest: str  # `AgreementRow.inputs_digest`
    name: str
    title: str
    pool_images: int
    validation_images: int
    # For each classifier that is fused: name; methods, the labels of its trials; images, the number
    # of pool images that it scores; on validation images accuracy, and gain over text with its 95 %
    # interval (low, high), null if unknown: evidence scores pool images alone.
    classifiers: Sequence[Mapping[str, Any]]
    agreement: Sequence[Sequence[float | None]]  # share of pool images with the same class
    # For the fused classifier of each trial, before training: method, its label; disputed, share of
    # the pool where its auxiliary classifier or evidence disagrees with text, and changed, where
    # fusion does; accuracy, gain, low and high as above.
    fused: Sequence[Mapping[str, Any]]


def agreement_title(row: AgreementRow, dataset: str) -> str:
    """
    Args:
        dataset: description of the dataset.
    """
    split = row.split
    paradigm = "" if split.paradigm == "ul" else f", {split.paradigm.upper()}"
    classes = f", class seed {split.class_seed}" if split.paradigm == "trzsl" else ""
    return f"{dataset}{paradigm}{classes}, split {split.split_seed}"


def agreement_lines(card: AgreementCard) -> list[dict[str, str]]:
    """One line of cells per classifier: agreement with those above it, and validation accuracy."""
    lines = []
    shown = card.classifiers[:MAX_SHOWN]
    for i, entry in enumerate(shown):
        line = {"#": str(i + 1), "classifier": str(entry["name"])}
        for j in range(len(shown) - 1):
            share = card.agreement[i][j] if j < i else None
            line[str(j + 1)] = "" if share is None else f"{100 * share:.0f}"
        lines.append(line | _validation(card, entry))
    return lines


def fusion_lines(card: AgreementCard) -> list[dict[str, str]]:
    """One line of cells per method: what fusion with text changes before training."""
    return [
        {
            "fused": str(entry["method"]),
            **{name: f"{100 * entry[name]:.0f}" for name in ("disputed", "changed")},
            **_validation(card, entry),
        }
        for entry in card.fused[:MAX_SHOWN]
    ]


def _validation(card: AgreementCard, entry: Mapping[str, Any]) -> dict[str, str]:
    if not card.validation_images:
        return {}
    gain = ""
    if entry["gain"] is not None:
        mean, low, high = (f"{100 * entry[name]:+.1f}" for name in ("gain", "low", "high"))
        gain = f"{mean} [{low}, {high}]"
    return {"accuracy": format_percent(entry["accuracy"]), "minus text, 95 %": gain}


def agreement_caption(card: AgreementCard) -> str:
    """What the columns of `agreement_lines` are."""
    accuracy = "the split has no validation images, so no accuracy is known"
    if card.validation_images:
        accuracy = f"accuracy on {card.validation_images:,} validation images"
    return f"Same class, in % of {card.pool_images:,} pool images; {accuracy}."


def agreement_notes(card: AgreementCard) -> list[str]:
    """What the other numbers are."""
    notes = [
        "Disputed: labels of text, in % of the pool, that another classifier of the method "
        "contradicts; changed: that fusion changes in the first round, before any training."
    ]
    names = [str(entry["name"]) for entry in card.classifiers]
    if card.validation_images and any(name.startswith(EVIDENCE) for name in names):
        notes.append(
            "Evidence scores pool images only, so no validation image measures it, alone or fused."
        )
    return notes


def agreement_screen(card: AgreementCard) -> str:
    """Format a card in at most WIDTH columns."""
    tables = [aligned_table(lines, WIDTH) for lines in (agreement_lines(card), fusion_lines(card))]
    caption, *notes = (
        textwrap.wrap(text, WIDTH) for text in (agreement_caption(card), *agreement_notes(card))
    )
    title = f"text, images and evidence   {card.title}"
    return "\n".join([title, *caption, *chain(*tables), *chain(*notes)])

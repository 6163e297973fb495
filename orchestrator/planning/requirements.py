"""Requirements: the artifacts that trials read, and which parts of them a store has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

from air_core.paradigms import seen_unseen
from orchestrator.keys import ArtifactKey, RowSpec, StageSpec, artifact_key
from orchestrator.stages import STAGES, TrialSpec
from orchestrator.store import ArtifactStore

BASE_PER_CLASS = 8  # images without LoRA, drawn to measure what LoRA changes


@dataclass(frozen=True)
class Requirement:
    """An artifact that trials read; of a row, a number of images of some classes or draws."""

    spec: StageSpec
    images: int = 0  # per class or draw; 0 except for a row
    classes: tuple[int, ...] = ()  # label indices, or numbers of draws; empty except for a row
    # Of a row without LoRA that no trial reads: the rows that it is compared with.
    compared_with: tuple[StageSpec, ...] = field(default=(), compare=False)

    @property
    def rows(self) -> tuple[StageSpec, ...]:
        """The specs of the rows in the store; empty for other artifacts."""
        return self.spec.rows

    @property
    def key(self) -> ArtifactKey:
        return artifact_key(self.spec.maker)

    @property
    def stage(self) -> str:
        return self.spec.maker.stage

    def shards(self) -> list[tuple[int, int]]:
        """The shards of a row as (class or draw, block), in the order in which they are made."""
        assert isinstance(self.spec, RowSpec)
        return self.spec.shards(self.images, self.classes)

    def missing(self, store: ArtifactStore) -> list[tuple[int, int]]:
        """The shards of a row of which images, features or errors are missing."""
        present = self._present(store)
        return [shard for shard in self.shards() if shard not in present]

    def is_replaced(self, store: ArtifactStore) -> bool:
        """Whether the store has the artifact that replaces this row."""
        return self.spec.whole is not None and store.has(self.spec.whole)

    def _present(self, store: ArtifactStore) -> frozenset[tuple[int, int]]:
        """The shards of a row that are complete in the store, or no longer needed."""
        if self.is_replaced(store):
            return frozenset(self.shards())
        shards = (store.row(spec).existing_shards() for spec in self.rows)
        return frozenset.intersection(*shards)

    def have(self, store: ArtifactStore) -> int:
        """Number of parts in the store: shards of a row; 0 or 1 for any other artifact."""
        if isinstance(self.spec, RowSpec):
            classes, blocks = {*self.classes}, self.spec.blocks(self.images)
            return sum(c in classes and block < blocks for c, block in self._present(store))
        return int(store.has(self.spec))

    def bytes(self, store: ArtifactStore) -> int:
        """Bytes in the store; of a row, all its shards, even those that are not required here."""
        return sum(store.bytes(spec) for spec in self.rows or (self.spec,))

    def total(self) -> int:
        """Number of required parts, as `have` counts them."""
        if isinstance(self.spec, RowSpec):
            return len(self.classes) * self.spec.blocks(self.images)
        return 1

    def is_complete(self, store: ArtifactStore) -> bool:
        """Whether the store has all parts."""
        return self.have(store) == self.total()


STAGE_TITLES = {spec.stage: spec.title for spec in STAGES.values()}  # in messages and on screens


def artifact_title(key: ArtifactKey) -> str:
    """Name of an artifact in messages and on screens."""
    return f"{STAGE_TITLES[key.stage]} {key.slug}"


def requirements_of(trials: Iterable[TrialSpec]) -> list[Requirement]:
    """List the distinct artifacts that trials read, each after those that it is built from.

    A row of images is required up to the largest count and all classes that any trial reads.
    """
    distinct = dict.fromkeys(replace(trial, seed=0) for trial in trials)
    return merge(requirement for trial in distinct for requirement in _requirements(trial))


def merge(requirements: Iterable[Requirement]) -> list[Requirement]:
    """The distinct artifacts of some requirements, of a row the largest count and all classes."""
    merged: dict[str, Requirement] = {}
    for requirement in requirements:
        identity = f"{requirement.key}/{artifact_key(requirement.spec).digest}"
        earlier = merged.get(identity, requirement)
        merged[identity] = replace(
            requirement,
            images=max(requirement.images, earlier.images),
            classes=tuple(sorted({*requirement.classes, *earlier.classes})),
            compared_with=(
                (*earlier.compared_with, *requirement.compared_with)
                if earlier.compared_with and requirement.compared_with
                else ()
            ),
        )
    return list(merged.values())


def _requirements(trial: TrialSpec) -> Iterator[Requirement]:
    classes = tuple(range(len(trial.classnames)))
    if trial.paradigm == "trzsl" and len(classes) > 1:
        _, classes = seen_unseen(len(classes), trial.class_seed)  # images of unseen classes only
    yield from _inputs(trial, classes)
    base, row = trial.base_features, trial.synthetic_features
    if base is not None and row is not None:
        yield Requirement(base, BASE_PER_CLASS, classes, (row,))


def _inputs(spec: StageSpec, classes: tuple[int, ...]) -> Iterator[Requirement]:
    """The artifacts that a spec is made from, each after its own inputs."""
    for needed in spec.inputs(classes):
        yield from _inputs(needed.spec, classes)
        yield Requirement(*needed)


def contains_spec(spec: Any, part: Any) -> bool:
    """Whether `part` equals `spec` or one of the specs nested in it."""
    if spec == part:
        return True
    if not is_dataclass(spec):
        return False
    return any(contains_spec(getattr(spec, f.name), part) for f in fields(spec))


def independent_of(
    failed: Iterable[Requirement], requirements: Iterable[Requirement]
) -> list[Requirement]:
    """The requirements that contain none of those that failed.

    A row without LoRA is left out with the rows that it is compared with.
    """
    missing = [spec for each in failed for spec in (each.spec, *each.rows, each.spec.whole) if spec]

    def is_stopped(spec: Any) -> bool:
        return any(contains_spec(spec, part) for part in missing)

    return [
        each
        for each in requirements
        if not is_stopped(each.spec)
        and not (each.compared_with and all(map(is_stopped, each.compared_with)))
    ]

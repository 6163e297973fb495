"""Specs of artifacts, and their keys: stage, recipe number and hash of the normalised spec.

A spec has everything that a stage may read: its settings, and the complete specs of the artifacts
that it is made from. So the nesting of specs is the dependency graph, and a stage cannot depend on
a setting that is not in its key. A spec contains a code version if its code is not that of its
recipe; see `store.code_version`. A key never depends on the machines: their number, their hardware
and their names.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import typing
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from itertools import product
from typing import Any, ClassVar, Literal, NamedTuple

from air_core.settings import Ref
from orchestrator.formatting import own_name

Indices = tuple[int, ...]  # of classes or draws
Process = Literal["encoder", "generator", "trial"]
# Parts of the code with their versions, where these are not those of the recipes: see
# orchestrator.store.code_version. The spec of a single stage has the versions without the parts.
CodeVersions = tuple[tuple[str, str], ...]


def derived(default: Any) -> Any:
    """A field of a spec that follows from others, and is not in the key."""
    return field(default=default, metadata={"derived": True})


@dataclass(frozen=True, kw_only=True)
class StageSpec(ABC):
    """Base of the specs of all stages; its class variables are the facts of a stage.

    The module of the class makes its artifacts.
    """

    stage: ClassVar[str]  # folder in the store
    # Raise it when the stage's code gives another result for the same spec, and run `make golden`.
    # The keys of later stages change too, since they contain this number.
    recipe: ClassVar[int] = 1
    # Modules that compute it with all that they import, beside readers of datasets and components.
    modules: ClassVar[tuple[str, ...]]
    title: ClassVar[str]  # of its artifacts, on screens
    process: ClassVar[Process] = "encoder"  # that makes it, as in `resources`
    guess: ClassVar[float] = 1.0  # seconds of a unit with tiny models on a CPU core
    # What the progress of an artifact, or of a shard, counts.
    counts: ClassVar[Literal["images", "steps", "pairs"]] = "images"
    shard: ClassVar[str] = ""  # suffix of the shards of a row; empty: its artifact is no row

    code: str = ""  # version of the code; empty if it is that of the recipe

    @property
    @abstractmethod
    def words(self) -> Sequence[str]:
        """Of the slug: names of inputs and a few settings."""

    @property
    def slug(self) -> str:
        """A short description of the artifact; not part of its identity."""
        words = "-".join(map(own_name, self.words))
        return re.sub(r"[^A-Za-z0-9]+", "-", words).strip("-")[:60]

    @property
    def normal(self) -> StageSpec:
        """The spec of the same computation that is in the key."""
        return self

    @property
    def rows(self) -> tuple[RowSpec, ...]:
        """Specs of the rows that are made together, shard by shard; empty: it is no row."""
        return ()

    @property
    def maker(self) -> StageSpec:
        """The spec that stands for all rows that are made together."""
        return self

    @property
    def is_drawn(self) -> bool:
        """Whether generators make it, shard by shard."""
        return bool(self.shard) and self.maker.process == "generator"

    @property
    def whole(self) -> StageSpec | None:
        """The artifact that replaces a row of shards once it is complete; None: there is none."""
        return None

    def inputs(self, classes: Indices) -> Iterator[Needed]:
        """The artifacts that this one is made from.

        Args:
            classes: those of which trials read synthetic images.
        """
        yield from ()

    @property
    def in_key(self) -> Sequence[StageSpec]:
        """The inputs that are in the key although they are no fields."""
        return ()

    def work(self) -> tuple[str, float]:
        """Kind of the work, and the units of the artifact, or of one shard.

        The kind names all that the cost of a unit depends on. `guess` holds where it names the tiny
        model, and for work that depends on nothing.
        """
        return "", 1


@dataclass(frozen=True, kw_only=True)
class RowSpec(StageSpec):
    """Base of rows: shards by an index, such as a class or a draw, and a block of images."""

    process: ClassVar[Process] = "generator"

    @property
    def rows(self) -> tuple[RowSpec, ...]:
        return (self,)

    @property
    @abstractmethod
    def block_size(self) -> int:
        """Images of a shard."""

    def blocks(self, images: int) -> int:
        """Number of blocks that contain the first `images` images."""
        return -(-images // self.block_size)

    def shards(self, images: int, indices: Indices) -> list[tuple[int, int]]:
        """Shards as (index, block), in the order in which they are made."""
        return list(product(indices, range(self.blocks(images))))

    @abstractmethod
    def name_of(self, index: int) -> str:
        """Name of an index in messages."""

    @property
    def needs_earlier(self) -> bool:
        """Whether a shard can need earlier ones of its block, so that one process makes them."""
        return False


class Needed(NamedTuple):
    """An artifact that another one or a trial reads; of a row, some images of some indices."""

    spec: StageSpec
    images: int = 0  # per index; 0 except for a row
    indices: Indices = ()  # classes or draws; empty except for a row


@dataclass(frozen=True, order=True)
class ArtifactKey:
    """The address of an artifact in the store."""

    stage: str
    recipe: int
    digest: str  # 40 hex digits
    slug: str  # a short description; not part of the identity

    def __str__(self) -> str:
        return f"{self.stage}/v{self.recipe}/{self.slug}-{self.digest[:12]}"


Keyed = StageSpec | ArtifactKey


def artifact_key(spec: Keyed) -> ArtifactKey:
    """The key of the artifact that a stage makes from this spec."""
    return spec if isinstance(spec, ArtifactKey) else key_of_normal(spec.normal)


@cache
def key_of_normal(spec: StageSpec) -> ArtifactKey:
    """The key of a spec that is normal already, for callers with many of them."""
    return ArtifactKey(spec.stage, spec.recipe, _blake2b(_json_of(spec)), spec.slug)


def digest(value: Any) -> str:
    """40 hex digits of blake2b over canonical JSON."""
    return _blake2b(canonical_json(value))


def _blake2b(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=20).hexdigest()


_encoded = json.JSONEncoder(allow_nan=False).encode


def canonical_json(value: Any) -> str:
    """JSON text that is equal for equal values: sorted keys, no spaces, 7.0 written as 7.

    A dataclass is an object; a spec has its recipe and inputs too, and a Ref is its digest.

    Raises:
        TypeError: the value contains other types than dataclasses and plain data.
        ValueError: the value contains NaN or infinity.

    >>> canonical_json({"b": 7.0, "a": [True, None, "x"]})
    '{"a":[true,null,"x"],"b":7}'
    """
    if isinstance(value, str):
        return _encoded(value)
    if isinstance(value, list | tuple):
        return f"[{','.join(map(canonical_json, value))}]"
    if isinstance(value, Mapping):
        return _object((name, canonical_json(item)) for name, item in value.items())
    return _kept(value)


@lru_cache(maxsize=4096, typed=True)  # trials of a sweep share most settings and inputs
def _kept(value: Any) -> str:
    if isinstance(value, Ref):
        return _encoded(value.digest)
    if dataclasses.is_dataclass(value):
        return _json_of(value)
    is_whole = isinstance(value, float) and value.is_integer()
    return _encoded(int(value) if is_whole else value)


def _object(members: Iterable[tuple[str, str]]) -> str:
    return f"{{{','.join(f'{_encoded(name)}:{text}' for name, text in sorted(members))}}}"


def _json_of(value: Any) -> str:
    members = [(name, canonical_json(getattr(value, name))) for name in _fields(value.__class__)]
    if isinstance(value, StageSpec):
        members.append(("recipe", _encoded(f"{value.stage}/{value.recipe}")))
        # The inputs contain the recipe numbers of earlier stages.
        if inputs := value.in_key:
            members.append(("inputs", canonical_json(inputs)))
    return _object(members)


@cache
def _fields(owner: type) -> tuple[str, ...]:
    """The fields of a dataclass that are in a key."""
    fields = dataclasses.fields(owner)
    return tuple(f.name for f in fields if f.compare and not f.metadata.get("derived"))


def from_plain(hint: Any, value: Any) -> Any:
    """A value of an annotated type from the plain data of `asdict` or JSON, which has no tuples.

    Raises:
        TypeError: a dataclass has other fields.
    """
    args = typing.get_args(hint)
    if isinstance(value, list):
        return tuple(from_plain(args[0] if args else None, each) for each in value)
    if not isinstance(value, Mapping):
        return value
    kind: Any = next((one for one in (hint, *args) if dataclasses.is_dataclass(one)), None)
    if kind is None or typing.get_origin(hint) is dict:
        return {name: from_plain(args[1] if args else None, each) for name, each in value.items()}
    if missing := {f.name for f in dataclasses.fields(kind)} ^ value.keys():
        raise TypeError(f"{kind.__name__}: {', '.join(sorted(missing))}")
    hints = _hints(kind)
    return kind(**{name: from_plain(hints[name], each) for name, each in value.items()})


@cache
def _hints(kind: Any) -> Any:
    return typing.get_type_hints(kind)

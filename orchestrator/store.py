"""What exists: artifacts by content key. Knows no stage, no sweep, no cluster.

`runs/artifacts/<stage>/v<recipe>/<slug>-<digest12>/`. An artifact is built in a folder beside its
place and renamed; its record is written last, so a folder with a record is whole. A row (images,
their features) is never whole: it has shards, each renamed into place. All paths inside are
relative: the store can be moved. A record holds the digests of its files; records and shards are
sealed (`seal.py`), so that a changed byte can be found. Who builds something that others may want
too holds its lock below `locks/`; a lock saves work, and what is right never hangs on it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from orchestrator.keys import ArtifactKey, Stage, artifact_key
from orchestrator.reached import code_of
from orchestrator.seal import sealed_json

VERSION = "1"
RECORD, ROW = "record.json", "row.json"  # of an artifact, and of a row
CODE = "code"  # folder: what each code that made something was made of
LOCKS = "locks"  # folder
STORE_LOCK = f"{LOCKS}/store"  # shared by who uses the store, taken whole by who removes from it
LIBRARIES = ("torch", "open_clip_torch", "diffusers", "peft", "transformers", "numpy")


class MissingArtifact(LookupError):
    """Something that should have been prepared is not there."""


class StoreRefused(RuntimeError):
    """The store cannot be used: another version made it, or somebody has it to himself now."""


@dataclass(frozen=True)
class Artifact:
    """A whole artifact."""

    key: ArtifactKey
    path: Path
    record: dict[str, Any]


@dataclass
class Building:
    """An artifact in the making: its folder, and what the record should say (plain data)."""

    folder: Path
    info: dict[str, Any] = field(default_factory=dict)
    before: float = 0.0  # seconds that earlier processes gave to it


@dataclass(frozen=True)
class Row:
    """A row of shards, one per class and block."""

    key: ArtifactKey
    path: Path

    def shard(self, class_index: int, block: int, suffix: str) -> Path:
        return self.path / f"{class_index:04d}-{block:05d}{suffix}"

    def present(self, suffix: str) -> frozenset[tuple[int, int]]:
        """(class, block) of the shards that are there."""
        found = set()
        if self.path.is_dir():
            for name in os.listdir(self.path):
                if name.endswith(suffix) and not name.startswith("."):
                    c, _, block = name.removesuffix(suffix).partition("-")
                    found.add((int(c), int(block)))
        return frozenset(found)


class ArtifactStore:
    """A folder of artifacts. `read_only()` gives one that cannot build."""

    def __init__(self, root: Path, *, writable: bool = True) -> None:
        self.root = root
        self.artifacts = root / "artifacts"
        self.writable = writable

    def read_only(self) -> ArtifactStore:
        return ArtifactStore(self.root, writable=False)

    def path(self, key: ArtifactKey) -> Path:
        """Where it lies, or would lie. The digest decides; the slug is for people."""
        place = self.artifacts / str(key)
        if not place.exists():
            others = place.parent.glob(f"*-{key.digest[:12]}") if place.parent.is_dir() else ()
            return next(iter(others), place)
        return place

    def has(self, spec: Stage) -> bool:
        return (self.path(artifact_key(spec)) / RECORD).is_file()

    def get(self, spec: Stage) -> Artifact:
        """A whole artifact.

        Raises:
            MissingArtifact: it is not there.
        """
        key = artifact_key(spec)
        path = self.path(key)
        try:
            record = json.loads((path / RECORD).read_text())
        except FileNotFoundError:
            raise MissingArtifact(
                f"{key} is not in {self.root}; run `airsweep prepare SPEC` first"
            ) from None
        return Artifact(key, path, record)

    def get_or_build(self, spec: Stage, build: Callable[[Path], dict[str, Any]]) -> Artifact:
        """The artifact; built first where it is missing.

        Args:
            build: writes files into the folder that it is given and returns what the record
                should say of them (plain data).

        Raises:
            MissingArtifact: it is missing and this store is read-only.
        """
        if self.writable and not self.has(spec):
            # Locks are taken upstream: a builder may ask for what its own spec nests.
            with self.turn(artifact_key(spec).digest):
                if not self.has(spec):  # nobody has built it meanwhile
                    with self.building(spec) as made:
                        made.info = build(made.folder)
        return self.get(spec)

    @contextmanager
    def building(self, spec: Stage, share: float = 1.0) -> Iterator[Building]:
        """A folder to be filled, published when the block is left without an error.

        Whoever calls it holds the `turn` of the spec's digest.

        Args:
            share: of the time from here to there; the rest is of what is built beside it.

        Raises:
            MissingArtifact: this store is read-only.
        """
        key = artifact_key(spec)
        if not self.writable:
            raise MissingArtifact(f"{key} is not there, and this store is read-only")
        place = self.path(key)
        place.parent.mkdir(parents=True, exist_ok=True)
        work = place.parent / f".{key.digest[:12]}-{uuid.uuid4().hex[:8]}"
        work.mkdir()
        try:
            started = time.time()
            made = Building(work)
            yield made
            record = {
                "key": str(key),
                "digest": key.digest,
                "spec": asdict(spec),
                "info": made.info,
                "started": started,
                "seconds": round((time.time() - started) * share + made.before, 3),
                "host": socket.gethostname(),
                **maker(),
                "code": self._note_code(spec),
                "versions": versions(),
                "files": {p.name: file_digest(p) for p in sorted(work.iterdir())},
            }
            write_whole(work / RECORD, sealed_json(record))
            try:
                os.rename(work, place)
            except OSError:
                # Somebody else was faster, and the same key is the same thing; or a folder that
                # lost its record is in the way, and what has no record is nothing.
                if not (place / RECORD).is_file():
                    shutil.rmtree(place)
                    os.rename(work, place)
        finally:
            shutil.rmtree(work, ignore_errors=True)

    @contextmanager
    def turn(self, name: str) -> Iterator[None]:
        """Waits until nobody else makes `name`; then look again whether it is there.

        The lock of a dead process is free at once. Where the file system has no locks nobody
        waits: two then do the same work, and each part of it is still renamed into place whole.
        """
        place = self.root / LOCKS / name
        with ExitStack() as held:
            with suppress(OSError):
                held.enter_context(_flocked(place, fcntl.LOCK_EX))
            yield
            with suppress(OSError):  # who waits has the file open, and will find the work done
                place.unlink()

    def use(self) -> ExitStack:
        """Keeps others from having the store to themselves, until it is closed.

        Raises:
            StoreRefused: somebody has, to remove what no sweep needs.
        """
        held = ExitStack()
        try:
            held.enter_context(_flocked(self.root / STORE_LOCK, fcntl.LOCK_SH | fcntl.LOCK_NB))
        except BlockingIOError:
            raise StoreRefused(
                f"`airsweep cache gc` removes artifacts from {self.root} now: wait for its end"
            ) from None
        except OSError:  # no locks here: then nobody can have it to himself either
            pass
        return held

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else uses the store meanwhile.

        Raises:
            StoreRefused: somebody does, or it cannot be told.
        """
        with ExitStack() as held:
            try:
                held.enter_context(_flocked(self.root / STORE_LOCK, fcntl.LOCK_EX | fcntl.LOCK_NB))
            except BlockingIOError:
                raise StoreRefused(
                    f"a sweep runs in {self.root}; wait for it, or stop it"
                ) from None
            except OSError as problem:
                raise StoreRefused(
                    f"{self.root / STORE_LOCK} cannot be locked ({problem.strerror}), so it cannot "
                    "be told whether a sweep runs; try on the machine that holds the folder"
                ) from None
            yield

    def code(self, spec: Stage) -> str | None:
        """Digest of the code that made an artifact or row; None: it is not there, or nobody
        noted it."""
        path = self.path(artifact_key(spec))
        for name in (RECORD, ROW):
            try:
                code: str | None = json.loads((path / name).read_text()).get("code")
            except FileNotFoundError:
                continue
            return code
        return None

    def code_parts(self, digest: str) -> dict[str, str]:
        """What that code was made of: hashes by qualified name; empty where nobody noted it."""
        try:
            parts: dict[str, str] = json.loads((self.root / CODE / f"{digest}.json").read_text())
        except FileNotFoundError:
            return {}
        return parts

    def _note_code(self, spec: Stage) -> str:
        code = code_of(spec)
        place = self.root / CODE / f"{code.digest}.json"
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            write_whole(place, json.dumps(code.parts, indent=1, sort_keys=True))
        return code.digest

    def unfinished(self, spec: Stage) -> Path:
        """A file for work that takes long, of this code; the folder is there."""
        folder = self.root / "unfinished"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{artifact_key(spec).digest[:12]}-{code_of(spec).digest}.safetensors"

    def row(self, spec: Stage) -> Row:
        """A row; its folder and `row.json` are written when the first shard is."""
        key = artifact_key(spec)
        return Row(key, self.path(key))

    def open_row(self, spec: Stage) -> Row:
        """A row that shards can be written to."""
        row = self.row(spec)
        if not self.writable:
            raise MissingArtifact(f"{row.key}: this store is read-only")
        row.path.mkdir(parents=True, exist_ok=True)
        if not (row.path / ROW).exists():
            known = {
                "digest": row.key.digest,
                "spec": asdict(spec),
                "started": time.time(),
                **maker(),
                "code": self._note_code(spec),
            }
            write_whole(row.path / ROW, sealed_json(known))
        return row


@contextmanager
def _flocked(file: Path, how: int) -> Iterator[None]:
    # flock itself: where it is missing, filelock turns to files that outlive their process.
    file.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with suppress(OSError):  # other users of the store wait for the same file
            os.fchmod(handle, 0o666)
        fcntl.flock(handle, how)
        yield
    finally:
        os.close(handle)


def open_store(root: Path) -> ArtifactStore:
    """The store in a folder, as a command opens it; there may be nothing yet.

    Raises:
        StoreRefused: another version made it.
        ValueError: it is no folder.
    """
    if root.exists() and not root.is_dir():
        raise ValueError(f"{root} is a file; a store is a folder: choose another with --store")
    try:
        found = (root / "VERSION").read_text().strip()
    except FileNotFoundError:
        found = VERSION  # of an empty folder: the first run writes it
    if found != VERSION:
        raise StoreRefused(
            f"{root} is a store of version {found[:20]!r}; this airsweep reads version {VERSION} "
            "alone: use the airsweep that made it, or another folder with --store"
        )
    return ArtifactStore(root.absolute())


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that it is there whole or not at all, also after a power cut."""
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    with open(temporary, "wb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)


def file_digest(path: Path) -> str:
    """blake2b of a file's content."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, lambda: hashlib.blake2b(digest_size=20)).hexdigest()


def maker() -> dict[str, str]:
    """Who makes things here, with what code; the driver tells its workers."""
    return {
        "user": os.environ.get("AIRSWEEP_USER", "unknown"),
        "commit": os.environ.get("AIRSWEEP_COMMIT", "unknown"),
        "dirty": os.environ.get("AIRSWEEP_DIRTY", ""),  # digest of what was not committed
    }


@cache
def versions() -> Mapping[str, str]:
    """Versions of what results depend on, without importing it."""
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}

"""What exists: artifacts by content key. Knows no stage, no sweep, no cluster.

`runs/artifacts/<stage>/v<recipe>/<slug>-<digest12>/`. An artifact is built in a folder beside its
place and renamed; its record is written last, so a folder with a record is whole. A row (images,
their features) is never whole: it has shards, each renamed into place. All paths inside are
relative: the store can be moved. A record holds the digests of its files; records and shards are
sealed (`seal.py`), so that a changed byte can be found. Who builds something that others may want
too holds its lock below `locks/`; a lock saves work, and what is right never hangs on it.

Where the files lie, in a folder or in a bucket, is the business of the backend (`backends.py`).
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from air_core.seal import sealed_json
from orchestrator.errors import DamagedArtifact, MissingArtifact, StoreRefused
from orchestrator.files import barred, file_digest, make_folders, sync, write_whole
from orchestrator.keys import RECIPES, ArtifactKey, Stage, artifact_key
from orchestrator.store import code_version
from orchestrator.store._locks import Locks
from orchestrator.store.backends import RECORD, FolderBackend, open_backend
from orchestrator.store.buckets import folder_of, is_bucket
from orchestrator.store.rows import Row
from orchestrator.store.verification import read_record, verify_files

ROW = "row.json"  # of a row, as record.json is of an artifact
UNFINISHED = "unfinished"  # folder: what long work has so far, `<12 digits of its key>`
ROWS = ("images", "synthetic")  # stages that are rows
DAMAGED = ".damaged-"  # how names of damaged artifacts and shards begin that were set aside
WRITTEN = ("*", "artifacts/*", "artifacts/*/*", "sweeps/*", "mlartifacts/*/*")  # folders, by a run
DEVICES = "AIRSWEEP_DEVICES"  # what the cluster has given to this process, as JSON
LIBRARIES = ("torch", "open_clip_torch", "diffusers", "peft", "transformers", "numpy")


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


class ArtifactStore:
    """Artifacts in a folder, or where a backend keeps them. `read_only()` cannot build."""

    def __init__(self, place: Path | FolderBackend, *, writable: bool = True) -> None:
        self.backend = FolderBackend(place) if isinstance(place, Path) else place
        self.root = self.backend.root
        self.artifacts = self.root / "artifacts"
        self.writable = writable
        self.locks = Locks(self.backend)

    def __reduce__(self) -> Any:
        return _reopened, (self.backend, self.writable)

    @property
    def name(self) -> str:
        """As people would give it with --store."""
        return self.backend.name

    def read_only(self) -> ArtifactStore:
        return ArtifactStore(self.backend, writable=False)

    def survey(self, specs: Iterable[Stage]) -> None:
        """Many will be asked for: of a bucket, learn in few requests which are there."""
        self.backend.survey(self._place(spec) for spec in specs)

    def fetch(self, specs: Iterable[Stage]) -> None:
        """Many that are there will be read: of a bucket, bring them here side by side.

        Raises:
            MissingArtifact: a file of one is gone or damaged in the bucket.
        """
        self._bring(self._place(spec) for spec in specs)

    def _bring(self, folders: Iterable[Path]) -> bool:
        try:
            return self.backend.bring(folders)
        except ValueError as problem:
            raise MissingArtifact(str(problem)) from None

    def look_again(self) -> None:
        """Other processes have made something; what was not there may be there now."""
        self.backend.look_again()

    def settle(self) -> None:
        """Before the first thing is written: say which version of a store this is.

        Raises:
            StoreRefused: a folder of somebody else's, or a server that does not keep what was put.
        """
        for place in itertools.chain([self.root], *map(self.root.glob, WRITTEN)):
            if place.is_dir() and not os.access(place, os.W_OK, effective_ids=True):
                raise StoreRefused(barred(place))
        if not (self.root / "VERSION").exists():
            self.backend.settle()

    # ---------------------------------------------------------------- small files

    def write(self, path: Path, content: str | bytes) -> None:
        """A small file of the store: there whole or not at all, for everybody."""
        self.backend.write(path, content.encode() if isinstance(content, str) else content)

    def refresh(self, path: Path) -> Path:
        """A small file of the store as it is now, where there is one."""
        self.backend.pull([path])
        return path

    def path(self, key: ArtifactKey) -> Path:
        """Where it lies, or would lie. The digest decides; the slug is for people."""
        # Of a bucket: once it was pulled.
        place = self.artifacts / str(key)
        if not place.exists():
            others = place.parent.glob(f"*-{key.digest[:12]}") if place.parent.is_dir() else ()
            return next(iter(others), place)
        return place

    def _place(self, spec: Stage) -> Path:
        return self.path(artifact_key(spec))

    def has(self, spec: Stage) -> bool:
        return self.backend.has(self._place(spec))

    def get(self, spec: Stage) -> Artifact:
        """A whole artifact, its content compared with its record (see `verification`).

        Raises:
            MissingArtifact: it is not there.
            DamagedArtifact: a file of it was changed.
        """
        key, record = artifact_key(spec), self.record(spec)
        path = self.path(key)
        if self._bring([path]):
            record = self.record(spec)  # it may have been made again
        verify_files(path, record)
        return Artifact(key, path, record)

    def record(self, spec: Stage) -> dict[str, Any]:
        """The record of an artifact, whose other files are not looked at. Raises as `get`."""
        key = artifact_key(spec)
        record = self.backend.record(self.path(key))
        if record is None:
            raise MissingArtifact(f"{key} is not in {self.name}; run `airsweep prepare SPEC` first")
        return record

    def check(self, spec: Stage) -> None:
        """Compare an artifact with its record, where it is on this machine. Raises as `get`."""
        if (self._place(spec) / RECORD).exists():
            self.get(spec)

    def set_aside(self, damaged: DamagedArtifact) -> None:
        """Rename what is damaged, so that it counts as missing and `cache gc` removes it later.

        Of a store in a bucket the copy of this machine is removed, and the next reader brings it
        again.

        Raises:
            OSError: this user may not rename it.
            DamagedArtifact: there is no copy here, so the damage is in the bucket.
        """
        path = damaged.path
        hidden = path.with_name(f"{DAMAGED}{path.name}-{uuid.uuid4().hex[:8]}")
        if not self.backend.set_aside(path, hidden):
            raise damaged

    def bytes(self, spec: Stage) -> int:
        """Of what is there of an artifact or a row."""
        return self.backend.size(self._place(spec))

    def named(self, kind: type, digest: str) -> list[Path]:
        """Folders of artifacts of the present recipe whose digests begin like this."""
        stage, recipe = RECIPES[kind]
        folder = self.artifacts / stage / f"v{recipe}"
        self.backend.bring_named(folder, digest[:12])
        found = [path for path in folder.glob(f"*-{digest[:12]}*") if (path / RECORD).is_file()]
        return [
            path
            for path in sorted(found)
            if str(read_record(path / RECORD).get("digest")).startswith(digest)
        ]

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
            with self.locks.turn(artifact_key(spec).digest):
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
        make_folders(place.parent)
        work = place.parent / f".{key.digest[:12]}-{uuid.uuid4().hex[:8]}"
        work.mkdir()
        try:
            started = time.time()
            made = Building(work)
            yield made
            # safetensors writes files for its user alone; the folder has what the umask says.
            allowed = work.stat().st_mode & 0o666
            for file in work.iterdir():
                file.chmod(allowed)
                sync(file)
            sync(work)  # before the record says that all of it is there
            record = {
                "key": str(key),
                "digest": key.digest,
                "spec": asdict(spec),
                "info": made.info,
                "started": started,
                "seconds": round((time.time() - started) * share + made.before, 3),
                "host": socket.gethostname(),
                **maker(),
                **devices(),
                "code": code_version.version(key.stage),
                "versions": versions(),
                "files": {p.name: file_digest(p) for p in sorted(work.iterdir())},
            }
            self.backend.publish(place, work, sealed_json(record))
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def unfinished(self, spec: Stage) -> Path:
        """A file for work that takes long. The backend pulls, pushes and removes it."""
        return self.root / UNFINISHED / f"{artifact_key(spec).digest[:12]}.safetensors"

    def row(self, spec: Stage) -> Row:
        """A row; its folder and `row.json` are written when the first shard is."""
        key = artifact_key(spec)
        return Row(key, self.path(key), self.backend)

    def open_row(self, spec: Stage) -> Row:
        """A row that shards can be written to."""
        row = self.row(spec)
        if not self.writable:
            raise MissingArtifact(f"{row.key}: this store is read-only")
        row.path.mkdir(parents=True, exist_ok=True)
        self.backend.pull([row.path / ROW], anew=False)
        if not (row.path / ROW).exists():
            known = {
                "digest": row.key.digest,
                "spec": asdict(spec),
                "started": time.time(),
                **maker(),
                "code": code_version.version(row.key.stage),
            }
            place = row.path / ROW
            write_whole(place, self.backend.put_once(place, sealed_json(known)))
        return row


def open_store(place: Path | str) -> ArtifactStore:
    """The store in a folder or in a bucket, as a command opens it; raises as `open_backend`."""
    return ArtifactStore(open_backend(place))


def smoke_store(place: Path | str) -> Path | str:
    """Where `--smoke` goes: beside the store.

    >>> smoke_store("runs"), smoke_store("s3://bucket/team/runs?region=eu-1"), smoke_store("s3://b")
    (PosixPath('runs-smoke'), 's3://bucket/team/runs-smoke?region=eu-1', 's3://b/smoke')
    """
    if is_bucket(place):
        name, mark, query = str(place).partition("?")
        name = name.rstrip("/")
        beside = f"{name}-smoke" if "/" in name.partition("://")[2] else f"{name}/smoke"
        return beside + mark + query
    folder = folder_of(place)
    return folder.with_name(folder.name + "-smoke")


def _reopened(backend: FolderBackend, writable: bool) -> ArtifactStore:
    return ArtifactStore(backend, writable=writable)


def maker() -> dict[str, str]:
    """Who makes things here, with what code; the driver tells its workers."""
    return {
        "user": os.environ.get("AIRSWEEP_USER", "unknown"),
        "commit": os.environ.get("AIRSWEEP_COMMIT", "unknown"),
        "dirty": os.environ.get("AIRSWEEP_DIRTY", ""),  # digest of what was not committed
    }


def devices() -> dict[str, float]:
    """Cores and GPUs, or shares of them, that this process holds; empty where nobody said."""
    found: dict[str, float] = json.loads(os.environ.get(DEVICES) or "{}")
    return {name: found[name] for name in ("cpu", "gpu") if name in found}


@cache
def versions() -> Mapping[str, str]:
    """Versions of what results depend on, without importing it."""
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}

"""Artifact store: artifacts by content key. Imports no stage, sweep or cluster module.

Layout: `artifacts/<stage>/v<recipe>/<slug>-<digest12>/`. An artifact is built in a temporary folder
beside its path and then renamed. Its record is written last, so a folder with a record is complete.
A row (images, or their features) has no final state: it grows by shards, and each shard is renamed
into place. All paths inside are relative, so the store can be moved. A record contains the digests
of its files. Records and shards carry a checksum (`air_core/tools/seal.py`): it reveals a changed
byte.

Builders hold a lock below `locks/` while they build. Locks only avoid duplicate work; correctness
does not depend on them. `storage.py` keeps the files in a folder or in a bucket.
"""

from __future__ import annotations

import getpass
import itertools
import json
import os
import platform
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from air_core.tools.seal import sealed_json
from orchestrator.errors import DamagedArtifact, MissingArtifact
from orchestrator.files import file_digest, make_folders, permission_message, sync
from orchestrator.keys import ArtifactKey, Keyed, RowSpec, StageSpec, artifact_key
from orchestrator.store import code_version
from orchestrator.store._locks import Locks
from orchestrator.store.buckets import is_bucket, run_concurrently, store_folder
from orchestrator.store.rows import Row
from orchestrator.store.storage import (
    EVENTS,
    RECORD,
    Bucket,
    Folder,
    initialize,
    open_storage,
)
from orchestrator.store.verification import (
    read_record,
    recorded_files,
    verify_files,
)

ROW = "row.json"  # the record of a row
UNFINISHED = "unfinished"  # folder of checkpoints, named by the first 12 digits of their keys
DAMAGED = ".damaged-"  # prefix of damaged artifacts and shards that were set aside
# Folders that a run writes to.
WRITTEN = ("*", "artifacts/*", "artifacts/*/*", "sweeps/*", "mlartifacts/*/*")
PROVENANCE = ("AIRSWEEP_USER", "AIRSWEEP_COMMIT", "AIRSWEEP_SWEEP")
DEVICES = "AIRSWEEP_DEVICES"  # JSON: the cores and GPUs that the cluster assigned to this process
LIBRARIES = ("torch", "open_clip_torch", "diffusers", "peft", "transformers", "numpy")


@dataclass(frozen=True)
class Artifact:
    """A complete artifact."""

    key: ArtifactKey
    path: Path
    record: dict[str, Any]


@dataclass
class Building:
    """An artifact under construction: its temporary folder and the `info` of its record."""

    folder: Path
    info: dict[str, Any] = field(default_factory=dict)
    earlier_seconds: float = 0.0  # seconds that earlier processes spent on it


class ArtifactStore:
    """Artifacts in a folder or a bucket."""

    def __init__(self, root: Path | Folder | Bucket) -> None:
        self.storage = Folder(root) if isinstance(root, Path) else root
        self.root = self.storage.root
        self.artifacts = self.root / "artifacts"
        self.locks = Locks(self.storage)

    def __reduce__(self) -> Any:
        return ArtifactStore, (self.storage,)

    @property
    def name(self) -> str:
        """The value for --store."""
        return self.storage.name

    def initialize(self) -> None:
        """Write `store.json` if it is missing. Raises as `storage.initialize`."""
        initialize(self.storage)

    def sweeps(self) -> list[tuple[str, str]]:
        """Project and name of each recorded sweep."""
        if isinstance(self.storage, Folder):
            logs = (self.root / "sweeps").glob(f"*/*/{EVENTS}")
            return sorted((log.parent.parent.name, log.parent.name) for log in logs)
        client = self.storage.client
        projects, _ = client.folder("sweeps")
        return [(p, name) for p in projects for name in client.folder(f"sweeps/{p}")[0]]

    def refresh_listings(self) -> None:
        """Forget cached listings, so that new artifacts of other processes are found."""
        self.storage.refresh_listings()

    def check_writable(self) -> None:
        """Check that this user may write to the folders of the store, or create it.

        Raises:
            ValueError: a folder belongs to another user.
        """
        nearest = next(folder for folder in (self.root, *self.root.parents) if folder.is_dir())
        for folder in itertools.chain([nearest], *map(self.root.glob, WRITTEN)):
            if folder.is_dir() and not os.access(folder, os.W_OK, effective_ids=True):
                denied = self.root if folder == nearest else folder
                raise ValueError(f"{permission_message(denied)} with --store")

    # ---------------------------------------------------------------- small files

    def checkpoint_path(self, spec: StageSpec) -> Path:
        """Path of the checkpoint of a spec."""
        return self.root / UNFINISHED / f"{artifact_key(spec).digest[:12]}.safetensors"

    # ---------------------------------------------------------------- reading

    def path(self, key: ArtifactKey) -> Path:
        """Path of an artifact, present or not. In a bucket store it exists after a download.

        The digest identifies the artifact; an existing folder with another slug is found too.
        """
        path = self.artifacts / str(key)
        if not path.exists():
            others = path.parent.glob(f"*-{key.digest[:12]}") if path.parent.is_dir() else ()
            return next(iter(others), path)
        return path

    def _folder(self, spec: Keyed) -> Path:
        return self.path(artifact_key(spec))

    def survey(self, specs: Iterable[Keyed]) -> None:
        """Prepare many `has` calls: list a bucket in few requests."""
        if isinstance(self.storage, Bucket):
            for stage in dict.fromkeys(self._folder(spec).parent for spec in specs):
                self.storage.survey(stage)

    def has(self, spec: Keyed) -> bool:
        return self.storage.has(self._folder(spec) / RECORD)

    def record(self, spec: Keyed) -> dict[str, Any]:
        """The record of an artifact, without reading its other files. Raises as `get`."""
        return self._open(spec, with_files=False).record

    def get(self, spec: Keyed) -> Artifact:
        """A complete artifact whose files were verified against its record (see `verification`).

        Raises:
            MissingArtifact: the artifact does not exist.
            DamagedArtifact: one of its files was changed; in a bucket, one of its objects.
        """
        return self._open(spec, with_files=True)

    def _open(self, spec: Keyed, with_files: bool) -> Artifact:
        key = artifact_key(spec)
        path, is_copy = self.path(key), isinstance(self.storage, Bucket)
        while True:
            try:
                return self._read(key, path, with_files)
            except DamagedArtifact as damaged:
                if not is_copy:
                    name = self.storage.label(path)
                    raise DamagedArtifact(path, damaged.reason, name) from None
            shutil.rmtree(path, ignore_errors=True)  # a damaged or outdated copy: download again
            is_copy = False

    def _read(self, key: ArtifactKey, path: Path, with_files: bool) -> Artifact:
        try:
            file = self.storage.local(path / RECORD)
            record = read_record(file.read_bytes(), file)
        except FileNotFoundError:
            raise MissingArtifact(
                f"{key} is not in {self.name}; run `airsweep run SPEC --prepare` first"
            ) from None
        if record.get("digest") != key.digest:
            raise DamagedArtifact(path, "its record is that of another artifact")
        if with_files:
            files = recorded_files(path, record)
            if isinstance(self.storage, Bucket):
                missing = [name for name in files if not (path / name).exists()]
                run_concurrently(lambda name: self.storage.local(path / name, files[name]), missing)
            verify_files(path, files)
        return Artifact(key, path, record)

    def fetch(self, specs: Iterable[Keyed]) -> None:
        """Prepare many `get` calls: download existing artifacts from a bucket concurrently."""

        def get(spec: Keyed) -> None:
            if self.has(spec):
                self.get(spec)

        if isinstance(self.storage, Bucket):
            run_concurrently(get, [s for s in specs if not (self._folder(s) / RECORD).is_file()])

    def check(self, spec: StageSpec) -> None:
        """Verify the files of an artifact, if it exists. Raises as `get`."""
        if self.has(spec):
            with suppress(MissingArtifact):  # another process has set it aside
                self.get(spec)

    def set_aside(self, damaged: DamagedArtifact) -> None:
        """Let a damaged artifact or shard count as missing.

        In a folder it is renamed, and `cache gc` removes it later. In a bucket the damaged objects
        are deleted or, when the artifact is built again, replaced.

        Raises:
            OSError: this user may not rename it.
        """
        path = damaged.path
        hidden = path.with_name(f"{DAMAGED}{path.name}-{uuid.uuid4().hex[:8]}")
        with suppress(FileNotFoundError):  # another process has renamed it
            os.rename(path, hidden)
        if isinstance(self.storage, Bucket):
            shutil.rmtree(hidden) if hidden.is_dir() else hidden.unlink(missing_ok=True)
            for file in (path / RECORD, path):  # of an artifact; a shard
                self.storage.delete(file)
            self.storage.refresh_listings()

    def bytes(self, spec: StageSpec) -> int:
        """Bytes that an artifact or a row occupies now."""
        return sum(entry.size for entry in self.storage.entries(self._folder(spec), 1))

    def find_by_digest(self, kind: type[StageSpec], digest: str) -> list[dict[str, Any]]:
        """Records of the artifacts of the current recipe whose digests start with `digest`.

        Raises:
            DamagedArtifact: a record was changed.
        """
        stage, found = self.artifacts / kind.stage / f"v{kind.recipe}", []
        for name in sorted({name.partition("/")[0] for name in self.storage.list(stage)}):
            if name.startswith(".") or not name.rpartition("-")[2].startswith(digest[:12]):
                continue
            content = self.storage.get(stage / name / RECORD)
            if content is not None:
                found.append(read_record(content, stage / name / RECORD))
        return [record for record in found if str(record.get("digest")).startswith(digest)]

    # ---------------------------------------------------------------- building

    def get_or_build(self, spec: StageSpec, build: Callable[[Path], dict[str, Any]]) -> Artifact:
        """The artifact; builds it if it is missing.

        Args:
            build: writes files into the given folder and returns the `info` of the record (plain
                data).
        """
        if not self.has(spec):
            # A builder may build the specs nested in its own: locks are acquired upstream, so
            # there is no cycle.
            with self.locks.exclusive(artifact_key(spec).digest):
                if not self.has(spec):  # another process may have built it
                    with self.building(spec) as work:
                        work.info = build(work.folder)
        return self.get(spec)

    @contextmanager
    def building(self, spec: StageSpec, share: float = 1.0) -> Iterator[Building]:
        """Provide a folder to fill; publish it when the block ends without an error.

        The caller holds the exclusive lock of the spec's digest.

        Args:
            share: fraction of the elapsed time that counts for this artifact, where several are
                built side by side.
        """
        key = artifact_key(spec)
        path = self.path(key)
        make_folders(path.parent)
        folder = path.parent / f".{key.digest[:12]}-{uuid.uuid4().hex[:8]}"
        folder.mkdir()
        try:
            started, clock = time.time(), time.monotonic()
            work = Building(folder)
            yield work
            # safetensors makes files private to the user; the folder has the umask's permissions.
            permissions = folder.stat().st_mode & 0o666
            for file in folder.iterdir():
                file.chmod(permissions)
                sync(file)
            record = {
                "key": str(key),
                "digest": key.digest,
                "spec": asdict(spec),
                "info": work.info,
                "started": started,
                "seconds": round((time.monotonic() - clock) * share + work.earlier_seconds, 3),
                "host": socket.gethostname(),
                **provenance(),
                **devices(),
                "code": code_version.stage_version(type(spec)),
                "versions": versions(),
                "files": {p.name: file_digest(p) for p in sorted(folder.iterdir())},
            }
            file = folder / RECORD
            file.write_bytes(sealed_json(record))
            sync(file)
            self.storage.put_once(path, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def row(self, spec: StageSpec) -> Row:
        """A row. Its folder and `row.json` are created by `open_row`."""
        key = artifact_key(spec)
        return Row(key, self.path(key), self.storage, spec.shard)

    def open_row(self, spec: RowSpec) -> Row:
        """A row that accepts shards."""
        row = self.row(spec)
        file = row.path / ROW
        if not self.storage.local(file).exists():
            record = {
                "digest": row.key.digest,
                "spec": asdict(spec),
                # Of a shard; draws of denoising errors have none of their own.
                "info": {} if spec.counts == "pairs" else {"images": spec.block_size},
                "started": time.time(),
                **provenance(),
                "code": code_version.stage_version(type(spec)),
            }
            self.storage.put(file, sealed_json(record))
        return row


def open_store(address: Path | str) -> ArtifactStore:
    """Open the store in a folder or in a bucket, for reading and writing. Raises
    `open_storage`'s errors."""
    return ArtifactStore(open_storage(address))


def smoke_store(address: Path | str) -> Path | str:
    """Address of the store of `--smoke`, beside the given one.

    >>> smoke_store("runs"), smoke_store("s3://bucket/team/runs"), smoke_store("s3://b")
    (PosixPath('runs-smoke'), 's3://bucket/team/runs-smoke', 's3://b/smoke')
    """
    if is_bucket(address):
        name = str(address).rstrip("/")
        return f"{name}-smoke" if "/" in name.partition("://")[2] else f"{name}/smoke"
    folder = store_folder(address)
    return folder.with_name(folder.name + "-smoke")


def store_of_smoke(name: str) -> str:
    """Address of the store beside which `--smoke` wrote: the inverse of `smoke_store`.

    >>> [store_of_smoke(str(smoke_store(name))) for name in ("/runs", "s3://b/runs", "s3://b")]
    ['/runs', 's3://b/runs', 's3://b']
    """
    return name.removesuffix("smoke")[:-1]


def user_name() -> str:
    """User name, for records and tags."""
    try:
        return os.environ.get("AIRSWEEP_USER") or getpass.getuser()
    except (KeyError, OSError):
        return "unknown"


def provenance() -> dict[str, str]:
    """User and commit; workers receive those of the driver."""
    return {
        "user": user_name(),
        "commit": os.environ.get("AIRSWEEP_COMMIT", "unknown"),
    }


def devices() -> dict[str, float]:
    """Cores and GPUs (fractions allowed) assigned to this process; empty if not known."""
    assigned: dict[str, float] = json.loads(os.environ.get(DEVICES) or "{}")
    return {name: assigned[name] for name in ("cpu", "gpu") if name in assigned}


@cache
def versions() -> Mapping[str, str]:
    """Versions of Python and of the libraries that affect results, read without importing them."""
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}

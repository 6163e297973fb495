"""What exists: artifacts by content key. Knows no stage, no sweep, no cluster.

`runs/artifacts/<stage>/v<recipe>/<slug>-<digest12>/`. An artifact is built in a folder beside its
place and renamed; its record is written last, so a folder with a record is whole. A row (images,
their features) is never whole: it has shards, each renamed into place. All paths inside are
relative: the store can be moved. A record holds the digests of its files; records and shards are
sealed (`seal.py`), so that a changed byte can be found. Who builds something that others may want
too holds its lock below `locks/`; a lock saves work, and what is right never hangs on it.

A store may lie in a bucket: then the folder is this machine's mirror of it (`mirror.py`), and what
is there is what the bucket has.
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
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from air_core.seal import sealed_json
from orchestrator import code_version
from orchestrator.files import barred, file_digest, make_folders, sync, write_beside, write_whole
from orchestrator.keys import RECIPES, ArtifactKey, Stage, artifact_key
from orchestrator.locks import Locks, StoreRefused
from orchestrator.mirror import RECORD, Mirror, mirror_root
from orchestrator.remote import S3, folder_of, parse, scheme_of, side_by_side
from orchestrator.rows import Row
from orchestrator.verification import DamagedArtifact, parse_record, read_record, verify_files

VERSION = "1"
ROW = "row.json"  # of a row, as record.json is of an artifact
UNFINISHED = "unfinished"  # folder: what long work has so far, `<12 digits of its key>`
ROWS = ("images", "synthetic")  # stages that are rows
DAMAGED = ".damaged-"  # how names of damaged artifacts and shards begin that were set aside
WRITTEN = ("*", "artifacts/*", "artifacts/*/*", "sweeps/*", "mlartifacts/*/*")  # folders, by a run
DEVICES = "AIRSWEEP_DEVICES"  # what the cluster has given to this process, as JSON
LIBRARIES = ("torch", "open_clip_torch", "diffusers", "peft", "transformers", "numpy")


class MissingArtifact(LookupError):
    """Something that should have been prepared is not there."""


class StoreFull(RuntimeError):
    """The disk of the store has no room left. What is there is whole; run again goes on."""


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
    """Artifacts in a folder, or in a bucket through one. `read_only()` cannot build."""

    def __init__(self, root: Path, *, writable: bool = True, mirror: Mirror | None = None) -> None:
        self.root = root
        self.artifacts = root / "artifacts"
        self.writable = writable
        self.mirror = mirror
        self.locks = Locks(root, mirror)

    def __reduce__(self) -> Any:
        """In another process, perhaps on another machine: with the mirror of that one."""
        if self.mirror is None:
            return _in_folder, (self.root, self.writable)
        return _in_bucket, (self.mirror.remote.uri, self.writable)

    @property
    def name(self) -> str:
        """As people would give it with --store."""
        return str(self.root) if self.mirror is None else self.mirror.remote.uri

    def read_only(self) -> ArtifactStore:
        return ArtifactStore(self.root, writable=False, mirror=self.mirror)

    def survey(self, specs: Iterable[Stage]) -> None:
        """Many will be asked for: of a bucket, learn in few requests which are there."""
        if self.mirror is not None:
            self.mirror.survey(artifact_key(spec) for spec in specs)

    def fetch(self, specs: Iterable[Stage]) -> None:
        """Many that are there will be read: of a bucket, bring them here side by side."""
        if self.mirror is not None:
            missing = [one for one in specs if not (self._place(one) / RECORD).is_file()]
            side_by_side(self.get, missing)

    def glance(self, specs: Iterable[Stage]) -> None:
        """The records of many will be read: of a bucket, bring them here side by side."""
        if self.mirror is not None:
            mirror = self.mirror
            whole = (one for one in specs if RECIPES[type(one)][0] not in ROWS)
            there = (artifact_key(one) for one in whole if self.has(one))
            side_by_side(mirror.record, list(there))

    def look_again(self) -> None:
        """Other processes have made something; what was not there may be there now."""
        if self.mirror is not None:
            self.mirror.look_again()

    def settle(self) -> None:
        """Before the first thing is written: say which version of a store this is.

        Raises:
            StoreRefused: a folder of somebody else's, or a server that does not keep what was put.
        """
        for place in itertools.chain([self.root], *map(self.root.glob, WRITTEN)):
            if place.is_dir() and not os.access(place, os.W_OK, effective_ids=True):
                raise StoreRefused(barred(place))
        place = self.root / "VERSION"
        if place.exists():
            return
        self.root.mkdir(parents=True, exist_ok=True)
        if self.mirror is None:
            write_whole(place, VERSION + "\n")
            return
        remote = self.mirror.remote
        remote.put_once("VERSION", f"{VERSION} {uuid.uuid4().hex}\n".encode())
        if remote.put_once("VERSION", f"{VERSION} another\n".encode()):
            remote.delete("VERSION")
            raise StoreRefused(
                f"the server of {remote} writes over objects that were to be put once "
                "(If-None-Match), so two machines could spoil each other's work; allowed: one that "
                "refuses, such as Amazon S3 or a recent MinIO; or a folder with --store"
            )
        self.mirror.pull_file(place)

    # ---------------------------------------------------------------- small files

    def write(self, path: Path, content: str | bytes) -> None:
        """A small file of the store: there whole or not at all, for everybody."""
        data = content.encode() if isinstance(content, str) else content
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, data)
        if self.mirror is not None:
            self.mirror.push_data(path, data)

    def refresh(self, path: Path) -> Path:
        """A small file of the store as it is now, where there is one."""
        if self.mirror is not None:
            self.mirror.pull_file(path)
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
        if self.mirror is not None:
            return self.mirror.has(artifact_key(spec))
        return (self._place(spec) / RECORD).is_file()

    def get(self, spec: Stage) -> Artifact:
        """A whole artifact, its content compared with its record (see `verification`).

        Raises:
            MissingArtifact: it is not there.
            DamagedArtifact: a file of it was changed.
        """
        key, record = artifact_key(spec), self.record(spec)
        path = self.path(key)
        if self.mirror is not None and not (path / RECORD).is_file():
            try:
                self.mirror.pull(key, path)
            except ValueError as problem:
                raise MissingArtifact(str(problem)) from None
            record = self.record(spec)  # it may have been made again
        verify_files(path, record)
        return Artifact(key, path, record)

    def record(self, spec: Stage) -> dict[str, Any]:
        """The record of an artifact, whose other files are not looked at. Raises as `get`."""
        key = artifact_key(spec)
        file = self.path(key) / RECORD
        if self.mirror is None or file.is_file():
            with suppress(FileNotFoundError):
                return read_record(file)
        elif (data := self.mirror.record(key)) is not None:
            return parse_record(data, file, self.mirror.called(key, RECORD))
        raise MissingArtifact(f"{key} is not in {self.name}; run `airsweep prepare SPEC` first")

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
        if self.mirror is not None and not path.exists():
            raise damaged
        hidden = path.with_name(f"{DAMAGED}{path.name}-{uuid.uuid4().hex[:8]}")
        with suppress(FileNotFoundError):  # another driver was faster
            os.rename(path, hidden)
            if self.mirror is not None:
                shutil.rmtree(hidden) if hidden.is_dir() else hidden.unlink()

    def bytes(self, spec: Stage) -> int:
        """Of what is there of an artifact or a row."""
        if self.mirror is not None:
            return sum(self.mirror.shards(artifact_key(spec)).values())
        return sum(file.stat().st_size for file in self._place(spec).glob("*"))

    def named(self, kind: type, digest: str) -> list[Path]:
        """Folders of artifacts of the present recipe whose digests begin like this."""
        stage, recipe = RECIPES[kind]
        if self.mirror is not None:
            self._bring_named(stage, recipe, digest)
        folder = self.artifacts / stage / f"v{recipe}"
        found = [path for path in folder.glob(f"*-{digest[:12]}*") if (path / RECORD).is_file()]
        return [
            path
            for path in sorted(found)
            if str(read_record(path / RECORD).get("digest")).startswith(digest)
        ]

    def _bring_named(self, stage: str, recipe: int, digest: str) -> None:
        assert self.mirror is not None
        folder = f"artifacts/{stage}/v{recipe}"
        for name in self.mirror.remote.folders(folder):
            if name.startswith(digest[:12]):
                record = json.loads(self.mirror.remote.get(f"{folder}/{name}/{RECORD}") or b"{}")
                if record:
                    slug = record["key"].rpartition("/")[2].rpartition("-")[0]
                    key = ArtifactKey(stage, recipe, record["digest"], slug)
                    self.mirror.pull(key, self.path(key))

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
            sealed = sealed_json(record)
            if self.mirror is not None:
                if not self.mirror.publish(key, work, sealed):
                    return  # who asks gets the one that was first
                shutil.rmtree(place, ignore_errors=True)  # of a store that was emptied by hand
            write_whole(work / RECORD, sealed)
            try:
                os.rename(work, place)
            except OSError:
                # Somebody else was faster, and the same key is the same thing; or a folder that
                # lost its record is in the way, and what has no record is nothing.
                if not (place / RECORD).is_file():
                    shutil.rmtree(place)
                    os.rename(work, place)
            sync(place.parent)
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def refuse_bucket(self, why: str) -> None:
        """
        Raises:
            StoreRefused: this store is in a bucket.
        """
        if self.mirror is not None:
            raise StoreRefused(
                f"{self.name}: {why}; `airsweep cache ls` says what no sweep needs: of an artifact "
                f"remove {RECORD} first, then the rest, with the tools of your storage, while no "
                "sweep runs"
            )

    def unfinished(self, spec: Stage) -> Unfinished:
        """A file for work that takes long."""
        name = f"{artifact_key(spec).digest[:12]}.safetensors"
        return Unfinished(self.root / UNFINISHED / name, self.mirror)

    def row(self, spec: Stage) -> Row:
        """A row; its folder and `row.json` are written when the first shard is."""
        key = artifact_key(spec)
        return Row(key, self.path(key), self.mirror)

    def open_row(self, spec: Stage) -> Row:
        """A row that shards can be written to."""
        row = self.row(spec)
        if not self.writable:
            raise MissingArtifact(f"{row.key}: this store is read-only")
        row.path.mkdir(parents=True, exist_ok=True)
        if not (row.path / ROW).exists() and self.mirror is not None:
            self.mirror.pull_shards(row.key, row.path, [ROW])
        if not (row.path / ROW).exists():
            known = {
                "digest": row.key.digest,
                "spec": asdict(spec),
                "started": time.time(),
                **maker(),
                "code": code_version.version(row.key.stage),
            }
            sealed = sealed_json(known)
            if self.mirror is not None:
                sealed = self.mirror.put_shard(row.key, ROW, sealed)
            write_whole(row.path / ROW, sealed)
        return row


@dataclass
class Unfinished:
    """A file that somebody writes again and again while his work goes on."""

    path: Path
    mirror: Mirror | None
    sent: int = 0  # mtime of what the bucket has, in ns

    def bring(self, anew: bool = False) -> None:
        """Of a bucket: what another machine has left of it.

        Args:
            anew: over what is here, since others may have gone on with it.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.mirror is not None and (anew or not self.path.exists()):
            self.mirror.pull_file(self.path)
            self._note()

    def keep(self) -> None:
        """Send it where other machines find it, if it was written since."""
        before = self.sent
        self._note()
        if self.mirror is not None and self.sent != before:
            self.mirror.push(self.path)

    def drop(self) -> None:
        """The work is done."""
        if self.path.exists():
            self.path.unlink(missing_ok=True)
            if self.mirror is not None:
                self.mirror.delete(self.path)

    def _note(self) -> None:
        self.sent = self.path.stat().st_mtime_ns if self.path.exists() else self.sent


def open_store(place: Path | str) -> ArtifactStore:
    """The store in a folder or in a bucket, as a command opens it; there may be nothing yet.

    Args:
        place: a path, `file:///...` or `s3://bucket/prefix`.

    Raises:
        StoreRefused: another version made it, or this machine's mirror is of another store.
        RemoteAway: the bucket cannot be read.
        ValueError: it is no folder, or such a URI means no store.
    """
    if scheme_of(place) == S3:
        return _in_bucket(str(place))
    root = folder_of(place)
    if root.exists() and not root.is_dir():
        raise ValueError(f"{root} is a file; a store is a folder: choose another with --store")
    _refuse_version(_said(root / "VERSION"), root)
    return ArtifactStore(root.absolute())


def smoke_store(place: Path | str) -> Path | str:
    """Where `--smoke` goes: beside the store.

    >>> smoke_store("runs"), smoke_store("s3://bucket/team/runs?region=eu-1"), smoke_store("s3://b")
    (PosixPath('runs-smoke'), 's3://bucket/team/runs-smoke?region=eu-1', 's3://b/smoke')
    """
    if scheme_of(place) == S3:
        name, mark, query = str(place).partition("?")
        name = name.rstrip("/")
        beside = f"{name}-smoke" if "/" in name.removeprefix("s3://") else f"{name}/smoke"
        return beside + mark + query
    folder = folder_of(place)
    return folder.with_name(folder.name + "-smoke")


def _in_folder(root: Path, writable: bool) -> ArtifactStore:
    return ArtifactStore(root, writable=writable)


def _in_bucket(uri: str, writable: bool = True) -> ArtifactStore:
    remote = parse(uri)
    root = mirror_root(remote)
    there = (remote.get("VERSION") or b"").decode()
    _refuse_version(there.partition(" ")[0] or VERSION, remote)
    here = _said(root / "VERSION")
    if here and here != there.strip():
        raise StoreRefused(
            f"{root} mirrors a store that was at {remote} before and is gone; remove that folder, "
            "or set AIRSWEEP_CACHE to another place for mirrors"
        )
    if there and not here:
        write_beside(root / "VERSION", there.encode())
    return ArtifactStore(root, writable=writable, mirror=Mirror(remote, root))


def _said(version: Path) -> str | None:
    try:
        return version.read_text(errors="replace").strip()
    except FileNotFoundError:
        return None  # an empty folder: the first run writes it
    except IsADirectoryError:
        return "a folder"


def _refuse_version(found: str | None, place: object) -> None:
    if found is not None and found.strip() != VERSION:
        raise StoreRefused(
            f"{place} is a store of version {found[:20]!r}; this airsweep reads version {VERSION} "
            "alone: use the airsweep that made it, or another folder with --store; if VERSION "
            f"there was damaged, replace it by a file that holds {VERSION}"
        )


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

"""What exists: artifacts by content key. Knows no stage, no sweep, no cluster.

`runs/artifacts/<stage>/v<recipe>/<slug>-<digest12>/`. An artifact is built in a folder beside its
place and renamed; its record is written last, so a folder with a record is whole. A row (images,
their features) is never whole: it has shards, each renamed into place. All paths inside are
relative: the store can be moved.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from orchestrator.keys import ArtifactKey, Stage, artifact_key

VERSION = "1"
RECORD, ROW = "record.json", "row.json"  # of an artifact, and of a row
LIBRARIES = ("torch", "open_clip_torch", "diffusers", "peft", "transformers", "numpy")


class MissingArtifact(LookupError):
    """Something that should have been prepared is not there."""


@dataclass(frozen=True)
class Artifact:
    """A whole artifact."""

    key: ArtifactKey
    path: Path
    record: dict[str, Any]


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
        if self.has(spec) or not self.writable:
            return self.get(spec)
        key = artifact_key(spec)
        place = self.path(key)
        place.parent.mkdir(parents=True, exist_ok=True)
        work = place.parent / f".{key.digest[:12]}-{uuid.uuid4().hex[:8]}"
        work.mkdir()
        try:
            started = time.time()
            info = build(work)
            record = {
                "key": str(key),
                "digest": key.digest,
                "spec": asdict(spec),
                "info": info,
                "started": started,
                "seconds": round(time.time() - started, 3),
                "host": socket.gethostname(),
                **maker(),
                "versions": versions(),
                "files": {p.name: file_digest(p) for p in sorted(work.iterdir())},
            }
            write_whole(work / RECORD, json.dumps(record, indent=1, sort_keys=True))
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
        return self.get(spec)

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
            known = {"digest": row.key.digest, "spec": asdict(spec), "started": time.time()}
            write_whole(row.path / ROW, json.dumps({**known, **maker()}, indent=1, sort_keys=True))
        return row


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


def versions() -> dict[str, str]:
    """Versions of what results depend on, without importing it."""
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}

"""Rows: one shard per class and block, with images or with their features."""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from air_core.tools.seal import intact
from orchestrator.errors import DamagedArtifact
from orchestrator.keys import ArtifactKey
from orchestrator.store.buckets import run_concurrently
from orchestrator.store.storage import Bucket, Folder

DEATHS = 2  # processes that a shard may kill before it counts as failed
SHARD = re.compile(r"(\d{4,})-(\d{5,})\.[a-z]+")  # class and block in the name of a shard
MARKER = ".tries"  # suffix of the files that count them


@dataclass(frozen=True)
class Row:
    """A row of shards, one per class and block."""

    key: ArtifactKey
    path: Path
    storage: Folder | Bucket
    suffix: str  # of shards

    def shard(self, class_index: int, block: int) -> Path:
        """Path of a shard. In a bucket store the file exists after `read`."""
        return self.path / f"{class_index:04d}-{block:05d}{self.suffix}"

    def existing_shards(self) -> frozenset[tuple[int, int]]:
        """(class, block) of the existing shards."""
        shards = filter(None, map(SHARD.fullmatch, self.storage.list(self.path)))
        return frozenset((int(shard[1]), int(shard[2])) for shard in shards)

    def has_shard(self, class_index: int, block: int) -> bool:
        """Whether a shard exists now, without using a cached listing."""
        return self.storage.has(self.shard(class_index, block))

    def pull(self, shards: Collection[tuple[int, int]]) -> None:
        """Download shards that exist to this machine."""
        if isinstance(self.storage, Bucket):
            run_concurrently(self.storage.local, [self.shard(c, block) for c, block in shards])

    def read(self, class_index: int, block: int) -> bytes:
        """Content of a shard, downloaded first if necessary.

        Raises:
            DamagedArtifact: the shard has no valid checksum.
            FileNotFoundError: the shard does not exist.
        """
        shard = self.shard(class_index, block)
        for fresh in (False, True):  # the copy of an object may be damaged or outdated
            data = self.storage.local(shard, fresh=fresh).read_bytes()
            if intact(data):
                return data
        raise DamagedArtifact(shard, "it has no valid checksum", self.storage.label(shard))

    def check(self, class_index: int, block: int) -> None:
        """Verify a shard if this machine has a copy. Raises DamagedArtifact as `read`."""
        if self.shard(class_index, block).exists():
            self.read(class_index, block)

    def publish(self, class_index: int, block: int, data: bytes) -> None:
        """Write a shard atomically, unless it exists."""
        self.storage.put_once(self.shard(class_index, block), data)

    def remove(self) -> None:
        """Remove the row with all its shards. A process that makes a shard now may leave it."""
        self.storage.refresh_listings()
        for name in self.storage.list(self.path):
            self.storage.delete(self.path / name)
        self.storage.refresh_listings()
        shutil.rmtree(self.path, ignore_errors=True)

    @contextmanager
    def count_crashes(self, class_index: int, block: int) -> Iterator[int]:
        """Number of processes, on any machine, that died in this context for the same shard; at
        most DEATHS."""
        shard = self.shard(class_index, block)
        markers = [shard.with_suffix(f".{n}{MARKER}") for n in range(DEATHS)]
        created = (n for n, marker in enumerate(markers) if self.storage.put_once(marker, b""))
        crashes = next(created, DEATHS)
        try:
            yield crashes
        finally:  # a killed process does not get here and leaves its marker
            for marker in markers[: crashes + 1]:
                self.storage.delete(marker)

    def reset_crashes(self) -> None:
        """Reset the counts of all shards, after a process was stopped that no shard has killed."""
        for name in self.storage.list(self.path):
            if name.endswith(MARKER):
                self.storage.delete(self.path / name)

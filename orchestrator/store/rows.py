"""Rows: one shard per class and block, with images or with their features."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from air_core.seal import intact
from orchestrator.errors import DamagedArtifact
from orchestrator.files import write_atomic_unsynced
from orchestrator.keys import ArtifactKey
from orchestrator.store.backends import FolderBackend

DEATHS = 2  # processes that a shard may kill before it counts as failed
MARKER = ".tries"  # suffix of the files that count them


@dataclass(frozen=True)
class Row:
    """A row of shards, one per class and block."""

    key: ArtifactKey
    path: Path
    backend: FolderBackend
    suffix: str  # of shards

    def shard(self, class_index: int, block: int) -> Path:
        """Path of a shard. In a bucket store the file exists after `pull`."""
        return self.path / f"{class_index:04d}-{block:05d}{self.suffix}"

    def existing_shards(self) -> frozenset[tuple[int, int]]:
        """(class, block) of the existing shards."""
        shards, suffix = set(), self.suffix
        for name in self.backend.names(self.path):
            if name.endswith(suffix) and not name.startswith("."):
                class_index, _, block = name.removesuffix(suffix).partition("-")
                shards.add((int(class_index), int(block)))
        return frozenset(shards)

    def has_shard(self, class_index: int, block: int) -> bool:
        """Whether a shard exists now, without using a cached listing."""
        return self.backend.exists(self.shard(class_index, block))

    def pull(self, shards: Collection[tuple[int, int]]) -> None:
        """Download shards that exist to this machine."""
        self.backend.pull((self.shard(c, block) for c, block in shards), overwrite=False)

    def read(self, class_index: int, block: int) -> bytes:
        """Content of a shard, downloaded first if necessary.

        Raises:
            DamagedArtifact: the shard has no valid checksum.
            FileNotFoundError: the shard does not exist.
        """
        self.pull([(class_index, block)])
        shard = self.shard(class_index, block)
        data = shard.read_bytes()
        if not intact(data):
            label = self.backend.label(shard)
            name = label if label == str(shard) else f"{label} or its copy {shard}"
            raise DamagedArtifact(shard, "it has no valid checksum", name)
        return data

    def check(self, class_index: int, block: int) -> None:
        """Verify a shard if this machine has a copy. Raises DamagedArtifact as `read`."""
        if self.shard(class_index, block).exists():
            self.read(class_index, block)

    def publish(self, class_index: int, block: int, data: bytes) -> None:
        """Write a shard atomically. An existing shard in a bucket is kept instead."""
        file = self.shard(class_index, block)
        data = self.backend.put_once(file, data)
        # Not synced: thousands of syncs are slow on a shared file system. If a power cut damages a
        # shard, its checksum reveals that, and the block is generated again.
        write_atomic_unsynced(file, data)

    def remove(self) -> None:
        """Remove the row with all its shards. A process that makes a shard now may leave it."""
        self.backend.refresh_listings()
        for name in self.backend.names(self.path):
            self.backend.remove(self.path / name)
        self.backend.refresh_listings()
        shutil.rmtree(self.path, ignore_errors=True)

    @contextmanager
    def count_crashes(self, class_index: int, block: int) -> Iterator[int]:
        """Number of processes, on any machine, that died in this context for the same shard; at
        most DEATHS."""
        markers = self._markers(class_index, block)
        created = (n for n, marker in enumerate(markers) if self.backend.create_marker(marker))
        crashes = next(created, DEATHS)
        try:
            yield crashes
        finally:  # a killed process does not get here and leaves its marker
            for marker in markers[: crashes + 1]:
                self.backend.remove(marker)

    def reset_crashes(self) -> None:
        """Reset the counts of all shards, after a process was stopped that no shard has killed."""
        for name in self.backend.names(self.path):
            if name.endswith(MARKER):
                self.backend.remove(self.path / name)

    def _markers(self, class_index: int, block: int) -> list[Path]:
        shard = self.shard(class_index, block)
        return [shard.with_suffix(f".{n}{MARKER}") for n in range(DEATHS)]

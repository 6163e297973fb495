"""A row of shards, one per class and block: images, or what CLIP makes of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from air_core.seal import intact
from orchestrator.errors import DamagedArtifact
from orchestrator.files import write_beside
from orchestrator.keys import ArtifactKey
from orchestrator.store.backends import FolderBackend


@dataclass(frozen=True)
class Row:
    """A row of shards, one per class and block."""

    key: ArtifactKey
    path: Path
    backend: FolderBackend

    def shard(self, class_index: int, block: int, suffix: str) -> Path:
        """Where a shard lies, or would lie; of a bucket, once it was pulled."""
        return self.path / f"{class_index:04d}-{block:05d}{suffix}"

    def present(self, suffix: str) -> frozenset[tuple[int, int]]:
        """(class, block) of the shards that are there."""
        found = set()
        for name in self.backend.names(self.path):
            if name.endswith(suffix) and not name.startswith("."):
                c, _, block = name.removesuffix(suffix).partition("-")
                found.add((int(c), int(block)))
        return frozenset(found)

    def holds(self, class_index: int, block: int, suffix: str) -> bool:
        """Is a shard there, as of now?"""
        return self.backend.exists(self.shard(class_index, block, suffix))

    def called(self, shard: Path) -> str:
        """A shard, for who should remove it."""
        label = self.backend.label(shard)
        return label if label == str(shard) else f"{label} or its copy {shard}"

    def pull(self, shards: Collection[tuple[int, int]], suffix: str) -> None:
        """Bring shards to this machine, those that are there."""
        self.backend.pull((self.shard(c, block, suffix) for c, block in shards), anew=False)

    def read(self, class_index: int, block: int, suffix: str) -> bytes:
        """The content of a shard, of a bucket brought here first. Shards from before there were
        checksums are taken as they are.

        Raises:
            DamagedArtifact: its checksum does not fit.
            FileNotFoundError: it does not exist.
        """
        self.pull([(class_index, block)], suffix)
        shard = self.shard(class_index, block, suffix)
        data = shard.read_bytes()
        if intact(data) is False:
            raise DamagedArtifact(shard, "its checksum does not fit", self.called(shard))
        return data

    def check(self, class_index: int, block: int, suffix: str) -> None:
        """Read a shard, where it is on this machine. Raises DamagedArtifact as `read`."""
        if self.shard(class_index, block, suffix).exists():
            self.read(class_index, block, suffix)

    def publish(self, class_index: int, block: int, suffix: str, data: bytes) -> None:
        """A shard is there, whole; the one of whoever was first."""
        place = self.shard(class_index, block, suffix)
        data = self.backend.put_once(place, data)
        # Not synced: a power cut may damage shards, which their seals tell, and what is lost is
        # drawn again. Thousands of syncs on a shared file system would cost more.
        write_beside(place, data)

    @contextmanager
    def deaths_counted(self, class_index: int, block: int, most: int) -> Iterator[int]:
        """How many processes died within this block for this shard, up to `most`; counted where
        every machine sees it."""
        marks = self._marks(class_index, block, most)
        deaths = next((n for n, mark in enumerate(marks) if self.backend.mark(mark)), most)
        try:
            yield deaths
        finally:  # who is killed does not come here
            for mark in marks[: deaths + 1]:
                self.backend.remove(mark)

    def forget_deaths(self, class_index: int, block: int, most: int) -> None:
        """Its last process was ended by us, and not by the shard: count anew."""
        for mark in self._marks(class_index, block, most):
            self.backend.remove(mark)

    def _marks(self, class_index: int, block: int, most: int) -> list[Path]:
        return [self.shard(class_index, block, f".{n}.tries") for n in range(most)]

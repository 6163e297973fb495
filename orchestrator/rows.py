"""A row of shards, one per class and block: images, or what CLIP makes of them."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from air_core.seal import intact
from orchestrator.files import write_beside
from orchestrator.keys import ArtifactKey
from orchestrator.mirror import Mirror
from orchestrator.verification import DamagedArtifact


@dataclass(frozen=True)
class Row:
    """A row of shards, one per class and block."""

    key: ArtifactKey
    path: Path
    mirror: Mirror | None = None

    def shard(self, class_index: int, block: int, suffix: str) -> Path:
        """Where a shard lies, or would lie; of a bucket, once it was pulled."""
        return self.path / f"{class_index:04d}-{block:05d}{suffix}"

    def present(self, suffix: str) -> frozenset[tuple[int, int]]:
        """(class, block) of the shards that are there."""
        names: Iterable[str] = ()
        if self.mirror is not None:
            names = self.mirror.shards(self.key)
        elif self.path.is_dir():
            names = os.listdir(self.path)
        found = set()
        for name in names:
            if name.endswith(suffix) and not name.startswith("."):
                c, _, block = name.removesuffix(suffix).partition("-")
                found.add((int(c), int(block)))
        return frozenset(found)

    def holds(self, class_index: int, block: int, suffix: str) -> bool:
        """Is a shard there, as of now?"""
        place = self.shard(class_index, block, suffix)
        if self.mirror is not None:
            return self.mirror.has_shard(self.key, place.name)
        return place.exists()

    def called(self, shard: Path) -> str:
        """A shard, for who should remove it."""
        if self.mirror is None:
            return str(shard)
        return f"{self.mirror.called(self.key, shard.name)} or its copy {shard}"

    def pull(self, shards: Collection[tuple[int, int]], suffix: str) -> None:
        """Bring shards to this machine, those that are there."""
        if self.mirror is not None:
            names = [self.shard(c, block, suffix).name for c, block in shards]
            self.mirror.pull_shards(self.key, self.path, names)

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
        if self.mirror is not None:
            data = self.mirror.put_shard(self.key, place.name, data)
        # Not synced: a power cut may damage shards, which their seals tell, and what is lost is
        # drawn again. Thousands of syncs on a shared file system would cost more.
        write_beside(place, data)

    @contextmanager
    def deaths_counted(self, class_index: int, block: int, most: int) -> Iterator[int]:
        """How many processes died within this block for this shard, up to `most`; counted where
        every machine sees it."""
        tries = self.shard(class_index, block, ".tries")
        if self.mirror is not None:
            deaths = self.mirror.count_up(self.key, tries.name, most)
        else:
            deaths = tries.stat().st_size if tries.exists() else 0
            if deaths < most:
                with open(tries, "ab") as handle:
                    handle.write(b"x")
        try:
            yield deaths
        finally:  # who is killed does not come here
            if self.mirror is not None:
                self.mirror.count_off(self.key, tries.name, min(deaths + 1, most))
            else:
                tries.unlink(missing_ok=True)

    def forget_deaths(self, class_index: int, block: int, most: int) -> None:
        """Its last process was ended by us, and not by the shard: count anew."""
        tries = self.shard(class_index, block, ".tries")
        if self.mirror is not None:
            self.mirror.count_off(self.key, tries.name, most)
        else:
            tries.unlink(missing_ok=True)

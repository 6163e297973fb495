"""A disk of limited size for tests: a tmpfs that only the processes of the test can see."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from tests.helpers.machines import keep, mounts_of

PAGE = 4096  # bytes; files occupy multiples of it
UNSHARE = ["unshare", "--user", "--map-root-user", "--mount"]


class SmallDisk:
    """A file system of `size` bytes, mounted at `place` for commands that begin with `inside`.

    Other processes see its files at `seen`. It ends with the block.
    """

    def __init__(self, place: Path, size: int) -> None:
        place.mkdir(parents=True)
        self.place = place
        self._keeper = keep(UNSHARE, f"mount -t tmpfs -o size={size} small {place}")
        self.seen = Path(f"/proc/{self._keeper.pid}/root{place}")
        self.inside = mounts_of(self._keeper)

    def resize(self, size: int) -> None:
        remount = ["mount", "-o", f"remount,size={size}", str(self.place)]
        subprocess.run([*self.inside, *remount], check=True)

    def clear(self) -> None:
        for path in self.seen.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def __enter__(self) -> SmallDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self._keeper.communicate()

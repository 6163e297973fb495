"""A disk of any size, full when a test wants it: a tmpfs that only the test's processes see."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PAGE = 4096  # bytes: what a file takes is a multiple
UNSHARE = ["unshare", "--user", "--map-root-user", "--mount"]


class SmallDisk:
    """A file system of `size` bytes at `place`, for commands that begin with `inside`.

    Other processes see what lies there at `seen`. It is gone with `close()`.

    Raises:
        OSError: the machine allows no user namespaces, or no tmpfs in them.
    """

    def __init__(self, place: Path, size: int) -> None:
        place.mkdir(parents=True)
        self.place = place
        mount = f"mount -t tmpfs -o size={size} small {place} && echo there && exec cat"
        self._keeper = subprocess.Popen(
            [*UNSHARE, "sh", "-c", mount],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self._keeper.stdout is not None
        if self._keeper.stdout.readline() != b"there\n":
            _, said = self._keeper.communicate()
            raise OSError(f"no file system of one's own here: {said.decode().strip()}")
        self.seen = Path(f"/proc/{self._keeper.pid}/root{place}")
        joined = ("nsenter", "--preserve-credentials", "--user", "--mount")
        self.inside = [*joined, "--target", str(self._keeper.pid), f"--wdns={os.getcwd()}"]

    def resize(self, size: int) -> None:
        remount = ["mount", "-o", f"remount,size={size}", str(self.place)]
        subprocess.run([*self.inside, *remount], check=True)

    def clear(self) -> None:
        for left in self.seen.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()

    def close(self) -> None:
        self._keeper.communicate()


@contextmanager
def small_disk(place: Path, size: int) -> Iterator[SmallDisk]:
    """A disk, or a skipped test where the machine has none to give."""
    try:
        disk = SmallDisk(place, size)
    except OSError as problem:
        pytest.skip(str(problem))
    try:
        yield disk
    finally:
        disk.close()

"""A disk of limited size for tests: a tmpfs that only the processes of the test can see."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers.machines import NoMachines, keep

PAGE = 4096  # bytes; files occupy multiples of it
UNSHARE = ["unshare", "--user", "--map-root-user", "--mount"]


class SmallDisk:
    """A file system of `size` bytes, mounted at `place` for commands that begin with `inside`.

    Other processes see its files at `seen`. `close()` removes it.

    Raises:
        NoMachines: the machine allows no user namespaces, or no tmpfs in them.
    """

    def __init__(self, place: Path, size: int) -> None:
        place.mkdir(parents=True)
        self.place = place
        self._keeper = keep(UNSHARE, f"mount -t tmpfs -o size={size} small {place}")
        self.seen = Path(f"/proc/{self._keeper.pid}/root{place}")
        nsenter = ("nsenter", "--preserve-credentials", "--user", "--mount")
        self.inside = [*nsenter, "--target", str(self._keeper.pid), f"--wdns={os.getcwd()}"]

    def resize(self, size: int) -> None:
        remount = ["mount", "-o", f"remount,size={size}", str(self.place)]
        subprocess.run([*self.inside, *remount], check=True)

    def clear(self) -> None:
        for path in self.seen.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def close(self) -> None:
        self._keeper.communicate()


@contextmanager
def small_disk(place: Path, size: int) -> Iterator[SmallDisk]:
    """A SmallDisk; skips the test if the machine cannot provide one."""
    try:
        disk = SmallDisk(place, size)
    except NoMachines as problem:
        pytest.skip(str(problem))
    try:
        yield disk
    finally:
        disk.close()

"""GPUs for tests on a machine without any: device files that only the commands of a test see."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.helpers.disks import UNSHARE
from tests.helpers.machines import keep, mounts_of


@contextmanager
def fake_gpus(folder: Path, count: int) -> Iterator[list[str]]:
    """The prefix of commands that find `count` GPUs in /dev."""
    dev = folder / "dev"
    dev.mkdir()
    commands = [f"mount -t tmpfs none {dev}", f"mkdir {dev}/shm", f"ln -s /proc/self/fd {dev}/fd"]
    for name in ("null", "zero", "random", "urandom"):
        commands.append(f"touch {dev}/{name} && mount --bind /dev/{name} {dev}/{name}")
    commands += [f"touch {dev}/nvidia{number}" for number in range(count)]
    commands += [f"mount --bind /dev/shm {dev}/shm", f"mount --rbind {dev} /dev"]
    keeper = keep(UNSHARE, *commands)
    yield mounts_of(keeper)
    keeper.communicate()

"""GPUs for tests on a machine without any: device files that only the commands of a test see."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers.disks import UNSHARE
from tests.helpers.machines import NoMachines, keep


@contextmanager
def fake_gpus(folder: Path, count: int) -> Iterator[list[str]]:
    """The prefix of commands that find `count` GPUs in /dev; skips the test without namespaces."""
    dev = folder / "dev"
    dev.mkdir()
    commands = [f"mount -t tmpfs none {dev}", f"mkdir {dev}/shm", f"ln -s /proc/self/fd {dev}/fd"]
    for name in ("null", "zero", "random", "urandom"):
        commands.append(f"touch {dev}/{name} && mount --bind /dev/{name} {dev}/{name}")
    commands += [f"touch {dev}/nvidia{number}" for number in range(count)]
    commands += [f"mount --bind /dev/shm {dev}/shm", f"mount --rbind {dev} /dev"]
    try:
        keeper = keep(UNSHARE, *commands)
    except NoMachines as problem:
        pytest.skip(str(problem))
    try:
        inside = ["nsenter", "--preserve-credentials", "--user", "--mount"]
        yield [*inside, "--target", str(keeper.pid), f"--wdns={os.getcwd()}"]
    finally:
        keeper.communicate()

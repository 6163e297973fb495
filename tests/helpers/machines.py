"""Machines of their own on this one: Linux namespaces with an address, a host name, processes, /tmp
and /dev/shm each, on one switch. They share what else lies on the disk.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers.clusters import BIN
from tests.helpers.sweeps import TIMEOUT, environment

ROOT = Path(__file__).parents[2]
NETWORK = "10.213.7"
AS_ROOT = os.getuid() == 0
SWITCH = ["unshare", "--net", "--mount", "--kill-child", "--fork"]
MACHINE = ["unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child"]
JOIN = ["nsenter", "--net", "--mount"]
if not AS_ROOT:
    SWITCH += ["--user", "--map-root-user"]
    JOIN += ["--user", "--preserve-credentials"]
# Its first process reaps the others, as that of a machine does, and ends with who keeps it.
FIRST = "trap '' CHLD && echo there && exec cat"


class NoMachines(Exception):
    """This machine allows none within it."""


class Machine:
    """One, until it is lost."""

    def __init__(self, network: Network, name: str, number: int) -> None:
        self.name, self.address = name, f"{NETWORK}.{number}"
        self._network, self._cable = network, f"v{number}"
        self.disk = network.folder / name  # its own: /tmp, /dev/shm and its home
        for part in ("tmp", "shm"):
            (self.disk / part).mkdir(parents=True)
        self.home = self.disk / "home"
        self.home.mkdir()
        self._keeper = _keep(
            [*network.inside, *MACHINE, "--mount-proc"],
            f"hostname {name} && ip link set lo up",
            *self._mounts(),
        )
        self.pid = _child(self._keeper.pid)
        network.plug_in(self._cable, self.pid)
        self.run(
            "sh",
            "-c",
            f"ip address add {self.address}/24 dev eth0 && ip link set eth0 up"
            f" && ip route add default via {NETWORK}.1",
        )

    def _mounts(self) -> Iterator[str]:
        if ROOT.is_relative_to("/tmp"):
            there = self.disk / ROOT.relative_to("/")
            there.mkdir(parents=True)
            yield f"mount --rbind {ROOT} {there}"
        yield f"mount --rbind {self.disk}/tmp /tmp"
        yield f"mount --rbind {self.disk}/shm /dev/shm"
        yield f"mount --bind {self._network.folder}/hosts /etc/hosts"
        yield "mount --bind /dev/null /etc/resolv.conf"

    def command(self, *words: object, folder: Path | None = None) -> list[str]:
        """The words of a command that runs on it."""
        joined = (*JOIN, "--uts", "--ipc", "--pid", f"--target={self.pid}")
        return [*joined, f"--wdns={folder or self.home}", *map(str, words)]

    def run(
        self, *words: object, check: bool = True, folder: Path | None = None, **more: str
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.command(*words, folder=folder),
            env=self.environment(**more),
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def start(
        self, log: Path, *words: object, folder: Path | None = None, **more: str
    ) -> subprocess.Popen[bytes]:
        """A command that goes on; it ends with the machine."""
        with log.open("ab") as written:
            return subprocess.Popen(
                self.command(*words, folder=folder),
                env=self.environment(**more),
                stdout=written,
                stderr=written,
            )

    def environment(self, **more: str) -> dict[str, str]:
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}{os.pathsep}/usr/sbin"
        return environment(**{"HOME": str(self.home), "PATH": path, **more})

    def unplug(self) -> None:
        """Nobody reaches it, and it goes on."""
        self._network.run("ip", "link", "set", self._cable, "down")

    def plug(self) -> None:
        self._network.run("ip", "link", "set", self._cable, "up")

    def lose(self) -> None:
        """Its power is cut."""
        if self._keeper.poll() is None:
            self._keeper.kill()  # all that runs on it goes with it
            self._keeper.communicate()


class Network:
    """A switch that machines are plugged into; this process is not.

    Args:
        folder: on which all of it lies, outside /tmp.

    Raises:
        NoMachines: this one allows no namespaces.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shared = folder / "shared"  # the disk that all see
        self.shared.mkdir()
        (folder / "hosts").write_text("127.0.0.1 localhost\n")
        self._keeper = _keep(
            SWITCH,
            "ip link set lo up",
            "ip link add switch type bridge",
            "ip link set switch up",
        )
        self.inside = [*JOIN, f"--target={_child(self._keeper.pid)}"]
        self.machines: list[Machine] = []

    def machine(self, name: str) -> Machine:
        number = len(self.machines) + 10
        with (self.folder / "hosts").open("a") as hosts:
            hosts.write(f"{NETWORK}.{number} {name}\n")
        self.machines.append(Machine(self, name, number))
        return self.machines[-1]

    def plug_in(self, cable: str, pid: int) -> None:
        self.run(
            "sh",
            "-c",
            f"ip link add {cable} type veth peer name eth0 netns {pid}"
            f" && ip link set {cable} master switch && ip link set {cable} up",
        )

    def run(self, *words: str) -> None:
        done = subprocess.run([*self.inside, *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def close(self) -> None:
        for machine in self.machines:
            machine.lose()
        self._keeper.kill()
        self._keeper.communicate()


@contextmanager
def network() -> Iterator[Network]:
    """Machines to be, or skipped tests where this one allows none."""
    folder = Path(tempfile.mkdtemp(prefix="machines", dir="/var/tmp"))  # not /tmp, which each has
    try:
        found = Network(folder)
        try:
            found.machine("probe").lose()
            yield found
        finally:
            found.close()
    except NoMachines as problem:
        pytest.skip(str(problem))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _keep(command: list[str], *steps: str) -> subprocess.Popen[bytes]:
    """A process that keeps namespaces alive, once the steps are done in them."""
    keeper = subprocess.Popen(
        [*command, "sh", "-c", " && ".join([*steps, FIRST])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert keeper.stdout is not None
    if keeper.stdout.readline() != b"there\n":
        _, said = keeper.communicate()
        raise NoMachines(f"no machines of one's own here: {said.decode().strip()}")
    return keeper


def _child(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

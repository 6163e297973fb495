"""Virtual machines made of Linux namespaces, connected by a switch.

Each machine has an address, a host name, processes, /tmp and /dev/shm. The machines share the other
folders of the disk.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tests.helpers.clusters import BIN
from tests.helpers.sweeps import environment, run_command

ROOT = Path(__file__).parents[2]
NETWORK = "10.213.7"
AS_ROOT = os.getuid() == 0
SWITCH = ["unshare", "--net", "--mount", "--kill-child", "--fork"]
MACHINE = ["unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child"]
JOIN = ["nsenter", "--net", "--mount"]
if not AS_ROOT:
    SWITCH += ["--user", "--map-root-user"]
    JOIN += ["--user", "--preserve-credentials"]
# The first process of a machine reaps the others, and ends when its stdin closes.
FIRST = "trap '' CHLD && echo ready && exec cat"


class Machine:
    """A virtual machine."""

    def __init__(self, network: Network, name: str, number: int) -> None:
        self.name, self.address = name, f"{NETWORK}.{number}"
        self._network, self._cable = network, f"v{number}"
        self.disk = network.folder / name  # contains the machine's /tmp, /dev/shm and home folder
        for part in ("tmp", "shm"):
            (self.disk / part).mkdir(parents=True)
        self.home = self.disk / "home"
        self.home.mkdir()
        self._keeper = keep(
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
            mount_point = self.disk / ROOT.relative_to("/")
            mount_point.mkdir(parents=True)
            yield f"mount --rbind {ROOT} {mount_point}"
        yield f"mount --rbind {self.disk}/tmp /tmp"
        yield f"mount --rbind {self.disk}/shm /dev/shm"
        yield f"mount --bind {self._network.folder}/hosts /etc/hosts"
        yield "mount --bind /dev/null /etc/resolv.conf"

    def command(self, *words: object, folder: Path | None = None) -> list[str]:
        """A command line that runs the words on this machine."""
        joined = (*JOIN, "--uts", "--ipc", "--pid", f"--target={self.pid}")
        return [*joined, f"--wdns={folder or self.home}", *map(str, words)]

    def run(
        self, *words: object, check: bool = True, folder: Path | None = None, **more: str
    ) -> subprocess.CompletedProcess[str]:
        command = self.command(*words, folder=folder)
        return run_command(command, check, env=self.environment(**more))

    def start(
        self, log: Path, *words: object, folder: Path | None = None, **more: str
    ) -> subprocess.Popen[bytes]:
        """Start a command in the background; it ends with the machine."""
        with log.open("ab") as output:
            return subprocess.Popen(
                self.command(*words, folder=folder),
                env=self.environment(**more),
                stdout=output,
                stderr=output,
            )

    def environment(self, **more: str) -> dict[str, str]:
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}{os.pathsep}/usr/sbin"
        return environment(**{"HOME": str(self.home), "PATH": path, **more})

    def unplug(self) -> None:
        """Disconnect the machine from the network; its processes keep running."""
        self._network.run("ip", "link", "set", self._cable, "down")

    def plug(self) -> None:
        self._network.run("ip", "link", "set", self._cable, "up")

    def lose(self) -> None:
        """Cut the power: kill all processes of the machine at once."""
        if self._keeper.poll() is None:
            self._keeper.kill()  # ends the namespace and all its processes
            self._keeper.communicate()


class Network:
    """A switch with machines. This process is not connected to the switch.

    Args:
        folder: folder for all files of the machines, outside /tmp.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shared = folder / "shared"  # the shared disk
        self.shared.mkdir()
        (folder / "hosts").write_text("127.0.0.1 localhost\n")
        self._keeper = keep(
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
        run_command([*self.inside, *words])

    def close(self) -> None:
        for machine in self.machines:
            machine.lose()
        self._keeper.kill()
        self._keeper.communicate()


@contextmanager
def network() -> Iterator[Network]:
    """A network without machines."""
    # Not in /tmp, which every machine has separately.
    folder = Path(tempfile.mkdtemp(prefix="machines", dir="/var/tmp"))
    try:
        with closing(Network(folder)) as switch:
            switch.machine("probe").lose()
            yield switch
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def keep(command: list[str], *steps: str) -> subprocess.Popen[bytes]:
    """Run the steps in new namespaces; returns a process that keeps the namespaces alive, until its
    stdin closes. Skips the test if this machine does not allow namespaces."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    keeper = subprocess.Popen([*command, "sh", "-c", " && ".join([*steps, FIRST])], **pipes)
    if keeper.stdout.readline() != b"ready\n":
        _, stderr = keeper.communicate()
        pytest.skip(f"this machine does not allow namespaces: {stderr.decode().strip()}")
    return keeper


def mounts_of(keeper: subprocess.Popen[bytes]) -> list[str]:
    """The prefix of commands that see the mounts of a process that `keep` has started."""
    nsenter = ["nsenter", "--preserve-credentials", "--user", "--mount"]
    return [*nsenter, "--target", str(keeper.pid), f"--wdns={os.getcwd()}"]


def _child(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

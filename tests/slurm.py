"""A real Slurm of two nodes on this machine, from Debian's packages, started without systemd."""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from tests.servers import free_port
from tests.sweeps import TIMEOUT, environment

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
PATH = os.pathsep.join([os.environ["PATH"], "/usr/sbin"])
MISSING = [name for name in PROGRAMS if not shutil.which(name, path=PATH)]
WHY = f"needs Debian's packages munge, slurmctld, slurmd, slurm-client (no {', '.join(MISSING)})"
NODES = ("a", "b")
CONFIG = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MailProg=/bin/true
NodeName=a NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cores}
NodeName=b NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cores}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """Munge, a controller and two daemons in a folder of their own. Jobs run as whoever runs it."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm", dir="/tmp"))  # sockets: a short path
        self._processes: list[subprocess.Popen[bytes]] = []
        self.environment = environment(
            SLURM_CONF=str(self.folder / "slurm.conf"),
            PATH=PATH,
            AIRSWEEP_PYTHON=sys.executable,
        )

    def start(self) -> None:
        munge = self.folder / "munge"
        munge.mkdir(mode=0o700)
        (self.folder / "state").mkdir()
        (munge / "key").write_bytes(secrets.token_bytes(128))
        (munge / "key").chmod(0o600)
        (self.folder / "slurm.conf").write_text(
            CONFIG.format(
                host=socket.gethostname().partition(".")[0],
                user=getpass.getuser(),
                folder=self.folder,
                ports=[free_port() for _ in range(3)],
                cores=os.cpu_count(),
            )
        )
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        words = {"key-file": "key", "socket": "socket", "pid-file": "pid", "seed-file": "seed"}
        options = [f"--{option}={munge / name}" for option, name in words.items()]
        self._spawn("munged", "--foreground", "--force", *options)
        self._spawn("slurmctld", "-D", "-c")
        for node in NODES:
            self._spawn("slurmd", "-D", "-N", node)
        deadline = time.monotonic() + 120
        while self.ask("sinfo", "--noheader", "--states=idle", "--format=%D", check=False) != "2":
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.2)

    def _spawn(self, *command: str) -> None:
        with (self.folder / "log").open("ab") as log:
            self._processes.append(
                subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)
            )

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def ask(self, *command: str, cwd: Path | None = None, check: bool = True) -> str:
        """What a command of Slurm's prints."""
        done = subprocess.run(
            command, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=60
        )
        assert not check or done.returncode == 0, done.stderr + self.log()
        return done.stdout.strip()

    def submit(self, folder: Path, *arguments: str | Path) -> str:
        """The number of a job whose log is <folder>/airsweep-<number>.log."""
        return self.ask("sbatch", "--parsable", *map(str, arguments), cwd=folder)

    def ended(self, job: str) -> tuple[str, str]:
        """Its last state and its exit code, as Slurm writes it, when all of it is over."""
        deadline = time.monotonic() + TIMEOUT
        while self.ask("squeue", "--noheader", f"--jobs={job}", "--states=all", "--format=%T") in (
            *("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED"),
        ):
            assert time.monotonic() < deadline, f"job {job} does not end"
            time.sleep(0.3)
        said = self.ask("scontrol", "show", "job", job)
        found = dict(word.split("=", 1) for word in said.split() if "=" in word)
        return found["JobState"], found["ExitCode"]

    def stop(self) -> None:
        if (self.folder / "slurm.conf").exists():
            self.ask("scancel", "--me", check=False)
        for process in reversed(self._processes):
            process.terminate()
        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=20)
            process.kill()
            process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

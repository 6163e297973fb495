"""A real Slurm with two nodes, from Debian's packages, started without systemd."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable

from tests.helpers.machines import AS_ROOT, Machine, Network
from tests.helpers.sweeps import wait_until

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
PATH = os.pathsep.join([os.environ["PATH"], "/usr/sbin"])
MISSING = [name for name in PROGRAMS if not shutil.which(name, path=PATH)]
MISSING += ["root"] * (not AS_ROOT)
WHY = f"needs root, and Debian's munge, slurmctld, slurmd, slurm-client (no {', '.join(MISSING)})"
NODES = ("a", "b")
ACTIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED")
CONFIG = """
ClusterName=tests
SlurmctldHost=control
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=/tmp/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir=/tmp/spool
SlurmctldPidFile=/tmp/slurmctld.pid
SlurmdPidFile=/tmp/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MailProg=/bin/true
SlurmdTimeout=900
UnkillableStepTimeout=900
NodeName=a,b CPUs={cores}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """One machine with the controller, which submits jobs, and two compute nodes."""

    def __init__(self, network: Network) -> None:
        self.shared = network.shared
        self._folder = network.folder / "slurm"
        (self._folder / "state").mkdir(parents=True)
        (self._folder / "slurm.conf").write_text(
            CONFIG.format(folder=self._folder, cores=os.cpu_count())
        )
        (self._folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        self._key = self._folder / "munge.key"
        self._key.write_bytes(secrets.token_bytes(128))
        self._key.chmod(0o600)
        self.variables = {"SLURM_CONF": str(self._folder / "slurm.conf")}  # and those of jobs
        self.control = self._machine(network, "control", "slurmctld", "-D", "-c")
        self.nodes = {name: self._machine(network, name, "slurmd", "-D") for name in NODES}
        idle = ("sinfo", "--noheader", "--states=idle", "--format=%D")
        wait_until(lambda: self.command(*idle, check=False) == "2", self.log, every=0.3)

    def _machine(self, network: Network, name: str, *daemon: str) -> Machine:
        machine, log = network.machine(name), self._folder / "log"
        (machine.disk / "munge").mkdir(mode=0o700)
        files = {"pid-file": "pid", "seed-file": "seed"}
        options = [f"--{option}={machine.disk}/munge/{file}" for option, file in files.items()]
        options += [f"--key-file={self._key}", "--socket=/tmp/munge", "--force", "--foreground"]
        machine.start(log, "munged", *options)
        machine.start(log, *daemon, **self.variables)
        return machine

    def log(self) -> str:
        return (self._folder / "log").read_text()

    def command(self, *words: str, check: bool = True) -> str:
        """Run a command of Slurm in the shared folder and return its output."""
        done = self.control.run(*words, check=False, folder=self.shared, **self.variables)
        assert not check or done.returncode == 0, done.stderr + self.log()
        return done.stdout.strip()

    def submit(self, *arguments: str) -> str:
        """Submit a job and return its number."""
        return self.command("sbatch", "--parsable", *arguments)

    def log_of(self, job: str) -> str:
        file = self.shared / f"airsweep-{job}.log"
        return file.read_text() if file.exists() else ""

    def lose(self, node: str) -> None:
        """Kill all processes of a node, and record in Slurm that the node is down.

        Slurm would find out after SlurmdTimeout. That is long here, because Slurm never uses a node
        again that answered too late, and nodes of a busy machine answer late.
        """
        self.nodes[node].lose()
        self.command("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")

    def wait_for_requeue(self, job: str) -> None:
        """Wait until Slurm has requeued a job, then start it now instead of after two minutes."""
        self._wait_for_state(job, lambda state: state == "PENDING")
        self.command("scontrol", "update", f"JobId={job}", "StartTime=now")

    def is_over(self, job: str) -> bool:
        return self._state(job) not in ACTIVE

    def _state(self, job: str) -> str:
        return self.command("squeue", "--noheader", f"--jobs={job}", "--states=all", "--format=%T")

    def _wait_for_state(self, job: str, condition: Callable[[str], bool]) -> None:
        def details() -> str:
            nodes = self.command("sinfo", "--Node", "--long")
            return f"job {job} stays {self._state(job)}\n{nodes}\n{self.log()}"

        wait_until(lambda: condition(self._state(job)), details, 0.3)

    def ended(self, job: str) -> tuple[str, str]:
        """Wait for the end of a job; returns its state and its exit code as Slurm writes it."""
        self._wait_for_state(job, lambda state: state not in ACTIVE)
        output = self.command("scontrol", "show", "job", job)
        fields = dict(word.split("=", 1) for word in output.split() if "=" in word)
        return fields["JobState"], fields["ExitCode"]

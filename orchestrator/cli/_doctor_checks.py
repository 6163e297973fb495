"""Is this machine, or a cluster, fit to run sweeps? Checked without running any.

This machine is checked as the nodes of a cluster are before a sweep starts (`node_checks.py`), with
what only the driver needs beside it. A cluster is checked by joining it, or by a job that does.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import tempfile
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from orchestrator.cluster import Cluster, Job, check_nodes
from orchestrator.cluster.job_package import is_checkout, pack
from orchestrator.cluster.node_checks import (
    CHECKS,
    Finding,
    NodeReport,
    check_this_machine,
    lines,
    needed_by,
)
from orchestrator.cluster.node_facts import Needed
from orchestrator.environment import in_ray_job
from orchestrator.errors import Refused, StoreRefused, TrackerAway
from orchestrator.files import ROOT
from orchestrator.formatting import aligned, counted, size
from orchestrator.git import commit
from orchestrator.planning import Machine, Plan, SweepRequest, plan_of, unschedulable_reason
from orchestrator.planning.requests import location_for, lost_store
from orchestrator.planning.resources import this_machine
from orchestrator.redact import without_credentials
from orchestrator.spec.sweep import option_words
from orchestrator.store import SweepLocation, folder_of, is_bucket, open_store
from orchestrator.tracking import make_tracker
from orchestrator.tracking_uri import kind_of, uri_of

HERE = "this machine"
OFFLINE = "not looked at: --offline"
HUBS = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HOME", "HF_HUB_CACHE")
REMEDIES = {  # where a message has none
    "store": "give another --store",
    "sweep": "put it there, or name one that is there",
    "tracker": "start it, give another --tracking-uri, or --tracking-uri none",
    "cluster": "give another --address",
}
DISK_SHARE = 0.95  # of its disk, from which on Ray starts no task that needs it


@dataclass(frozen=True)
class Request:
    """What is to be checked."""

    sweep: SweepRequest | None
    store: str
    data_root: Path | None = None
    tracking_uri: str | None = None
    offline: bool = False  # open no connection


@dataclass
class Report:
    """The state of each check, and what is wrong."""

    checks: dict[str, tuple[str, str]] = field(default_factory=dict)  # state, and a word about it
    machines: list[NodeReport] = field(default_factory=list)  # of a cluster
    findings: list[Finding] = field(default_factory=list)

    def passed(self, check: str, said: str) -> None:
        """Unless something else was found."""
        self.checks.setdefault(check, ("ok", said))

    def skipped(self, check: str, why: str) -> None:
        self.checks[check] = ("-", why)

    def failed(self, check: str, problem: str, remedy: str, fatal: bool = True) -> None:
        self.add(Finding(HERE, check, problem, remedy, fatal))

    def add(self, *findings: Finding) -> None:
        self.findings += findings
        for one in findings:
            if self.checks.get(one.check, ("",))[0] != "failed":
                self.checks[one.check] = ("failed" if one.fatal else "warning", one.problem)

    @contextmanager
    def caught(self, check: str) -> Iterator[None]:
        """What is raised is a finding; what follows its first semicolon is the remedy."""
        try:
            yield
        except (ValueError, Refused, StoreRefused, TrackerAway, OSError) as error:
            problem, _, remedy = str(error).partition("; ")
            self.failed(check, problem, remedy or REMEDIES[check])

    def json(self) -> dict[str, Any]:
        """The contract of `doctor --json`."""
        return {
            "ok": not any(one.fatal for one in self.findings),
            "checks": {
                name: {"state": state, "said": said} for name, (state, said) in self.checks.items()
            },
            "machines": {one.name: one.states() for one in self.machines},
            "findings": [one.json() for one in self.findings],
        }


def screen(found: Mapping[str, Any]) -> str:
    """A report, as JSON has it, for people: the driver, the table of machines, what is wrong."""
    rows = [(name, check["state"], check["said"]) for name, check in found["checks"].items()]
    parts = ["\n".join(aligned(rows))]
    if found["machines"]:
        states = [(name, *checks.values()) for name, checks in found["machines"].items()]
        parts.append("\n".join(aligned([("machine", *CHECKS), *states])))
    if found["findings"]:
        parts.append("\n".join(lines(Finding(**one) for one in found["findings"])))
    return "\n\n".join(parts)


# ---------------------------------------------------------------- this machine, or a cluster


def check_machine(request: Request) -> Report:
    """What a sweep needs of this machine."""
    report = Report()
    report.passed("airsweep", f"{_version('airsweep') or 'a checkout'}, commit {commit()[:12]}")
    _libraries(report)
    _ray_folder(report)
    flags = ", ".join(f"{name}={os.environ[name]}" for name in HUBS if name in os.environ)
    report.passed("offline", f"airsweep fetches nothing; flags of the hub: {flags or 'none'}")
    location = _place(report, request)
    plan = _plan(report, request, location)
    machine = this_machine()
    _resources(report, plan, location, [machine])
    if location is not None:
        _this_node(report, location, _needed(plan, location), machine["GPU"])
    _tracker(report, request, location)
    return report


def check_cluster(request: Request) -> Report:
    """What a sweep needs of the cluster of RAY_ADDRESS, and of this process as its driver."""
    from orchestrator.cluster import ray_session

    report = Report()
    _libraries(report)
    location = _place(report, request)
    plan = _plan(report, request, location)
    _tracker(report, request, location)
    with report.caught("cluster"), ray_session() as machines:
        sums = (f"{sum(one.get(kind, 0) for one in machines):g} {kind}" for kind in ("CPU", "GPU"))
        report.passed("cluster", f"{counted(len(machines), 'machine')}, {', '.join(sums)}")
        _resources(report, plan, location, machines)
        if location is not None:
            with report.caught("store"):
                report.machines = check_nodes(location.store, _needed(plan, location))
    # By machine they are in a table of their own.
    report.findings += [one for machine in report.machines for one in machine.findings]
    return report


def _libraries(report: Report) -> None:
    """Compare with the ranges that airsweep was tested with: of a checkout as its file says, else
    as it was installed."""
    file = ROOT / "pyproject.toml"
    try:
        if file.is_file():
            project = tomllib.loads(file.read_text())["project"]
            python, needed = project["requires-python"], project["dependencies"]
        else:
            python, needed = metadata("airsweep")["Requires-Python"], requires("airsweep") or []
    except PackageNotFoundError:
        report.skipped("versions", "a copy of the code alone, which does not say what it needs")
        return
    here = platform.python_version()
    if here not in SpecifierSet(python):
        problem = f"Python {here}, and airsweep needs {python}"
        report.failed("versions", problem, f"make an environment with Python {python}")
    for one in map(Requirement, needed):
        if one.marker is not None and not one.marker.evaluate({"extra": ""}):
            continue
        found = _version(one.name)
        if found is None or not one.specifier.contains(found, prereleases=True):
            problem = f"{one.name} {found or 'is missing'}, and airsweep needs {one.specifier}"
            report.failed("versions", problem, f"pip install '{one.name}{one.specifier}'")
    known = ", ".join(f"{name} {_version(name)}" for name in ("ray", "torch", "mlflow"))
    report.passed("versions", f"Python {here}, {known} and {len(needed) - 3} more")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _ray_folder(report: Report) -> None:
    """Could Ray start here? Nothing is started."""
    folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    if not os.access(folder, os.W_OK):
        report.failed("ray", f"Ray's folder {folder} cannot be written", "set RAY_TMPDIR")
        return
    disk = shutil.disk_usage(folder)
    if disk.used > DISK_SHARE * disk.total:
        problem = f"the disk of Ray's folder {folder} is {disk.used / disk.total:.0%} full"
        report.failed("ray", problem, "make room, or set RAY_TMPDIR", fatal=False)
    report.passed("ray", f"could start in {folder}")


# ---------------------------------------------------------------- sweep and store


def _place(report: Report, request: Request) -> SweepLocation | None:
    """Where the sweep would go; None: it cannot or should not be opened."""
    store, location = request.store, None
    if request.offline and is_bucket(store):
        report.skipped("store", OFFLINE)
        return None
    with report.caught("store"):
        if request.sweep is not None:
            location = location_for(request.sweep, store, request.data_root)
        elif in_ray_job() and not is_bucket(store) and not folder_of(store).is_absolute():
            raise lost_store(store)
        else:
            location = SweepLocation(open_store(store), "default", "none", request.data_root)
    return location


def _plan(report: Report, request: Request, location: SweepLocation | None) -> Plan | None:
    """What the sweep would need, with all weights and images found; None: there is no plan."""
    plan = None
    if request.sweep is None:
        report.skipped("sweep", "none was given")
    elif location is None:
        report.skipped("sweep", "no store to plan in")
    else:
        with report.caught("sweep"):
            plan = plan_of(request.sweep.spec, location)
            here = "the weights and images that it names are here"
            report.passed("sweep", f"{plan.sweep.name}: {here}")
    return plan


def _needed(plan: Plan | None, location: SweepLocation) -> Needed:
    return needed_by(plan, location) if plan else Needed(data_root=location.data_root)


def _resources(
    report: Report, plan: Plan | None, location: SweepLocation | None, machines: Sequence[Machine]
) -> None:
    """Do its trials and generators fit a machine?"""
    if plan is None or location is None:
        report.skipped("resources", "no sweep to fit")
    elif (reason := unschedulable_reason(plan, location.store, machines)) is None:
        report.passed("resources", "there is a machine for all that the sweep asks for")
    else:
        problem, _, remedy = reason.rpartition(": ")
        if os.environ.get("RAY_ADDRESS"):
            remedy += ", or where the cluster grows by itself, let it start such a machine first"
        report.failed("resources", problem, remedy)


def _this_node(report: Report, location: SweepLocation, needed: Needed, gpus: float) -> None:
    """Check this machine as the nodes of a cluster are checked."""
    with report.caught("store"):
        here = replace(needed, gpus=needed.gpus and gpus > 0)
        facts, findings = check_this_machine(HERE, location.store, here)
        report.add(*findings)
        free = facts["store"]["free"]
        report.passed("store", f"{location.store.name} can be written")
        report.passed("room", "not known" if free is None else f"{size(free)} are free")
        asked = "" if needed.gpus else ", and none is asked for"
        report.passed("gpu", f"{gpus:g} GPU here{asked}")


def _tracker(report: Report, request: Request, location: SweepLocation | None) -> None:
    """Does it answer, and accept the credentials?"""
    root = location.store.root if location is not None else Path(tempfile.gettempdir())
    of_sweep = request.sweep.spec.tracking_uri if request.sweep else None
    with report.caught("tracker"):
        uri = uri_of(request.tracking_uri or of_sweep, root)
        kind = kind_of(uri)
        if kind != "http":
            where = "a file" if kind == "sqlite" else "off"
            report.passed("tracker", f"{where}, so no server is needed")
        elif request.offline:
            report.skipped("tracker", OFFLINE)
        else:
            make_tracker(
                uri, store=root, project=location.project if location else "default"
            ).check()
            report.passed("tracker", f"{without_credentials(uri)} answers and lets us in")


# ---------------------------------------------------------------- as a job


STARTED = 300.0  # seconds that a cluster has to run the job
PASSED = ("AIRSWEEP_PROJECT", "AIRSWEEP_USER")


def report_of_job(
    address: str, sweep: SweepRequest | None, options: Sequence[str]
) -> dict[str, Any]:
    """What `doctor --cluster --json` says, run on a cluster.

    Args:
        address: http://<head>:8265.
        options: of the command, beside the sweep.

    Raises:
        Refused: the cluster takes no job, or the job said nothing.
    """
    words = ["python", "-m", "orchestrator", "doctor"]
    with TemporaryDirectory(prefix="airsweep-doctor-") as folder:
        spec = pack(sweep, Path(folder), is_checkout())
        if sweep is not None:
            words += [spec, *option_words(sweep.sets, sweep.only, smoke=False)]
        command = shlex.join([*words, "--cluster", "--json", *options])
        env = {name: os.environ[name] for name in PASSED if name in os.environ}
        return _said(*Cluster(address).run(command, Path(folder), env, STARTED))


def _said(log: str, job: Job) -> dict[str, Any]:
    """What is in a job's log, where Ray's lines may stand before and after it."""
    lines = log.splitlines()
    if job.exit_code in (0, 3) and "{" in lines and "}" in lines:
        last = len(lines) - lines[::-1].index("}")
        found: dict[str, Any] = json.loads("\n".join(lines[lines.index("{") : last]))
        return found
    last_line = next(filter(str.strip, reversed(lines)), job.message.partition("\n")[0])
    raise Refused(
        f"the job on the cluster ended without an answer ({last_line}); is airsweep with all it "
        "needs in the Python that is first on the head's path?"
    )

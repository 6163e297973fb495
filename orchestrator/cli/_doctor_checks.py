"""Checks of `airsweep doctor`: whether this machine or a cluster can run sweeps.

This machine gets the checks that every node of a cluster gets before a sweep (`node_checks.py`),
and those of a driver: versions, tracker, Ray's folder. To check a cluster, this process joins it,
or sends itself to the cluster as a job.
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
    finding_lines,
    node_requirements,
)
from orchestrator.cluster.node_facts import NodeRequirements
from orchestrator.environment import in_ray_job
from orchestrator.errors import Refused, StoreRefused, TrackerUnreachable
from orchestrator.files import ROOT
from orchestrator.formatting import aligned, format_bytes, plural
from orchestrator.git import commit
from orchestrator.planning import (
    Machine,
    Plan,
    SweepRequest,
    plan_of,
    unschedulable_reason,
    unused_gpus_reason,
)
from orchestrator.planning.requests import location_for, relative_store_error
from orchestrator.planning.resources import this_machine
from orchestrator.redact import without_credentials
from orchestrator.spec.sweep import gpu_lines, option_words
from orchestrator.store import SweepLocation, is_bucket, open_store, store_folder
from orchestrator.tracking import make_tracker
from orchestrator.tracking_uri import effective_uri, uri_kind

HERE = "this machine"
OFFLINE = "not checked: --offline"
HUB_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HOME", "HF_HUB_CACHE")
DEFAULT_REMEDIES = {  # of errors whose message has no remedy after a semicolon
    "store": "give another --store",
    "sweep": "copy the missing file there, or name an existing one in the sweep",
    "tracker": "start it, give another --tracking-uri, or --tracking-uri none",
    "cluster": "give another --address",
}
FULL_DISK = 0.95  # used share of a disk above which Ray starts no task that needs the disk


@dataclass(frozen=True)
class DoctorRequest:
    """The options of `airsweep doctor`."""

    sweep: SweepRequest | None
    store: str
    data_root: Path | None = None
    tracking_uri: str | None = None
    offline: bool = False  # open no network connection


@dataclass
class DoctorReport:
    """State of each check, and the problems that the checks found."""

    checks: dict[str, tuple[str, str]] = field(default_factory=dict)  # state and detail, by check
    machines: list[NodeReport] = field(default_factory=list)  # nodes of a cluster
    findings: list[Finding] = field(default_factory=list)

    def add_pass(self, check: str, detail: str) -> None:
        """Record success, unless a finding has set the state of this check before."""
        self.checks.setdefault(check, ("ok", detail))

    def add_skip(self, check: str, reason: str) -> None:
        self.checks[check] = ("-", reason)

    def add_failure(self, check: str, problem: str, remedy: str, fatal: bool = True) -> None:
        self.add(Finding(HERE, check, problem, remedy, fatal))

    def add(self, *findings: Finding) -> None:
        self.findings += findings
        for finding in findings:
            if self.checks.get(finding.check, ("",))[0] != "failed":
                state = "failed" if finding.fatal else "warning"
                self.checks[finding.check] = (state, finding.problem)

    @contextmanager
    def catch_errors(self, check: str) -> Iterator[None]:
        """Turn exceptions into findings; text after the first semicolon becomes the remedy."""
        try:
            yield
        except (ValueError, Refused, StoreRefused, TrackerUnreachable, OSError) as error:
            problem, _, remedy = str(error).partition("; ")
            self.add_failure(check, problem, remedy or DEFAULT_REMEDIES[check])

    def json(self) -> dict[str, Any]:
        """The JSON of `doctor --json`."""
        return {
            "ok": not any(finding.fatal for finding in self.findings),
            "checks": {
                name: {"state": state, "said": detail}
                for name, (state, detail) in self.checks.items()
            },
            "machines": {machine.name: machine.states() for machine in self.machines},
            "findings": [finding.json() for finding in self.findings],
        }


def screen(report: Mapping[str, Any]) -> str:
    """The JSON of a report as text: checks of the driver, table of machines, findings."""
    rows = [(name, check["state"], check["said"]) for name, check in report["checks"].items()]
    parts = ["\n".join(aligned(rows))]
    if report["machines"]:
        states = [(name, *checks.values()) for name, checks in report["machines"].items()]
        parts.append("\n".join(aligned([("machine", *CHECKS), *states])))
    if report["findings"]:
        parts.append("\n".join(finding_lines(Finding(**one) for one in report["findings"])))
    return "\n\n".join(parts)


# ---------------------------------------------------------------- this machine, or a cluster


def check_machine(request: DoctorRequest) -> DoctorReport:
    """Check this machine for a sweep that runs on it."""
    report = DoctorReport()
    report.add_pass("airsweep", f"{_version('airsweep') or 'a checkout'}, commit {commit()[:12]}")
    _check_libraries(report)
    _check_ray_folder(report)
    flags = ", ".join(f"{name}={os.environ[name]}" for name in HUB_VARIABLES if name in os.environ)
    report.add_pass(
        "offline", f"airsweep downloads nothing; variables of the hub: {flags or 'none'}"
    )
    location = _open_location(report, request)
    plan = _make_plan(report, request, location)
    machine = this_machine()
    _check_resources(report, plan, location, [machine])
    if location is not None:
        _check_as_node(report, location, _node_requirements(plan, location), machine["GPU"])
    _check_tracker(report, request, location)
    return report


def check_cluster(request: DoctorRequest) -> DoctorReport:
    """Check the nodes of the cluster at RAY_ADDRESS, and this process as its driver."""
    from orchestrator.cluster import ray_session

    report = DoctorReport()
    _check_libraries(report)
    location = _open_location(report, request)
    plan = _make_plan(report, request, location)
    _check_tracker(report, request, location)
    with report.catch_errors("cluster"), ray_session() as machines:
        totals = (f"{sum(m.get(kind, 0) for m in machines):g} {kind}" for kind in ("CPU", "GPU"))
        report.add_pass("cluster", f"{plural(len(machines), 'machine')}, {', '.join(totals)}")
        _check_resources(report, plan, location, machines)
        if location is not None:
            with report.catch_errors("store"):
                report.machines = check_nodes(location.store, _node_requirements(plan, location))
    # Not by `add`: the table of machines shows their states.
    report.findings += [finding for machine in report.machines for finding in machine.findings]
    return report


def _check_libraries(report: DoctorReport) -> None:
    """Compare Python and the libraries with the version ranges of airsweep's dependencies.

    The ranges come from pyproject.toml in a checkout, else from the installed package.
    """
    file = ROOT / "pyproject.toml"
    try:
        if file.is_file():
            project = tomllib.loads(file.read_text())["project"]
            python, needed = project["requires-python"], project["dependencies"]
        else:
            python, needed = metadata("airsweep")["Requires-Python"], requires("airsweep") or []
    except PackageNotFoundError:
        report.add_skip("versions", "this copy of the code does not state its dependencies")
        return
    here = platform.python_version()
    if here not in SpecifierSet(python):
        problem = f"Python is {here}, but airsweep needs {python}"
        report.add_failure("versions", problem, f"make an environment with Python {python}")
    for package in map(Requirement, needed):
        if package.marker is not None and not package.marker.evaluate({"extra": ""}):
            continue
        name, allowed, installed = package.name, package.specifier, _version(package.name)
        if installed is None or not allowed.contains(installed, prereleases=True):
            state = "is missing" if installed is None else f"is {installed}"
            problem = f"{name} {state}, but airsweep needs {allowed}"
            report.add_failure("versions", problem, f"pip install '{name}{allowed}'")
    main = ", ".join(f"{name} {_version(name)}" for name in ("ray", "torch", "mlflow"))
    report.add_pass("versions", f"Python {here}, {main} and {len(needed) - 3} more")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _check_ray_folder(report: DoctorReport) -> None:
    """Check that Ray can write its temporary folder; Ray is not started."""
    folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    if not os.access(folder, os.W_OK):
        report.add_failure("ray", f"Ray's folder {folder} is not writable", "set RAY_TMPDIR")
        return
    disk = shutil.disk_usage(folder)
    if disk.used > FULL_DISK * disk.total:
        problem = f"the disk of Ray's folder {folder} is {disk.used / disk.total:.0%} full"
        report.add_failure("ray", problem, "free some space, or set RAY_TMPDIR", fatal=False)
    report.add_pass("ray", f"can start in {folder}")


# ---------------------------------------------------------------- sweep and store


def _open_location(report: DoctorReport, request: DoctorRequest) -> SweepLocation | None:
    """Open the store of the sweep. None: it cannot be opened, or needs a connection offline."""
    store, location = request.store, None
    if request.offline and is_bucket(store):
        report.add_skip("store", OFFLINE)
        return None
    with report.catch_errors("store"):
        if request.sweep is not None:
            location = location_for(request.sweep, store, request.data_root)
        elif in_ray_job() and not is_bucket(store) and not store_folder(store).is_absolute():
            raise relative_store_error(store)
        else:
            location = SweepLocation(open_store(store), "default", "none", request.data_root)
    return location


def _make_plan(
    report: DoctorReport, request: DoctorRequest, location: SweepLocation | None
) -> Plan | None:
    """Plan the sweep, which also checks that its weights and datasets exist on this machine."""
    plan = None
    if request.sweep is None:
        report.add_skip("sweep", "no sweep given")
    elif location is None:
        report.add_skip("sweep", "needs the store")
    else:
        with report.catch_errors("sweep"):
            plan = plan_of(request.sweep.spec, location)
            report.add_pass("sweep", f"{plan.sweep.name}: its weights and images exist here")
    return plan


def _node_requirements(plan: Plan | None, location: SweepLocation) -> NodeRequirements:
    if plan is None:
        return NodeRequirements(data_root=location.data_root)
    return node_requirements(plan, location)


def _check_resources(
    report: DoctorReport,
    plan: Plan | None,
    location: SweepLocation | None,
    machines: Sequence[Machine],
) -> None:
    """Check that every trial and generator fits a machine, and that GPUs are used."""
    if plan is None or location is None:
        report.add_skip("resources", "needs a sweep")
    elif (reason := _shortage(plan, location, machines)) is None:
        report.add_pass("resources", "every trial and generator fits a machine")
    else:
        problem, _, remedy = reason.rpartition(": ")
        if os.environ.get("RAY_ADDRESS"):
            remedy += ", or let an autoscaling cluster start such a machine first"
        report.add_failure("resources", problem, remedy)
    if plan and location and (unused := unused_gpus_reason(plan, location.store, machines)):
        problem, _, remedy = unused.partition("; ")
        report.add_failure("gpu", problem, remedy)


def _shortage(plan: Plan, location: SweepLocation, machines: Sequence[Machine]) -> str | None:
    """Why the work does not fit the machines. Of this machine also the GPUs' memory is compared."""
    is_local = machines == [this_machine()] and not os.environ.get("RAY_ADDRESS")
    return unschedulable_reason(plan, location.store, None if is_local else machines)


def _check_as_node(
    report: DoctorReport, location: SweepLocation, needs: NodeRequirements, gpus: float
) -> None:
    """Check this machine like a node of a cluster."""
    with report.catch_errors("store"):
        here = replace(needs, gpus=needs.gpus and gpus > 0)
        facts, findings = check_this_machine(HERE, location.store, here)
        report.add(*findings)
        free = facts["store"]["free"]
        report.add_pass("store", f"{location.store.name} is writable")
        report.add_pass("room", "unknown" if free is None else f"{format_bytes(free)} free")
        unused = "" if needs.gpus else ", none needed"
        if gpus and not needs.inputs:  # of no sweep
            unused = f"; sweeps with real models need `{gpu_lines()}`"
        report.add_pass("gpu", f"{gpus:g} GPU{unused}")


def _check_tracker(
    report: DoctorReport, request: DoctorRequest, location: SweepLocation | None
) -> None:
    """Check that the tracking server answers and accepts the credentials."""
    root = location.store.root if location is not None else Path(tempfile.gettempdir())
    uri_in_sweep = request.sweep.spec.tracking_uri if request.sweep else None
    with report.catch_errors("tracker"):
        uri = effective_uri(request.tracking_uri or uri_in_sweep, root)
        kind = uri_kind(uri)
        if kind != "http":
            target = "a file" if kind == "sqlite" else "off"
            report.add_pass("tracker", f"{target}, so no server is needed")
        elif request.offline:
            report.add_skip("tracker", OFFLINE)
        else:
            make_tracker(
                uri, store=root, project=location.project if location else "default"
            ).check()
            report.add_pass(
                "tracker", f"{without_credentials(uri)} answers and accepts the credentials"
            )


# ---------------------------------------------------------------- as a job


JOB_TIMEOUT = 300.0  # seconds
PASSED = ("AIRSWEEP_PROJECT", "AIRSWEEP_USER")  # variables that the job gets


def check_cluster_by_job(
    address: str, sweep: SweepRequest | None, options: Sequence[str]
) -> dict[str, Any]:
    """Run `doctor --cluster --json` as a job of a cluster and return its JSON.

    Args:
        address: http://<head>:8265.
        options: options of the command other than the sweep's.

    Raises:
        Refused: the cluster accepts no job, or the job printed no report.
    """
    words = ["python", "-m", "orchestrator", "doctor"]
    with TemporaryDirectory(prefix="airsweep-doctor-") as folder:
        spec = pack(sweep, Path(folder), is_checkout())
        if sweep is not None:
            words += [spec, *option_words(sweep.sets, sweep.only, smoke=False)]
        command = shlex.join([*words, "--cluster", "--json", *options])
        env = {name: os.environ[name] for name in PASSED if name in os.environ}
        return _report_in_log(*Cluster(address).run(command, Path(folder), env, JOB_TIMEOUT))


def _report_in_log(log: str, job: Job) -> dict[str, Any]:
    """The JSON report in a job's log; Ray may print lines before and after it."""
    lines = log.splitlines()
    if job.exit_code in (0, 3) and "{" in lines and "}" in lines:
        last = len(lines) - lines[::-1].index("}")
        report: dict[str, Any] = json.loads("\n".join(lines[lines.index("{") : last]))
        return report
    last_line = next(filter(str.strip, reversed(lines)), job.message.partition("\n")[0])
    raise Refused(
        f"the job on the cluster ended without a report ({last_line}); make sure that the first "
        "`python` on the head's PATH has airsweep and its dependencies"
    )

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
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from orchestrator.asked import Asked, place_for, plan_of
from orchestrator.backends import StoreRefused
from orchestrator.driver import does_not_fit
from orchestrator.fit import Machine, this_machine
from orchestrator.inventory import size
from orchestrator.job_package import is_checkout, pack
from orchestrator.lineage import ROOT, commit
from orchestrator.node_checks import (
    CHECKS,
    Finding,
    NodeReport,
    check_this_machine,
    lines,
    needed_by,
)
from orchestrator.node_facts import Needed
from orchestrator.output import aligned
from orchestrator.place import Place, Refused, lost_store
from orchestrator.plan import Plan
from orchestrator.remote import folder_of, is_bucket
from orchestrator.report import counted
from orchestrator.store import open_store
from orchestrator.submit import Cluster, Job
from orchestrator.sweep import option_words
from orchestrator.tracking import TrackerAway, kind_of, make_tracker, uri_of, without_credentials
from orchestrator.variables import in_ray_job

HERE = "this machine"
OFFLINE = "not looked at: --offline"
REMEDIES = {  # where a message has none
    "store": "give another --store",
    "sweep": "put it there, or name one that is there",
    "tracker": "start it, give another --tracking-uri, or --tracking-uri none",
    "cluster": "give another --address",
}
DISK_SHARE = 0.95  # of its disk, from which on Ray starts no task that needs it


@dataclass(frozen=True)
class Asking:
    """What is to be looked at."""

    sweep: Asked | None
    store: str
    data_root: Path | None = None
    tracking_uri: str | None = None
    offline: bool = False  # open no connection


@dataclass
class Report:
    """What was looked at, and what is wrong."""

    checks: dict[str, tuple[str, str]] = field(default_factory=dict)  # state and a word about it
    machines: list[NodeReport] = field(default_factory=list)  # of a cluster
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not any(one.fatal for one in self.findings)

    def passed(self, check: str, said: str) -> None:
        self.checks[check] = ("ok", said)

    def left_out(self, check: str, why: str) -> None:
        self.checks[check] = ("-", why)

    def found(self, *problems: Finding) -> None:
        self.findings += problems
        for one in problems:
            if self.checks.get(one.check, ("",))[0] != "failed":
                state = "failed" if one.fatal else "warning"
                self.checks[one.check] = (state, one.problem)

    @contextmanager
    def told(self, check: str) -> Iterator[None]:
        """What is raised, as a finding; what follows a semicolon is the remedy."""
        try:
            yield
        except (ValueError, Refused, StoreRefused, TrackerAway, OSError) as problem:
            said, _, remedy = str(problem).partition("; ")
            self.found(Finding(HERE, check, said, remedy or REMEDIES[check]))

    def json(self) -> dict[str, Any]:
        """The contract of `doctor --json`."""
        return {
            "ok": self.ok,
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


def this_machines(asking: Asking) -> Report:
    """What a sweep needs of this machine."""
    report = Report()
    report.passed("airsweep", f"{_version('airsweep') or 'a checkout'}, commit {commit()[:12]}")
    _libraries(report)
    _ray_here(report)
    flags = ", ".join(f"{name}={os.environ[name]}" for name in HUBS if name in os.environ)
    report.passed("offline", f"airsweep fetches nothing; flags of the hub: {flags or 'none'}")
    place = _place(report, asking)
    plan = _plan(report, asking, place)
    _resources(report, plan, place, [this_machine()])
    _machine(report, plan, place)
    _tracker(report, asking, place)
    return report


def cluster(asking: Asking) -> Report:
    """What a sweep needs of the cluster of RAY_ADDRESS, and of this process as its driver."""
    from orchestrator.node_checks import check_nodes
    from orchestrator.session import ray_session

    report = Report()
    _libraries(report)
    place = _place(report, asking)
    plan = _plan(report, asking, place)
    _tracker(report, asking, place)
    with report.told("cluster"), ray_session() as machines:
        sums = (f"{sum(one.get(kind, 0) for one in machines):g} {kind}" for kind in ("CPU", "GPU"))
        report.passed("cluster", f"{counted(len(machines), 'machine')}, {', '.join(sums)}")
        _resources(report, plan, place, machines)
        if place is not None:
            with report.told("store"):
                report.machines = check_nodes(place.store, _needed(plan, place))
    # By machine they are in a table of their own.
    report.findings += [one for machine in report.machines for one in machine.findings]
    return report


HUBS = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HOME", "HF_HUB_CACHE")


def _libraries(report: Report) -> None:
    """Against the ranges that airsweep was tested with."""
    ranges = _ranges()
    if ranges is None:
        report.left_out("versions", "a copy of the code alone, which does not say what it needs")
        return
    python, wanted = ranges
    here = platform.python_version()
    if here not in SpecifierSet(python):
        remedy = f"make an environment with Python {python}"
        report.found(
            Finding(HERE, "versions", f"Python {here}, and airsweep needs {python}", remedy)
        )
    for one in map(Requirement, wanted):
        if one.marker is not None and not one.marker.evaluate({"extra": ""}):
            continue
        found = _version(one.name)
        if found is None or not one.specifier.contains(found, prereleases=True):
            what = f"{one.name} {found}" if found else f"{one.name} is missing"
            remedy = f"pip install '{one.name}{one.specifier}'"
            problem = f"{what}, and airsweep needs {one.specifier or 'any'}"
            report.found(Finding(HERE, "versions", problem, remedy))
    if "versions" not in report.checks:
        known = ", ".join(f"{name} {_version(name)}" for name in ("ray", "torch", "mlflow"))
        report.passed("versions", f"Python {here}, {known} and {len(wanted) - 3} more")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _ranges() -> tuple[str, list[str]] | None:
    """Of Python and of libraries: of a checkout as its file says, else as it was installed."""
    file = ROOT / "pyproject.toml"
    if file.is_file():
        project = tomllib.loads(file.read_text())["project"]
        return project["requires-python"], project["dependencies"]
    with suppress(PackageNotFoundError):
        return metadata("airsweep")["Requires-Python"], requires("airsweep") or []
    return None


def _ray_here(report: Report) -> None:
    """Could Ray start here? Nothing is started."""
    folder = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    where = f"Ray's folder {folder}"
    if not os.access(folder, os.W_OK):
        report.found(Finding(HERE, "ray", f"{where} cannot be written", "set RAY_TMPDIR"))
        return
    disk = shutil.disk_usage(folder)
    if disk.used > DISK_SHARE * disk.total:
        problem = f"the disk of {where} is {disk.used / disk.total:.0%} full"
        report.found(Finding(HERE, "ray", problem, "make room, or set RAY_TMPDIR", fatal=False))
    if "ray" not in report.checks:
        report.passed("ray", f"could start in {folder}")


# ---------------------------------------------------------------- sweep and store


def _place(report: Report, asking: Asking) -> Place | None:
    """Where the sweep would go; None: it can or should not be opened."""
    if asking.offline and is_bucket(asking.store):
        report.left_out("store", OFFLINE)
        return None
    place = None
    with report.told("store"):
        if asking.sweep is None:
            relative = not is_bucket(asking.store) and not folder_of(asking.store).is_absolute()
            if relative and in_ray_job():
                raise lost_store(asking.store)
            place = Place(open_store(asking.store), "default", "none", asking.data_root)
        else:
            place = place_for(asking.sweep, asking.store, asking.data_root)
    return place


def _plan(report: Report, asking: Asking, place: Place | None) -> Plan | None:
    """What it would need, with all weights and images found; None: there is no sweep, or no such
    thing."""
    if asking.sweep is None or place is None:
        report.left_out(
            "sweep", "none was given" if asking.sweep is None else "no store to plan in"
        )
        return None
    plan = None
    with report.told("sweep"):
        plan = plan_of(asking.sweep.spec, place)
        report.passed("sweep", f"{plan.sweep.name}: the weights and images that it names are here")
    return plan


def _needed(plan: Plan | None, place: Place) -> Needed:
    return needed_by(plan, place) if plan else Needed(data_root=place.data_root)


def _resources(
    report: Report, plan: Plan | None, place: Place | None, machines: Sequence[Machine]
) -> None:
    """Do its trials and generators fit a machine?"""
    if plan is None or place is None:
        report.left_out("resources", "no sweep to fit")
        return
    problem = does_not_fit(plan, place.store, machines)
    if problem is None:
        report.passed("resources", "there is a machine for all that the sweep asks for")
        return
    said, _, remedy = problem.rpartition(": ")
    if os.environ.get("RAY_ADDRESS"):
        remedy += ", or where the cluster grows by itself, let it start such a machine first"
    report.found(Finding(HERE, "resources", said, remedy))


def _machine(report: Report, plan: Plan | None, place: Place | None) -> None:
    """As the nodes of a cluster are checked."""
    if place is None:
        return
    gpus, needed = this_machine()["GPU"], _needed(plan, place)
    with report.told("store"):
        facts, findings = check_this_machine(
            HERE, place.store, replace(needed, gpus=needed.gpus and gpus > 0)
        )
        report.found(*findings)
        free = facts["store"]["free"]
        said = {
            "store": f"{place.store.name} can be written",
            "room": f"{size(free)} are free" if free is not None else "not known",
            "gpu": f"{gpus:g} GPU here" + ("" if needed.gpus else ", and none is asked for"),
        }
        for check, word in said.items():
            if check not in report.checks:
                report.passed(check, word)


def _tracker(report: Report, asking: Asking, place: Place | None) -> None:
    """Does it answer, and let us in?"""
    root = place.store.root if place is not None else Path(tempfile.gettempdir())
    asked = asking.tracking_uri or (asking.sweep.spec.tracking_uri if asking.sweep else None)
    with report.told("tracker"):
        uri = uri_of(asked, root)
        kind = kind_of(uri)
        if kind != "http":
            where = "a file" if kind == "sqlite" else "off"
            report.passed("tracker", f"{where}, so no server is needed")
        elif asking.offline:
            report.left_out("tracker", OFFLINE)
        else:
            make_tracker(uri, store=root, project=place.project if place else "default").check()
            report.passed("tracker", f"{without_credentials(uri)} answers and lets us in")


# ---------------------------------------------------------------- as a job


STARTED = 300.0  # seconds that a cluster has to run the job
PASSED = ("AIRSWEEP_PROJECT", "AIRSWEEP_USER")


def looked_by_job(
    address: str, sweep: Asked | None, options: Sequence[str], python: str = "python"
) -> dict[str, Any]:
    """What `doctor --cluster --json` says, run on a cluster.

    Args:
        address: http://<head>:8265.
        options: of the command, beside the sweep.
        python: the cluster's.

    Raises:
        Refused: the cluster takes no job, or the job said nothing.
    """
    words = [python, "-m", "orchestrator", "doctor"]
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
    said = next((line for line in reversed(lines) if line.strip()), job.message.partition("\n")[0])
    raise Refused(
        f"the job on the cluster ended without an answer ({said}); is airsweep with all it needs "
        "in the Python that is first on the head's path?"
    )

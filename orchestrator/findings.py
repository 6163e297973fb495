"""What a sweep wants of a machine, and why one cannot do its part: what was seen there, judged.

Knows no cluster. Each finding names the machine and ends with a remedy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from air_core.specs import Ref
from orchestrator.disk import bytes_left
from orchestrator.inventory import size
from orchestrator.place import Place
from orchestrator.plan import Plan
from orchestrator.sweep import Resources

CHECKS = ("answers", "versions", "code", "store", "room", "files", "gpu")
FLOOR = 100 * 2**20  # bytes: with less no sweep starts
SHARED = "a folder that every machine mounts at the same path, or s3://bucket/prefix"


@dataclass(frozen=True)
class Wanted:
    """What a sweep asks of each machine."""

    files: tuple[tuple[str, str], ...] = ()  # role and name
    data_root: Path | None = None
    gpus: bool = False
    left: int = 0  # bytes that are still to be made


def wanted_by(plan: Plan, place: Place) -> Wanted:
    """What a plan asks of each machine."""
    named = dict.fromkeys(one for need in plan.needs for one in _refs(need.spec))
    resources = plan.sweep.resources
    left = bytes_left(plan, place.store)
    return Wanted(tuple(named), place.data_root, asks_gpus(resources), left)


def asks_gpus(resources: Resources) -> bool:
    return bool(resources.trial.gpu or resources.generator.gpu)


def _refs(spec: Any) -> Iterator[tuple[str, str]]:
    """Role and name of everything outside that a spec is made from."""
    for field in fields(spec):
        value = getattr(spec, field.name)
        if isinstance(value, Ref):
            yield ROLES.get(field.name, field.name), value.name
        elif is_dataclass(value):
            yield from _refs(value)


ROLES = {"test_dataset": "dataset", "model": "generator"}


@dataclass(frozen=True)
class Finding:
    """What is wrong on one machine. What is not fatal is said, and the work goes on."""

    node: str
    check: str
    problem: str
    remedy: str
    fatal: bool = True

    def json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Examined:
    """A machine, and what is wrong there."""

    name: str
    findings: tuple[Finding, ...]
    left_out: frozenset[str] = frozenset()  # checks that nothing asked for

    def states(self) -> dict[str, str]:
        """By check: ok, warning, failed, or - where it was not looked at."""
        worst = {one.check: "warning" for one in self.findings}
        worst |= {one.check: "failed" for one in self.findings if one.fatal}
        rest = "-" if "answers" in worst else "ok"
        return {c: worst.get(c, "-" if c in self.left_out else rest) for c in CHECKS}


@dataclass(frozen=True)
class Seen:
    """What came back from a machine."""

    node: str
    facts: Mapping[str, Any]  # of look.look
    gpus: float = 0.0  # as Ray counts them
    gpu: Mapping[str, Any] | None = None  # of look.look_at_gpu; None: none was looked at
    echoed: bool = True  # the driver has read what it wrote


def judged(seen: Seen, here: Mapping[str, Any], store: str, left: int = 0) -> list[Finding]:
    """What is wrong with a machine.

    Args:
        here: what the driver sees.
        left: bytes that are still to be made.
    """
    node, facts = seen.node, seen.facts
    return [
        *_versions(node, facts["versions"], here["versions"]),
        *_code(node, facts["code"], here["code"]),
        *_store(node, facts["store"], store, seen.echoed),
        *_room(node, facts["store"], left),
        *_files(node, facts["files"], here["files"]),
        *_gpu(seen),
    ]


def _versions(node: str, there: Mapping[str, str], here: Mapping[str, str]) -> list[Finding]:
    """Other releases compute something else; a patch of one most likely not."""
    found = []
    for name, mine in here.items():
        theirs = there.get(name, "")
        if _release(theirs, 3) == _release(mine, 3):
            continue
        fatal = name == "ray" or _release(theirs, 2) != _release(mine, 2)
        problem = f"{name} {theirs} is there, and the driver has {mine}"
        if not theirs:
            problem = f"{name} is not installed there, and the driver has {mine}"
        remedy = "install the same on every machine, best by one image or one environment"
        found.append(Finding(node, "versions", problem, remedy, fatal))
    return found


def _release(version: str, parts: int) -> list[str]:
    """
    >>> _release("2.13.0+cu126", 2)
    ['2', '13']
    """
    return version.partition("+")[0].split(".")[:parts]


def _code(node: str, there: Mapping[str, str], here: Mapping[str, str]) -> list[Finding]:
    if not there:
        problem = "airsweep is not installed there"
    else:
        names = {*there, *here}
        other = sorted(name for name in names if there.get(name) != here.get(name))
        if not other:
            return []
        more = f" and {len(other) - 2} more" if len(other) > 2 else ""
        problem = f"its airsweep is another one: {', '.join(other[:2])}{more} differ"
    remedy = (
        "submit with --working-dir . from the checkout, or install what the driver has there too"
    )
    return [Finding(node, "code", problem, remedy)]


def _store(node: str, there: Mapping[str, Any], store: str, echoed: bool) -> list[Finding]:
    state, _, why = str(there["state"]).partition(": ")
    user = "let the user of that machine's Ray write there"
    match state:
        case "ok" if echoed:
            return []
        case "ok" | "other":
            problem, remedy = f"{store} is not the one that the driver writes to", SHARED
        case "absent":
            problem, remedy = f"{store} is not there", SHARED
        case "full":
            problem, remedy = f"{store} is full", "make room there, or give another --store"
        case "unwritable":
            problem, remedy = f"{store} cannot be written ({why})", f"{user}, or mount it writable"
        case "unreadable":
            problem, remedy = f"{store} cannot be read ({why})", user
        case _:
            problem, _, remedy = why.partition("; ")
            remedy = remedy or "mind AWS_ENDPOINT_URL and credentials on that machine"
    if remedy is SHARED:
        remedy = f"give --store {SHARED}"
    return [Finding(node, "store", problem, remedy)]


def _room(node: str, there: Mapping[str, Any], left: int) -> list[Finding]:
    free = there.get("free")
    if free is None or there["state"] in ("absent", "other", "full") or free >= max(FLOOR, left):
        return []
    problem = f"{size(free)} are free where {there['where']} lies"
    if free >= FLOOR:
        problem += f", and at least {size(left)} will be made"
    remedy = "make room there: `airsweep cache gc` lists what no sweep needs"
    return [Finding(node, "room", problem, remedy, fatal=free < FLOOR)]


def _files(
    node: str, there: Sequence[Mapping[str, Any]], here: Sequence[Mapping[str, Any]]
) -> list[Finding]:
    """Weights and images that a sweep names: the same everywhere?"""
    found = []
    for theirs, mine in zip(there, here, strict=True):
        what = f"{mine['role']} {mine['name']}"
        if "problem" in theirs:
            said = theirs["problem"].removeprefix(f"{mine['role']} {mine['name']!r}: ")
            problem = f"{what} is not there ({said.partition(';')[0]})"
            remedy = "copy it there, or let all machines read it from one shared folder"
        elif "problem" in mine or theirs["print"] == mine["print"]:
            continue
        else:
            problem = f"{what} has other content there than at the driver"
            if theirs["count"] != mine["count"]:
                problem = f"{what} has {theirs['count']} files there, {mine['count']} at the driver"
            remedy = "copy the driver's there, or let all machines read one shared folder"
        found.append(Finding(node, "files", problem, remedy))
    return found


def _gpu(seen: Seen) -> list[Finding]:
    """Only where Ray counts a GPU and a sweep asks for one."""
    if seen.gpu is None:
        return []
    problem = str(seen.gpu["problem"])
    if not problem:
        return []
    problem = f"Ray counts {seen.gpus:g} GPU there; {problem}"
    if seen.gpu.get("busy"):
        return [Finding(seen.node, "gpu", problem, "look again later", fatal=False)]
    remedy = "mend what `nvidia-smi` and torch say there, or start its Ray with --num-gpus=0"
    return [Finding(seen.node, "gpu", problem, remedy)]


# ---------------------------------------------------------------- in words


def lines(found: Iterable[Finding]) -> list[str]:
    """One line for each; what several machines have in common is said once."""
    together: dict[tuple[str, str, str], list[str]] = {}
    for one in found:
        together.setdefault((one.check, one.problem, one.remedy), []).append(one.node)
    return [
        f"{_named(nodes)}: {check}: {problem}; {remedy}"
        for (check, problem, remedy), nodes in together.items()
    ]


def _named(nodes: Sequence[str]) -> str:
    """
    >>> _named(["a", "b", "c", "d"])
    'a, b and 2 more'
    """
    more = f" and {len(nodes) - 2} more" if len(nodes) > 2 else ""
    return ", ".join(nodes[:2]) + more

"""Is every node of a cluster fit for a sweep? Checked before any work starts.

One task a node returns facts (`node_facts.py`), which pure functions compare with those of the
driver. `airsweep doctor` judges this machine by the same functions.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any

from air_core.specs import Ref
from orchestrator.cluster import node_facts
from orchestrator.cluster.node_facts import HERE, Facts, Input, Needed, has_token, store_token
from orchestrator.errors import Refused
from orchestrator.failures import first_line
from orchestrator.formatting import counted, size
from orchestrator.planning import Plan
from orchestrator.planning.disk import bytes_left
from orchestrator.store import ArtifactStore, SweepLocation

CHECKS = ("answers", "versions", "code", "store", "room", "files", "gpu")
MIN_FREE = 100 * 2**20  # bytes: with less no sweep starts
ANSWER = 90.0  # seconds that a node has: on a slow disk a process and torch take a minute
RETRY = 1.0  # seconds


def needed_by(plan: Plan, location: SweepLocation) -> Needed:
    inputs = tuple(
        dict.fromkeys(one for requirement in plan.requirements for one in _inputs(requirement.spec))
    )
    resources = plan.sweep.resources
    gpus = bool(resources.trial.gpu or resources.generator.gpu)
    return Needed(inputs, location.data_root, gpus, bytes_left(plan, location.store))


ROLES = {"test_dataset": "dataset", "model": "generator"}


def _inputs(spec: Any) -> Iterator[Input]:
    """Everything outside of the store that a spec is made from."""
    for field in fields(spec):
        value = getattr(spec, field.name)
        if isinstance(value, Ref):
            yield ROLES.get(field.name, field.name), value.name
        elif is_dataclass(value):
            yield from _inputs(value)


# ---------------------------------------------------------------- judged


@dataclass(frozen=True)
class Finding:
    """What is wrong on one machine. The work goes on unless it is fatal."""

    node: str
    check: str
    problem: str
    remedy: str
    fatal: bool = True

    def json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class NodeReport:
    """A machine, and what is wrong there."""

    name: str
    findings: tuple[Finding, ...]
    skipped: frozenset[str] = frozenset()  # checks

    def states(self) -> dict[str, str]:
        """By check: ok, warning, failed, or - where it was skipped."""
        found = {one.check: "warning" for one in self.findings}
        found |= {one.check: "failed" for one in self.findings if one.fatal}
        rest = "-" if "answers" in found else "ok"
        return {check: found.get(check, "-" if check in self.skipped else rest) for check in CHECKS}


def judge(node: str, facts: Facts, driver: Facts, store: str, needed: Needed) -> list[Finding]:
    """What is wrong on a machine.

    Args:
        facts: what `node_facts` returned there.
        driver: the same of the driver.
    """
    return [
        Finding(node, *found)
        for found in (
            *_versions(facts["versions"], driver["versions"]),
            *_code(facts["code"], driver["code"]),
            *_store(facts["store"], store),
            *_room(facts["store"], needed.bytes_left),
            *_files(facts["files"], driver["files"], needed.inputs),
            *_gpu(facts["gpu"]),
        )
    ]


Found = Iterator[tuple[str, str, str, bool]]  # check, problem, remedy, is it fatal?


def _versions(there: Mapping[str, str], here: Mapping[str, str]) -> Found:
    """Other releases compute something else; a patch of one most likely not."""
    for name, mine in here.items():
        theirs = there.get(name, "")
        if _release(theirs, 3) != _release(mine, 3):
            fatal = name == "ray" or _release(theirs, 2) != _release(mine, 2)
            problem = f"{name} {theirs or 'is missing'} there, and the driver has {mine}"
            remedy = "install the same on every machine, best by one image or one environment"
            yield "versions", problem, remedy, fatal


def _release(version: str, parts: int) -> list[str]:
    """
    >>> _release("2.13.0+cu126", 2)
    ['2', '13']
    """
    return version.partition("+")[0].split(".")[:parts]


def _code(there: Mapping[str, str], here: Mapping[str, str]) -> Found:
    other = sorted(name for name in {*there, *here} if there.get(name) != here.get(name))
    if other:
        more = f" and {len(other) - 2} more" if len(other) > 2 else ""
        problem = f"its airsweep is another one: {', '.join(other[:2])}{more} differ"
        remedy = "submit with --working-dir . from the checkout, or install the driver's there too"
        yield "code", problem if there else "airsweep is not installed there", remedy, True


def _store(there: Facts, store: str) -> Found:
    shared = (
        "give --store a folder that every machine mounts at the same path, or s3://bucket/prefix"
    )
    if there["token"] and there["answered"]:
        return
    if there["error"]:
        remedy = "let the user of that machine's Ray read and write there"
        if "://" in store:
            remedy = "mind AWS_ENDPOINT_URL and the credentials on that machine"
        yield "store", f"{store} cannot be used ({there['error']})", remedy, True
    elif not there["exists"]:
        yield "store", f"{store} is not there", shared, True
    else:
        yield "store", f"{store} is not the one that the driver writes to", shared, True


def _room(there: Facts, left: int) -> Found:
    free = there["free"]
    if free is not None and there["token"] and free < max(MIN_FREE, left):
        problem = f"{size(free)} are free where {there['where']} lies"
        if free >= MIN_FREE:
            problem += f", and at least {size(left)} will be made"
        remedy = "make room there: `airsweep cache gc` lists what no sweep needs"
        yield "room", problem, remedy, free < MIN_FREE


def _files(there: Sequence[Facts], here: Sequence[Facts], inputs: Sequence[Input]) -> Found:
    """Are the weights and images that a sweep names the same everywhere?"""
    for theirs, mine, (role, name) in zip(there, here, inputs, strict=True):
        if theirs == mine and "problem" not in theirs:
            continue
        problem = f"{role} {name} has other content there than at the driver"
        if "problem" in theirs:
            problem = f"{role} {name} is not there ({theirs['problem']})"
        elif "problem" in mine:
            continue
        elif theirs["count"] != mine["count"]:
            problem = f"{role} {name} has {theirs['count']} files there, {mine['count']} here"
        yield "files", problem, "copy it there, or let all machines read one shared folder", True


def _gpu(problem: str | None) -> Found:
    if problem:
        remedy = "mend what `nvidia-smi` and torch say there, or start its Ray with --num-gpus=0"
        yield "gpu", f"Ray counts a GPU there; {problem}", remedy, True


def lines(found: Iterable[Finding]) -> list[str]:
    """One line for each; what several machines have in common is written once."""
    together: dict[tuple[str, str, str], list[str]] = {}
    for one in found:
        together.setdefault((one.check, one.problem, one.remedy), []).append(one.node)
    return [
        f"{', '.join(nodes[:2])}{f' and {len(nodes) - 2} more' if len(nodes) > 2 else ''}: "
        f"{check}: {problem}; {remedy}"
        for (check, problem, remedy), nodes in together.items()
    ]


# ---------------------------------------------------------------- this machine, or a cluster's


def refuse_unfit_nodes(plan: Plan, location: SweepLocation, say: Callable[[str], None]) -> None:
    """Check the nodes of the cluster that was joined.

    Raises:
        Refused: a node is not fit for the sweep; says which, why, and what to do.
    """
    started = time.monotonic()
    nodes = check_nodes(location.store, needed_by(plan, location))
    findings = [one for node in nodes for one in node.findings]
    fatal = [one for one in findings if one.fatal]
    if fatal:
        unfit = len({one.node for one in fatal})
        raise Refused(
            f"{unfit} of {counted(len(nodes), 'machine')} of the cluster cannot do this sweep:\n  "
            + "\n  ".join(lines(fatal))
        )
    for line in lines(findings):
        say(line)
    seconds = time.monotonic() - started
    checked = len(nodes) - sum(one.check == "answers" for one in findings)  # the others are gone
    say(f"checked {counted(checked, 'machine')} of the cluster: fit, {seconds:.1f} s")


def check_this_machine(
    name: str, store: ArtifactStore, needed: Needed
) -> tuple[Facts, list[Finding]]:
    """Facts about this machine, and what is wrong with it. Raises as `store_token`."""
    with store_token(store) as token:
        facts = node_facts.node_facts(store.name, token, HERE, needed, needed.gpus)
        _read_answer(facts["store"], store.name, token, HERE)
    return facts, judge(name, facts, facts, store.name, needed)


def _read_answer(facts: Facts, store: str, token: str, node: str) -> None:
    """Note whether the driver can read what a machine has written into the store."""
    facts["answered"] = False
    with suppress(OSError):
        facts["answered"] = facts["token"] and has_token(store, token, node)


def check_nodes(store: ArtifactStore, needed: Needed) -> list[NodeReport]:
    """Check each node of the cluster that was joined, by a task that takes no core and no GPU.

    Raises as `store_token`.
    """
    import ray
    from ray import cloudpickle
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = _alive()
    with_gpu = {key for key, node in nodes.items() if needed.gpus and node["Resources"].get("GPU")}
    cloudpickle.register_pickle_by_value(node_facts)
    try:
        task = ray.remote(num_cpus=0, max_retries=0, max_calls=1)(node_facts.node_facts)
        with store_token(store) as token:

            def start(key: str) -> Any:
                there = NodeAffinitySchedulingStrategy(key, soft=False)
                on_node = task.options(scheduling_strategy=there)
                return on_node.remote(store.name, token, key, needed, key in with_gpu)

            waiting = {start(key): key for key in nodes}
            driver = node_facts.node_facts(store.name, token, HERE, needed, False)
            facts = _gather(waiting, start)
            for key, one in facts.items():
                if isinstance(one, dict):
                    _read_answer(one["store"], store.name, token, key)
    finally:
        cloudpickle.unregister_pickle_by_value(node_facts)
    skipped = set() if needed.inputs else {"files"}
    alive, reports = _alive(), []
    for name, key in zip(_names(list(nodes.values())), nodes, strict=True):
        one = facts[key]
        if isinstance(one, str):
            remedy = "start Ray there anew, or take the machine out of the cluster, and try again"
            problem = f"it could not be checked ({one})"
            # An autoscaler may take a machine back meanwhile.
            found = [Finding(name, "answers", problem, remedy, fatal=key in alive)]
        else:
            found = judge(name, one, driver, store.name, needed)
        also = frozenset(skipped if key in with_gpu else {*skipped, "gpu"})
        reports.append(NodeReport(name, tuple(found), also))
    return sorted(reports, key=lambda report: report.name)


def _gather(waiting: dict[Any, str], start: Callable[[str], Any]) -> dict[str, Facts | str]:
    """By node its facts, or why there are none."""
    import ray
    from ray.exceptions import TaskUnschedulableError

    deadline = time.monotonic() + ANSWER
    found: dict[str, Facts | str] = {}
    while waiting:
        left = max(0.0, deadline - time.monotonic())
        done, _ = ray.wait(list(waiting), num_returns=1, timeout=left)
        if not done:
            break
        key = waiting.pop(done[0])
        try:
            found[key] = ray.get(done[0])
        except Exception as problem:
            found[key] = f"{type(problem).__name__}: {first_line(problem)}"
            # A node that has joined just now may be unknown yet where tasks are scheduled.
            if isinstance(problem, TaskUnschedulableError) and key in _alive() and left > RETRY:
                time.sleep(RETRY)
                waiting[start(key)] = key
    for task, key in waiting.items():
        ray.cancel(task, force=True)
        found[key] = f"no answer within {ANSWER:.0f} s"
    return found


def _alive() -> dict[str, Mapping[str, Any]]:
    import ray

    return {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}


def _names(nodes: Sequence[Mapping[str, Any]]) -> list[str]:
    """For people; two nodes on one machine get different names."""
    plain = [f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})" for node in nodes]
    counts = Counter(plain)
    return [
        name if counts[name] == 1 else f"{name[:-1]}, {node['NodeID'][:8]})"
        for name, node in zip(plain, nodes, strict=True)
    ]

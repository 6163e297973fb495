"""Node checks: compare every node of a cluster with the driver before a sweep starts.

One task per node returns facts (`node_facts.py`), which pure functions compare with the facts of
the driver. `airsweep plan --check` applies the same functions to this machine.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from air_core.specs import Ref
from orchestrator.cluster import node_facts
from orchestrator.cluster.node_facts import (
    DRIVER_ANSWER,
    Facts,
    Input,
    NodeRequirements,
    has_token,
    store_token,
)
from orchestrator.errors import Refused
from orchestrator.failures import first_line
from orchestrator.formatting import format_bytes, plural
from orchestrator.planning import Plan
from orchestrator.planning.checks import bytes_left, gpu_requirements, unfit_gpu
from orchestrator.planning.resources import Gpu
from orchestrator.store import ArtifactStore, SweepLocation

MIN_FREE = 100 * 2**20  # bytes; a sweep does not start with less
FULL_DISK = 0.95  # used share of a disk above which Ray starts no task that needs the disk
ANSWER_TIMEOUT = 90.0  # seconds; on a slow disk a new process that imports torch takes a minute
RETRY_DELAY = 1.0  # seconds


def node_requirements(plan: Plan, location: SweepLocation) -> NodeRequirements:
    """What the missing work of a plan requires of each node."""
    inputs = (item for requirement in plan.requirements for item in _inputs(requirement.spec))
    trial, generator = plan.sweep.resources.trial, plan.sweep.resources.generator
    bf16, model = gpu_requirements(plan, location.store)
    if generator.custom:  # the user selects the machines of the generators
        bf16, model = (), None
    return NodeRequirements(
        inputs=tuple(dict.fromkeys(inputs)),
        data_root=location.data_root,
        gpus=bool(trial.gpu or generator.gpu),
        bf16=bf16,
        model=model,
        bytes_left=bytes_left(plan, location.store),
        plugins=plan.sweep.plugins,
    )


ROLES = {"test_dataset": "dataset", "model": "generator"}


def _inputs(spec: Any) -> Iterator[Input]:
    """Datasets and models that a spec refers to."""
    for field in fields(spec):
        value = getattr(spec, field.name)
        if isinstance(value, Ref):
            yield ROLES.get(field.name, field.name), value.name
        elif is_dataclass(value):
            yield from _inputs(value)


# ---------------------------------------------------------------- findings


@dataclass(frozen=True)
class Finding:
    """A problem of one machine. A sweep runs in spite of findings that are not fatal."""

    node: str
    check: str
    problem: str
    remedy: str
    fatal: bool = True


def compare_facts(
    node: str, facts: Facts, driver: Facts, store: str, needs: NodeRequirements
) -> list[Finding]:
    """Find the problems of a machine.

    Args:
        node: name of the machine.
        facts: result of `node_facts` on the machine.
        driver: result of `node_facts` on the driver's machine.
        store: folder, or URI of a bucket.
    """
    return [
        Finding(node, *problem)
        for problem in (
            *_version_problems(facts["versions"], driver["versions"]),
            *_code_problems(facts["code"], driver["code"]),
            *_store_problems(facts["store"], store),
            *_space_problems(facts["store"], needs.bytes_left),
            *_temporary_problems(*facts["temporary"]),
            *_input_problems(facts, driver, needs.inputs),
            *_gpu_problems(facts["gpu"], facts.get("smallest_gpu"), needs),
        )
    ]


Problems = Iterator[tuple[str, str, str, bool]]  # check, problem, remedy, whether it is fatal


def _version_problems(node: Mapping[str, str], driver: Mapping[str, str]) -> Problems:
    """Versions that differ. Another patch version is a warning: results are most likely equal."""
    for name, expected in driver.items():
        actual = node.get(name, "")
        if _release(actual, 3) != _release(expected, 3):
            fatal = name == "ray" or _release(actual, 2) != _release(expected, 2)
            problem = f"{name} is {actual or 'missing'}, but the driver has {expected}"
            remedy = "install the same version on every machine, with one image or environment"
            yield "versions", problem, remedy, fatal


def _release(version: str, parts: int) -> list[str]:
    """
    >>> _release("2.13.0+cu126", 2)
    ['2', '13']
    """
    return version.partition("+")[0].split(".")[:parts]


def _code_problems(node: Mapping[str, str], driver: Mapping[str, str]) -> Problems:
    changed = sorted(file for file in {*node, *driver} if node.get(file) != driver.get(file))
    if changed:
        more = f" and {len(changed) - 2} more" if len(changed) > 2 else ""
        problem = f"its airsweep differs from the driver's: {', '.join(changed[:2])}{more}"
        remedy = "submit with --working-dir . from the checkout, or install the driver's version"
        yield "code", problem if node else "airsweep is not installed", remedy, True


def _store_problems(node: Facts, store: str) -> Problems:
    if node["token"] and node["answered"]:
        return
    if node["error"]:
        remedy = "let the user of that machine's Ray read and write there"
        if "://" in store:
            remedy = "check AWS_ENDPOINT_URL and the credentials on that machine"
        yield "store", f"{store} cannot be used ({node['error']})", remedy, True
        return
    problem = "is not the store that the driver uses" if node["exists"] else "does not exist"
    remedy = (
        "give --store a folder that every machine mounts at the same path, or s3://bucket/prefix"
    )
    yield "store", f"{store} {problem}", remedy, True


def _space_problems(node: Facts, bytes_left: int) -> Problems:
    free = node["free"]
    if free is not None and node["token"] and free < max(MIN_FREE, bytes_left):
        problem = f"the disk of {node['where']} has {format_bytes(free)} free"
        if free >= MIN_FREE:
            problem += f", but the sweep will write at least {format_bytes(bytes_left)}"
        remedy = "free some space: `airsweep cache gc` lists artifacts that no sweep needs"
        yield "room", problem, remedy, free < MIN_FREE


def _temporary_problems(folder: str, used: float) -> Problems:
    if used > FULL_DISK:
        problem = f"the disk of Ray's folder {folder} is {used:.0%} full"
        yield "room", problem, "free some space, or set RAY_TMPDIR", False


def _input_problems(node: Facts, driver: Facts, inputs: Sequence[Input]) -> Problems:
    """Weights and images that differ from the driver's."""
    hub = ", ".join(f"{name}={value}" for name, value in node["hub"].items()) or "unset"
    for actual, expected, (role, name) in zip(node["files"], driver["files"], inputs, strict=True):
        if "problem" in actual:
            problem = f"is missing ({actual['problem']})"
            if role != "dataset" and node["hub"] != driver["hub"]:
                problem += f"; HF_HOME and HF_HUB_CACHE differ from the driver's: {hub}"
        elif "problem" in expected or actual == expected:
            continue
        elif actual["count"] != expected["count"]:
            problem = f"has {actual['count']} files, but {expected['count']} on the driver"
        else:
            problem = "has other content than on the driver"
        remedy = "copy it to that machine, or let all machines read one shared folder"
        yield "files", f"{role} {name} {problem}", remedy, True


def _gpu_problems(
    problem: str | None, gpu: tuple[int, float] | None, needs: NodeRequirements
) -> Problems:
    unfit = unfit_gpu(needs.bf16, needs.model, Gpu(*gpu)) if gpu else None
    if unfit:
        problem, _, remedy = unfit.partition(": ")
        yield "gpu", problem, remedy, True
    elif problem:
        remedy = "fix what `nvidia-smi` or torch reports there, or start its Ray with --num-gpus=0"
        yield "gpu", f"Ray counts a GPU, but {problem}", remedy, True


def finding_lines(findings: Iterable[Finding]) -> list[str]:
    """One line per problem, with the machines that have it."""
    nodes_by_problem: dict[tuple[str, str, str], list[str]] = {}
    for finding in findings:
        problem = (finding.check, finding.problem, finding.remedy)
        nodes_by_problem.setdefault(problem, []).append(finding.node)
    return [
        f"{', '.join(nodes[:2])}{f' and {len(nodes) - 2} more' if len(nodes) > 2 else ''}: "
        f"{check}: {problem}; {remedy}"
        for (check, problem, remedy), nodes in nodes_by_problem.items()
    ]


# ---------------------------------------------------------------- checking machines


Report = Callable[[str], None]  # receives warnings and a summary


def refuse_unfit_nodes(plan: Plan, location: SweepLocation, report: Report) -> None:
    """Check the nodes of the joined cluster before a sweep starts.

    Raises:
        Refused: a node cannot run the sweep. The message lists nodes, problems and remedies.
    """
    started = time.monotonic()
    nodes = check_nodes(location.store, node_requirements(plan, location))
    findings = [finding for found in nodes.values() for finding in found]
    unfit = len({finding.node for finding in findings if finding.fatal})
    _refuse_fatal(
        findings, f"{unfit} of {plural(len(nodes), 'machine')} of the cluster cannot", report
    )
    seconds = time.monotonic() - started
    # A node without an answer that is not fatal has left the cluster.
    checked = len(nodes) - sum(finding.check == "answers" for finding in findings)
    report(f"checked {plural(checked, 'machine')} of the cluster: ok, {seconds:.1f} s")


def refuse_unfit_machine(plan: Plan, location: SweepLocation, report: Report) -> None:
    """Check this machine like a node of a cluster.

    Raises:
        Refused: it cannot run the sweep.
    """
    store, needs = location.store, node_requirements(plan, location)
    with store_token(store) as token:
        facts = node_facts.node_facts(store.name, token, DRIVER_ANSWER, needs, needs.gpus)
        _read_answer(facts["store"], store.name, token, DRIVER_ANSWER)
    findings = compare_facts("this machine", facts, facts, store.name, needs)
    _refuse_fatal(findings, "this machine cannot", report)
    report("checked this machine: ok")


def _refuse_fatal(findings: Sequence[Finding], subject: str, report: Report) -> None:
    if fatal := [finding for finding in findings if finding.fatal]:
        raise Refused("\n  ".join([f"{subject} run this sweep:", *finding_lines(fatal)]))
    for line in finding_lines(findings):
        report(line)


def _read_answer(facts: Facts, store: str, token: str, node: str) -> None:
    """Record whether the driver can read the token that a node has written into the store."""
    facts["answered"] = False
    with suppress(OSError):
        facts["answered"] = facts["token"] and has_token(store, token, node)


def check_nodes(store: ArtifactStore, needs: NodeRequirements) -> dict[str, list[Finding]]:
    """Findings of each node of the joined cluster, from a task that reserves no core and no GPU.

    Raises what `store_token` raises.
    """
    import ray
    from ray import cloudpickle
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = _alive_nodes()
    with_gpu = {key for key, node in nodes.items() if needs.gpus and node["Resources"].get("GPU")}
    cloudpickle.register_pickle_by_value(node_facts)
    try:
        task = ray.remote(num_cpus=0, max_retries=0, max_calls=1)(node_facts.node_facts)
        with store_token(store) as token:

            def start(key: str) -> Any:
                this_node = NodeAffinitySchedulingStrategy(key, soft=False)
                task_on_node = task.options(scheduling_strategy=this_node)
                return task_on_node.remote(store.name, token, key, needs, key in with_gpu)

            pending = {start(key): key for key in nodes}
            driver = node_facts.node_facts(store.name, token, DRIVER_ANSWER, needs, False)
            answers = _gather(pending, start)
            for key, answer in answers.items():
                if isinstance(answer, dict):
                    _read_answer(answer["store"], store.name, token, key)
    finally:
        cloudpickle.unregister_pickle_by_value(node_facts)
    alive, found = _alive_nodes(), {}
    for name, key in zip(_node_names(list(nodes.values())), nodes, strict=True):
        answer = answers[key]
        if isinstance(answer, str):
            remedy = "restart its Ray, or remove the machine from the cluster, and try again"
            problem = f"the machine could not be checked ({answer})"
            # Not fatal if the node has left the cluster meanwhile: an autoscaler may remove it.
            found[name] = [Finding(name, "answers", problem, remedy, fatal=key in alive)]
        else:
            found[name] = compare_facts(name, answer, driver, store.name, needs)
    return dict(sorted(found.items()))


def _gather(pending: dict[Any, str], start: Callable[[str], Any]) -> dict[str, Facts | str]:
    """For each node its facts, or the reason why it returned none."""
    import ray
    from ray.exceptions import TaskUnschedulableError

    deadline = time.monotonic() + ANSWER_TIMEOUT
    answers: dict[str, Facts | str] = {}
    while pending:
        remaining = max(0.0, deadline - time.monotonic())
        done, _ = ray.wait(list(pending), num_returns=1, timeout=remaining)
        if not done:
            break
        key = pending.pop(done[0])
        try:
            answers[key] = ray.get(done[0])
        except Exception as problem:
            answers[key] = f"{type(problem).__name__}: {first_line(problem)}"
            # Ray's scheduler may not know yet a node that has just joined: retry.
            is_unknown = isinstance(problem, TaskUnschedulableError) and key in _alive_nodes()
            if is_unknown and remaining > RETRY_DELAY:
                time.sleep(RETRY_DELAY)
                pending[start(key)] = key
    for task, key in pending.items():
        ray.cancel(task, force=True)
        answers[key] = f"no answer within {ANSWER_TIMEOUT:.0f} s"
    return answers


def _alive_nodes() -> dict[str, Mapping[str, Any]]:
    import ray

    return {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}


def _node_names(nodes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Host name and address of each node; Ray's id distinguishes two nodes on one machine."""
    plain = [f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})" for node in nodes]
    counts = Counter(plain)
    return [
        name if counts[name] == 1 else f"{name[:-1]}, {node['NodeID'][:8]})"
        for name, node in zip(plain, nodes, strict=True)
    ]

"""Node checks: compare every node of a cluster with the driver before a sweep starts.

One task per node returns facts as plain data, which pure functions compare with the facts of the
driver. `airsweep plan --check` applies the same functions to this machine.
"""

from __future__ import annotations

import hashlib
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any

from air_core.datasets import get_dataset
from air_core.settings import Ref
from orchestrator.errors import Refused
from orchestrator.failures import first_line
from orchestrator.files import ROOT, file_digest
from orchestrator.formatting import plural
from orchestrator.git import PACKAGES
from orchestrator.planning import Plan
from orchestrator.plugins import Plugin, use_plugins
from orchestrator.stages.inputs import input_files
from orchestrator.store import ArtifactStore, SweepLocation, is_bucket
from orchestrator.store.buckets import parse
from orchestrator.store.storage import Folder

LIBRARIES = (
    *("ray", "torch", "open_clip_torch", "diffusers", "peft", "transformers"),
    *("numpy", "safetensors"),
    "pillow-heif",  # without it a machine lists fewer images
)
# Start of the names of files in the store that exist while nodes are checked. `cache gc` removes
# those of killed drivers.
TOKENS = "unfinished/.nodes-"
TOKEN_BYTES = 1 << 16  # size of such a file; a full quota may still accept a few bytes
VISIBLE = 2.0  # seconds until a network disk shows a file of another machine
SAMPLE, ENDS = 200, 1 << 16  # files of an input to read; bytes to read at both ends of a file

# Ray's errors for a machine that has left, or that it does not know everywhere yet, since it has
# just joined; and seconds until it knows.
UNKNOWN, SETTLE = ("NodeDiedError", "TaskUnschedulableError"), 3.0
ANSWER_TIMEOUT = 90.0  # seconds; on a slow disk a new process that imports torch takes a minute
REMEDIES = {
    "answers": "install the driver's airsweep there, restart its Ray, or remove the machine from "
    "the cluster, and try again",
    "code": "install the driver's version there, or submit with --working-dir . from the checkout",
    "store": "give --store a folder that every machine mounts at the same path and may write to, "
    "or s3://bucket/prefix, with AWS_ENDPOINT_URL and credentials on every machine",
    "files": "copy it to that machine, or let all machines read one shared folder",
    "gpu": "or start its Ray with --num-gpus=0",
}


Facts = dict[str, Any]
Input = tuple[str, str]  # role (dataset, backbone, generator) and name


@dataclass(frozen=True)
class NodeRequirements:
    """What a sweep requires of each node."""

    inputs: tuple[Input, ...] = ()
    data_root: Path | None = None
    uses_gpus: bool = False
    uses_bf16: bool = False
    plugins: tuple[Plugin, ...] = ()  # which may define the inputs


def node_requirements(plan: Plan, location: SweepLocation) -> NodeRequirements:
    """What the missing work of a plan requires of each node."""
    values = [each for requirement in plan.requirements for each in _values(requirement.spec)]
    inputs = [(ROLES.get(name, name), ref.name) for name, ref in values if isinstance(ref, Ref)]
    trial, generator = plan.sweep.resources.trial, plan.sweep.resources.generator
    return NodeRequirements(
        inputs=tuple(dict.fromkeys(inputs)),
        data_root=location.data_root,
        uses_gpus=bool(trial.gpu or generator.gpu),
        # With custom resources, the user selects the machines of the generators.
        uses_bf16=bool(generator.gpu and not generator.custom) and ("precision", "bf16") in values,
        plugins=plan.sweep.plugins,
    )


ROLES = {"test_dataset": "dataset", "model": "generator"}


def _values(spec: Any) -> Iterator[tuple[str, Any]]:
    """Names and values of the fields of a spec and of the specs in it."""
    for field in fields(spec):
        value = getattr(spec, field.name)
        if is_dataclass(value) and not isinstance(value, Ref):
            yield from _values(value)
        else:
            yield field.name, value


# ---------------------------------------------------------------- facts of a machine


def node_facts(store: str, token: str, needs: NodeRequirements, use_gpu: bool) -> Facts:
    """Collect facts about the machine that runs this function.

    Args:
        store: folder, or URI of a bucket.
        token: random token that the driver has written into the store.
        needs: names the inputs to compare.
        use_gpu: let torch compute on a GPU.
    """
    use_plugins(needs.plugins)
    return {
        "code": {**_versions(), **_code_digests()},
        "store": _store_problem(store, token),
        "files": [_input_facts(role, name, needs) for role, name in needs.inputs],
        "gpu": _gpu_problem(needs.uses_bf16) if use_gpu else "",
    }


def _versions() -> dict[str, str]:
    """Major and minor versions, on which results depend; patches and builds do not count."""
    found = {"python": python_version()}
    for library in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[library] = version(library)
    return {name: ".".join(each.split(".")[:2]) for name, each in found.items()}


def _code_digests() -> dict[str, str]:
    """Digests of airsweep's modules."""
    files = (file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
    return {file.relative_to(ROOT).as_posix(): file_digest(file) for file in files}


def _store_problem(store: str, token: str) -> str:
    """Why this machine cannot read the driver's token in the store, or write a file there."""
    try:
        if _has_token(store, token):
            with store_token(store):
                return ""
        exists = is_bucket(store) or os.path.isdir(store)
        return "is not the store that the driver uses" if exists else "does not exist"
    except OSError as problem:
        return f"cannot be used ({problem.strerror or problem})"


def _has_token(store: str, token: str) -> bool:
    """Whether the store has the file of a token; waits VISIBLE seconds for it."""
    deadline, (storage, path) = time.monotonic() + VISIBLE, _place(store, token)
    while storage.get(path) is None:
        if time.monotonic() > deadline:
            return False
        time.sleep(VISIBLE / 8)
    return True


@contextmanager
def store_token(store: str) -> Iterator[str]:
    """Keep the file of a random token in the store while the block runs.

    A node that can read the driver's token uses the same store. Equal paths are not enough: they
    may be separate folders on two machines.

    Raises:
        OSError: the store is not writable, or the bucket does not answer.
    """
    token = uuid.uuid4().hex
    storage, path = _place(store, token)
    try:
        storage.put(path, bytes(TOKEN_BYTES))
        yield token
    finally:
        storage.delete(path)


def _place(store: str, token: str) -> tuple[Any, Any]:
    """What has the calls `get`, `put` and `delete`, and the path to give to them."""
    path = f"{TOKENS}{token}"
    return (parse(store), path) if is_bucket(store) else (Folder(Path(store)), Path(store, path))


def _input_facts(role: str, name: str, needs: NodeRequirements) -> tuple[int, str] | str:
    """Number of files of an input and a digest of samples, since reading all would take too long;
    or why it cannot be used."""
    try:
        if role == "dataset":
            files = get_dataset(name).files(needs.data_root)
        else:
            _, files = input_files(role, name)
        return len(files), _sample_digest(sorted(files))
    except (OSError, ValueError) as problem:
        return str(problem)


def _sample_digest(files: Sequence[Path]) -> str:
    """Digest of names, sizes and both ends of up to SAMPLE files.

    Sizes alone do not distinguish two sets of weights with the same shapes.
    """
    step = -(-len(files) // SAMPLE) or 1
    common = os.path.commonpath([file.parent for file in files] or [Path("/")])
    digest = hashlib.blake2b(digest_size=8)
    for file in files[::step]:
        length = file.stat().st_size
        digest.update(f"{file.relative_to(common)} {length}\n".encode())
        with open(file, "rb") as handle:
            digest.update(handle.read(ENDS))
            handle.seek(max(ENDS, length - ENDS))
            digest.update(handle.read(ENDS))
    return digest.hexdigest()


def _gpu_problem(uses_bf16: bool) -> str:
    """Why the sweep cannot use the GPUs; empty if it can, or if their memory is in use."""
    try:
        import torch

        if torch.cuda.is_available():
            if uses_bf16 and (capability := torch.cuda.get_device_capability()) < (8, 0):
                return (
                    "the GPU has no bf16 (computing capability {}.{}, which is below 8.0): set "
                    "lora.precision, generation.precision and evidence.precision to fp32"
                ).format(*capability)
            with suppress(torch.cuda.OutOfMemoryError):
                torch.ones(8, device="cuda").sum().item()
            return ""
        reason = f"torch {torch.__version__} sees none"
    except Exception as problem:
        reason = f"{type(problem).__name__}: {first_line(problem)}"
    return f"Ray counts a GPU, but {reason}: fix what `nvidia-smi` or torch reports there"


# ---------------------------------------------------------------- findings


@dataclass(frozen=True)
class Finding:
    """A problem of one machine."""

    node: str
    check: str  # a key of REMEDIES
    problem: str


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
    found = []
    if changed := _changed(facts["code"], driver["code"]):
        problem = f"its code differs from the driver's: {changed}"
        found.append(Finding(node, "code", problem))
    if facts.keys() != driver.keys():  # of another airsweep
        return found
    if facts["store"]:
        found.append(Finding(node, "store", f"{store} {facts['store']}"))
    for actual, expected, (role, name) in zip(
        facts["files"], driver["files"], needs.inputs, strict=True
    ):
        if isinstance(actual, str):
            found.append(Finding(node, "files", f"{role} {name} is missing ({actual})"))
        elif not isinstance(expected, str) and actual != expected:
            problem = f"{role} {name} has other content than on the driver"
            found.append(Finding(node, "files", problem))
    if facts["gpu"]:
        found.append(Finding(node, "gpu", facts["gpu"]))
    return found


def _changed(node: Mapping[str, str], driver: Mapping[str, str]) -> str:
    """Versions and modules that differ; empty if none does."""
    changed = [
        name if "/" in name else f"{name} {node.get(name, 'is missing')}"
        for name in sorted({*node, *driver})
        if node.get(name) != driver.get(name)
    ]
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return ", ".join(changed[:3]) + more


def finding_lines(findings: Iterable[Finding]) -> list[str]:
    """One line per problem, with the machines that have it."""
    nodes_by_problem: dict[tuple[str, str], list[str]] = {}
    for finding in findings:
        nodes_by_problem.setdefault((finding.check, finding.problem), []).append(finding.node)
    return [
        f"{', '.join(nodes[:2])}{f' and {len(nodes) - 2} more' if len(nodes) > 2 else ''}: "
        f"{check}: {problem}; {REMEDIES[check]}"
        for (check, problem), nodes in nodes_by_problem.items()
    ]


# ---------------------------------------------------------------- checking machines


Report = Callable[[str], None]  # receives a summary


def refuse_unfit_nodes(plan: Plan, location: SweepLocation, report: Report) -> None:
    """Check the nodes of the joined cluster before a sweep starts.

    Raises:
        Refused: a node cannot run the sweep. The message lists nodes, problems and remedies.
    """
    started = time.monotonic()
    nodes = check_nodes(location.store, node_requirements(plan, location))
    findings = [finding for found in nodes.values() for finding in found]
    unfit = sum(bool(found) for found in nodes.values())
    _refuse(findings, f"{unfit} of {plural(len(nodes), 'machine')} of the cluster cannot")
    seconds = time.monotonic() - started
    report(f"checked {plural(len(nodes), 'machine')} of the cluster: ok, {seconds:.1f} s")


def refuse_unfit_machine(plan: Plan, location: SweepLocation, report: Report) -> None:
    """Check this machine like a node of a cluster.

    Raises:
        Refused: it cannot run the sweep.
    """
    store, needs = location.store, node_requirements(plan, location)
    with store_token(store.name) as token:
        facts = node_facts(store.name, token, needs, needs.uses_gpus)
    findings = compare_facts("this machine", facts, facts, store.name, needs)
    _refuse(findings, "this machine cannot")
    report("checked this machine: ok")


def _refuse(findings: Sequence[Finding], subject: str) -> None:
    if findings:
        raise Refused("\n  ".join([f"{subject} run this sweep:", *finding_lines(findings)]))


def check_nodes(store: ArtifactStore, needs: NodeRequirements) -> dict[str, list[Finding]]:
    """Findings of each node of the joined cluster, from a task that reserves no core and no GPU.

    Raises what `store_token` raises.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def ask(keys: Iterable[str]) -> dict[str, Facts | str]:
        pending = {}
        for key in keys:
            this_node = NodeAffinitySchedulingStrategy(key, soft=False)
            use_gpu = bool(needs.uses_gpus and nodes[key]["Resources"].get("GPU"))
            on_node = task.options(scheduling_strategy=this_node)
            pending[on_node.remote(store.name, token, needs, use_gpu)] = key
        return _gather(pending)

    nodes, found = _living_nodes(), {}
    task = ray.remote(num_cpus=0, max_retries=0, max_calls=1)(node_facts)
    with store_token(store.name) as token:
        answers = ask(nodes)
        driver = node_facts(store.name, token, needs, False)
        # Those that have not left are asked once more.
        if lost := [key for key, answer in answers.items() if str(answer).startswith(UNKNOWN)]:
            time.sleep(SETTLE)
            living = _living_nodes()
            nodes = {key: node for key, node in nodes.items() if key in living}
            if again := [key for key in lost if key in living]:
                answers |= ask(again)
    for key, node in nodes.items():
        name, answer = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})", answers[key]
        if isinstance(answer, str):
            problem = f"the machine could not be checked ({answer})"
            found[key] = [Finding(name, "answers", problem)]
        else:
            found[key] = compare_facts(name, answer, driver, store.name, needs)
    return found


def _living_nodes() -> dict[str, Any]:
    """The machines that are up, by their id."""
    import ray

    return {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}


def _gather(pending: dict[Any, str]) -> dict[str, Facts | str]:
    """For each node its facts, or the reason why it returned none."""
    import ray

    answers: dict[str, Facts | str] = {}
    done, late = ray.wait(list(pending), num_returns=len(pending), timeout=ANSWER_TIMEOUT)
    for task in done:
        try:
            answers[pending[task]] = ray.get(task)
        except Exception as problem:
            answers[pending[task]] = f"{type(problem).__name__}: {first_line(problem)}"
    for task in late:
        ray.cancel(task, force=True)
        answers[pending[task]] = f"no answer within {ANSWER_TIMEOUT:.0f} s"
    return answers

"""Before a sweep starts on a cluster that was joined: is every machine fit for it?

One task a machine, all at once, none of which takes a core or, unless the sweep asks for GPUs, a
GPU. What they see is judged beside what the driver sees (`findings.py`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray import cloudpickle
from ray.exceptions import TaskUnschedulableError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator import look
from orchestrator.echo import word_in
from orchestrator.failures import first_line
from orchestrator.findings import Examined, Finding, Seen, Wanted, judged, lines, wanted_by
from orchestrator.place import Place, Refused
from orchestrator.plan import Plan
from orchestrator.report import counted
from orchestrator.store import ArtifactStore

ANSWER = 60.0  # seconds that a machine has: a slow disk starts a process in ten
ANEW = 1.0  # seconds
FREE = 45.0  # seconds that are waited for a GPU which somebody may have, and for torch to start


def check_machines(plan: Plan, place: Place, say: Callable[[str], None]) -> None:
    """
    Raises:
        Refused: a machine is not fit for the sweep; says which, why, and what to do.
    """
    started = time.monotonic()
    found = looked_at(place.store, wanted_by(plan, place))
    problems = [one for machine in found for one in machine.findings]
    fatal = [one for one in problems if one.fatal]
    if fatal:
        unfit = len({one.node for one in fatal})
        raise Refused(
            f"{unfit} of {counted(len(found), 'machine')} of the cluster cannot do this sweep:\n  "
            + "\n  ".join(lines(fatal))
        )
    for line in lines(problems):
        say(line)
    seconds = time.monotonic() - started
    seen = len(found) - sum(one.check == "answers" for one in problems)  # the others are gone
    say(f"looked at {counted(seen, 'machine')} of the cluster: fit, {seconds:.1f} s")


def looked_at(store: ArtifactStore, wanted: Wanted) -> list[Examined]:
    """Every machine of the cluster, with what is wrong there; sorted by name."""
    nodes = _alive()
    with_gpu = [key for key, node in nodes.items() if wanted.gpus and _gpus(node)]
    cloudpickle.register_pickle_by_value(look)  # a machine may have another airsweep, or none
    try:
        with word_in(store) as (word, echoed):
            asked = (store.name, word, wanted.files, str(wanted.data_root or ""))
            looks = {key: _task(look.look, key, *asked, key) for key in nodes}
            uses = {
                key: _task(look.look_at_gpu, key, num_gpus=min(1.0, _gpus(nodes[key])))
                for key in with_gpu
            }
            tasks, lent = _begun(looks), _begun(uses)
            here = look.look(*asked, "here")
            answers = _gathered(tasks, looks, ANSWER)
            gpus = _gathered(lent, uses, FREE)
            came = {
                key: not isinstance(one, Silence) and echoed(key) for key, one in answers.items()
            }
    finally:
        cloudpickle.unregister_pickle_by_value(look)
    left_out = set() if wanted.files else {"files"}
    alive, found = set(_alive()), []
    for name, (key, node) in zip(_names(list(nodes.values())), nodes.items(), strict=True):
        answer, gpu = answers[key], gpus.get(key)
        if isinstance(answer, Silence):
            problems = [_silent(name, answer, gone=key not in alive)]
        else:
            seen = Seen(name, answer, _gpus(node), _used(gpu), came[key])
            problems = judged(seen, here, store.name, wanted.left)
        also = frozenset(left_out if gpu else {*left_out, "gpu"})
        found.append(Examined(name, tuple(problems), also))
    return sorted(found, key=lambda machine: machine.name)


def _alive() -> dict[str, Mapping[str, Any]]:
    return {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}


def _names(nodes: Sequence[Mapping[str, Any]]) -> list[str]:
    """For people; two of one machine are told apart."""
    plain = [f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})" for node in nodes]
    counts = Counter(plain)
    return [
        name if counts[name] == 1 else f"{name[:-1]}, {node['NodeID'][:8]})"
        for name, node in zip(plain, nodes, strict=True)
    ]


def _gpus(node: Mapping[str, Any]) -> float:
    return float(node["Resources"].get("GPU", 0))


# ---------------------------------------------------------------- tasks


@dataclass(frozen=True)
class Silence:
    why: str
    late: bool  # else it failed


Facts = Mapping[str, Any]  # what `look` gave on a machine
Task = Callable[[], Any]  # begins it


def _task(work: Callable[..., Any], node: str, *asked: Any, **more: Any) -> Task:
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    how = {"scheduling_strategy": there, "num_cpus": 0, "max_retries": 0}
    remote = ray.remote(work).options(**how, **more)
    return lambda: remote.remote(*asked)


def _begun(tasks: Mapping[str, Task]) -> dict[Any, str]:
    return {begin(): key for key, begin in tasks.items()}


def _gathered(
    waiting: dict[Any, str], tasks: Mapping[str, Task], seconds: float
) -> dict[str, Facts | Silence]:
    """By machine what it answered, or why it did not.

    A machine that has come just now may be unknown yet where tasks are scheduled: it is asked anew.
    """
    give_up = time.monotonic() + seconds
    found: dict[str, Facts | Silence] = {}
    while waiting:
        left = max(0.0, give_up - time.monotonic())
        done, _ = ray.wait(list(waiting), num_returns=1, timeout=left)
        if not done:
            break
        key = waiting.pop(done[0])
        try:
            found[key] = ray.get(done[0])
        except Exception as problem:
            unknown = isinstance(problem, TaskUnschedulableError) and key in _alive()
            if unknown and time.monotonic() + ANEW < give_up:
                time.sleep(ANEW)
                waiting[tasks[key]()] = key
                continue
            said = f"{type(problem).__name__}: {first_line(problem)}"
            found[key] = Silence(said, late=False)
    for task, key in waiting.items():
        ray.cancel(task, force=True)
        found[key] = Silence(f"no answer within {seconds:.0f} s", late=True)
    return found


def _silent(name: str, silence: Silence, gone: bool) -> Finding:
    """
    Args:
        gone: it is no longer one of the cluster's, such as one that an autoscaler took back.
    """
    problem = f"it could not be looked at ({silence.why})"
    remedy = "start Ray there anew, or take the machine out of the cluster, and try again"
    return Finding(name, "answers", problem, remedy, fatal=not gone)


def _used(gpu: Facts | Silence | None) -> Mapping[str, Any] | None:
    """What came of a machine's GPU; None: it was not looked at."""
    if isinstance(gpu, Silence):
        why = "none of them was free, or torch is slow to start" if gpu.late else gpu.why
        return {"problem": why, "busy": gpu.late}
    return gpu

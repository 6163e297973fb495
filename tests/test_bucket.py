"""Sweeps on a store in a bucket: all machines see the same results and can resume a killed sweep.

The tests use a real S3 server on loopback and trivial trials that take no time.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from orchestrator.store.buckets import parse
from orchestrator.store.event_log import CRASH_AT
from tests.helpers.sweeps import (
    TIMEOUT,
    begun_twice,
    environment,
    search_sweep,
    stopped_at,
    write_sweep,
)

pytestmark = pytest.mark.integration

TRIVIAL = "tests.helpers.trivial"
KILLS = 3  # sampled events


class World:
    """A sweep on a store, and commands on several machines."""

    def __init__(self, folder: Path, spec: Path, uri: str, server: Any = None) -> None:
        self.folder, self.spec, self.uri, self.server = folder, spec, uri, server
        self.built = folder / "built.log"  # builds and trials that were started, on all machines

    def start(self, machine: str, *words: str, **more: str) -> subprocess.Popen[str]:
        """Start a command on a machine."""
        return subprocess.Popen(
            [sys.executable, "-m", TRIVIAL, *words], **self.options(machine, **more)
        )

    def options(self, machine: str, **more: str) -> dict[str, Any]:
        """Options of the processes of a machine, which has its own cache folder."""
        variables = {
            "AIRSWEEP_STORE": self.uri,
            "AIRSWEEP_CACHE": str(self.folder / machine),
            "AIRSWEEP_BUILT": str(self.built),
        }
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return {**pipes, "env": environment(**variables, **more)}

    def output(self, machine: str, *words: str) -> str:
        """Standard output of a command that succeeds."""
        return ended(self.start(machine, *words), 0)[0]

    def start_run(self, machine: str, crash_at: str = "", **more: str) -> subprocess.Popen[str]:
        words = ("run", str(self.spec), "--tracking-uri", "none")
        return self.start(machine, *words, **{CRASH_AT: crash_at}, **more)


def ended(process: subprocess.Popen[str], *codes: int) -> tuple[str, str]:
    """Wait for a process; its stdout and stderr."""
    out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode in codes, (process.returncode, out, err)
    return out, err


@pytest.fixture(scope="module")
def spec(tmp_path_factory, drawn_digits) -> Path:
    return write_sweep(tmp_path_factory.mktemp("bucket"), "chaos", search_sweep(drawn_digits))


@pytest.fixture(scope="module")
def calm(spec, tmp_path_factory) -> World:
    """The same sweep in a local folder, without interruption."""
    folder = tmp_path_factory.mktemp("calm")
    world = World(folder, spec, str(folder / "runs"))
    ended(world.start_run("local"), 0)
    return world


@pytest.fixture
def world(bucket, s3_server, spec, tmp_path) -> World:
    return World(tmp_path, spec, bucket, s3_server)


def test_a_sweep_in_a_bucket_gives_the_same_results_as_in_a_folder_on_all_machines(world, calm):
    _, err = ended(world.start_run("one"), 0)
    assert not [line for line in err.splitlines() if "only" in line and "note: " not in line]
    table = calm.output("local", "table", "chaos")
    assert world.output("one", "table", "chaos") == table
    assert world.output("two", "table", "chaos") == table  # with an empty cache folder
    plan = json.loads(world.output("three", "plan", str(world.spec), "--json"))
    assert plan["trials"]["to_run"] == 0
    assert all(a["state"] == "present" and a["bytes"] >= 0 for a in plan["artifacts"])
    status = json.loads(world.output("four", "status", "chaos", "--json"))
    expected = json.loads(calm.output("local", "status", "chaos", "--json"))
    assert status["trials"] == expected["trials"]
    _, err = ended(world.start_run("five"), 0)
    assert "nothing to do" in err
    assert begun_twice(world.built, calm.built) == (Counter(), Counter())
    listed = json.loads(world.output("six", "cache", "ls", "--json"))
    assert listed["store"] == world.uri
    assert listed["leftovers"] == []
    assert all(artifact["needed_by"] == ["default/chaos"] for artifact in listed["artifacts"])
    objects = [entry.name for entry in parse(world.uri).list_objects("")]
    assert not [name for name in objects if "lock" in name]
    _, err = ended(world.start("six", "cache", "gc"), 3)
    assert "remove the record.json of an artifact first" in err


def test_another_machine_resumes_a_sweep_whose_driver_was_killed_at_any_event(world, calm):
    count = len((Path(calm.uri) / "sweeps/default/chaos/events.jsonl").read_text().splitlines())
    chosen = sorted(random.Random(0).sample(range(1, count + 1), KILLS))
    killed = 0
    for before, number in pairwise([0, *chosen]):
        process = world.start_run(f"killed-{number}", f"event:{number - before}")
        ended(process, -9, 0)
        killed += process.returncode == -9
    assert killed > 1, chosen
    ended(world.start_run("last"), 0)
    table = calm.output("local", "table", "chaos")
    assert world.output("last", "table", "chaos") == table, chosen
    trials, prepared = begun_twice(world.built, calm.built)
    assert not trials, (chosen, trials)
    assert prepared.total() <= killed, (chosen, prepared)


def test_an_unreachable_server_ends_the_run_without_losing_results(world, calm):
    words = ("run", world.spec, "--tracking-uri", "none")
    with stopped_at("trial_done", *words, module=TRIVIAL, **world.options("one")) as process:
        world.server.stop()
    try:
        _, err = ended(process, 1)
    finally:
        world.server.start()
    assert "does not answer" in err
    assert "the same command resumes the sweep" in err
    ended(world.start_run("two"), 0)
    assert world.output("two", "table", "chaos") == calm.output("local", "table", "chaos")

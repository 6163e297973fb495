"""Sweeps on a store in a bucket, on a real S3 server on loopback: from any machine the same, and
killed anywhere another machine goes on. On the trainable that takes no time.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from orchestrator.store.buckets import parse
from orchestrator.store.event_log import CRASH_AT
from tests.helpers.sweeps import TIMEOUT, begun_twice, environment, search_sweep, write_sweep

pytestmark = pytest.mark.integration

KILLS = 3  # sampled events
PRUNING = "{rule: halving, rungs: [1, 2]}"


class World:
    """One sweep on one bucket."""

    def __init__(self, folder: Path, spec: Path, uri: str, server: Any = None) -> None:
        self.folder, self.spec, self.uri, self.server = folder, spec, uri, server
        self.built = folder / "built.log"  # what was begun, on all machines together

    def start(self, machine: str, *words: str, **more: str) -> subprocess.Popen[str]:
        """A command on a machine, which has a mirror of its own."""
        known = {
            "AIRSWEEP_STORE": self.uri,
            "AIRSWEEP_CACHE": str(self.folder / machine),
            "AIRSWEEP_BUILT": str(self.built),
        }
        return subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.trivial", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(**known, **more),
        )

    def say(self, machine: str, *words: str) -> str:
        return ended(self.start(machine, *words), 0)[0]

    def running(self, machine: str, crash_at: str = "", **more: str) -> subprocess.Popen[str]:
        words = ("run", str(self.spec), "--tracking-uri", "none")
        return self.start(machine, *words, **{CRASH_AT: crash_at}, **more)


def ended(process: subprocess.Popen[str], *codes: int) -> tuple[str, str]:
    out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode in codes, (process.returncode, out, err)
    return out, err


@pytest.fixture(scope="module")
def spec(tmp_path_factory, drawn_digits) -> Path:
    body = search_sweep(drawn_digits, host="grip", pruning=PRUNING)
    return write_sweep(tmp_path_factory.mktemp("bucket"), "chaos", body)


@pytest.fixture(scope="module")
def calm(spec, tmp_path_factory) -> World:
    """The same sweep in a folder of this machine, undisturbed."""
    folder = tmp_path_factory.mktemp("calm")
    world = World(folder, spec, str(folder / "runs"))
    ended(world.running("here"), 0)
    return world


@pytest.fixture
def world(bucket, s3_server, spec, tmp_path) -> World:
    return World(tmp_path, spec, bucket, s3_server)


def test_from_any_machine_a_sweep_in_a_bucket_looks_like_one_in_a_folder(world, calm):
    _, told = ended(world.running("one"), 0)
    assert "only" not in told
    table = calm.say("here", "table", "chaos")
    assert world.say("one", "table", "chaos") == table
    assert world.say("two", "table", "chaos") == table  # with an empty mirror
    plan = json.loads(world.say("three", "plan", str(world.spec), "--json"))
    assert plan["trials"]["to_run"] == 0
    assert all(one["state"] == "present" and one["bytes"] >= 0 for one in plan["artifacts"])
    status = json.loads(world.say("four", "status", "chaos", "--json"))
    there = json.loads(calm.say("here", "status", "chaos", "--json"))
    assert status["trials"] == there["trials"]
    _, said = ended(world.running("five"), 0)
    assert "nothing to do" in said
    assert begun_twice(world.built, calm.built) == (Counter(), Counter())
    listed = json.loads(world.say("six", "cache", "ls", "--json"))
    assert listed["store"] == world.uri
    assert listed["leftovers"] == []
    assert all(one["needed_by"] == ["default/chaos"] for one in listed["artifacts"])
    objects = [one.name for one in parse(world.uri).listed("")]
    assert not [name for name in objects if "lock" in name]
    _, refused = ended(world.start("six", "cache", "gc"), 3)
    assert "remove record.json first" in refused


def test_a_driver_killed_at_any_event_is_followed_by_one_on_another_machine(world, calm):
    count = len((Path(calm.uri) / "sweeps/default/chaos/events.jsonl").read_text().splitlines())
    chosen = sorted(random.Random(0).sample(range(1, count + 1), KILLS))
    killed = 0
    for before, number in pairwise([0, *chosen]):
        process = world.running(f"killed-{number}", f"event:{number - before}")
        ended(process, -9, 0)
        killed += process.returncode == -9
    assert killed > 1, chosen
    ended(world.running("last"), 0)
    table = calm.say("here", "table", "chaos")
    assert world.say("last", "table", "chaos") == table, chosen
    trials, prepared = begun_twice(world.built, calm.built)
    assert not trials, (chosen, trials)
    assert prepared.total() <= killed, (chosen, prepared)


def test_of_two_drivers_on_two_machines_one_runs_the_sweep(world, calm):
    both = [world.running(name) for name in ("one", "two")]
    said = [ended(process, 0, 3)[1] for process in both]
    assert 0 in [process.returncode for process in both], said
    for process, text in zip(both, said, strict=True):
        assert process.returncode == 0 or "another driver runs this sweep" in text
    assert world.say("three", "table", "chaos") == calm.say("here", "table", "chaos")
    assert begun_twice(world.built, calm.built) == (Counter(), Counter())


def test_a_server_that_goes_away_ends_the_run_and_nothing_is_lost(world, calm):
    process = world.running("one")
    remote = parse(world.uri)
    while not remote.has("sweeps/default/chaos/events/00000012.json"):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    world.server.stop()
    try:
        _, said = ended(process, 1)
    finally:
        world.server.start()
    assert "does not answer" in said
    assert "the same command resumes the sweep" in said
    ended(world.running("two"), 0)
    assert world.say("two", "table", "chaos") == calm.say("here", "table", "chaos")

"""A sweep on a store in a bucket: all machines see the same results and can resume a killed sweep.

The tests use a real S3 server on loopback and trivial trials that take no time.
"""

from __future__ import annotations

import json
import random
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from orchestrator.store.buckets import parse
from orchestrator.store.event_log import CRASH_AT
from tests.helpers.sweeps import (
    TIMEOUT,
    airsweep,
    begun_twice,
    environment,
    search_sweep,
    stopped_at,
    write_sweep,
)

pytestmark = pytest.mark.integration

KILLS = 3  # sampled events


class World:
    """A sweep on a store, and commands on several machines."""

    def __init__(self, folder: Path, spec: Path, uri: str) -> None:
        self.folder, self.uri = folder, uri
        self.sweep = ("run", spec, "--tracking-uri", "none")
        self.built = folder / "built.log"  # builds and trials that were started, on all machines

    def variables(self, machine: str) -> dict[str, str]:
        """The environment of a machine, which has its own cache folder."""
        folders = {"AIRSWEEP_CACHE": str(self.folder / machine), "AIRSWEEP_BUILT": str(self.built)}
        return {"AIRSWEEP_STORE": self.uri, **folders}

    def run(
        self, machine: str, *words: str | Path, codes: tuple[int, ...] = (0,), crash_at: str = ""
    ) -> subprocess.CompletedProcess[str]:
        variables = {**self.variables(machine), CRASH_AT: crash_at}
        done = airsweep(*words, check=False, trivial=True, **variables)
        assert done.returncode in codes, done.stderr
        return done

    def table(self, machine: str) -> str:
        return self.run(machine, "table", "chaos").stdout


@pytest.fixture(scope="module")
def calm(s3_server, drawn_digits, tmp_path_factory) -> World:
    """The sweep in a local folder, without interruption."""
    folder = tmp_path_factory.mktemp("calm")
    spec = write_sweep(folder, "chaos", search_sweep(drawn_digits))
    world = World(folder, spec, str(folder / "runs"))
    world.run("local", *world.sweep)
    return world


@pytest.fixture
def world(calm, bucket, tmp_path) -> World:
    return World(tmp_path, calm.sweep[1], bucket)


def test_a_sweep_whose_drivers_are_killed_on_several_machines_ends_with_the_same_results(
    world, calm
):
    count = len((Path(calm.uri) / "sweeps/default/chaos/events.jsonl").read_text().splitlines())
    chosen = sorted(random.Random(0).sample(range(1, count + 1), KILLS))
    killed = 0
    for before, number in pairwise([0, *chosen]):
        crash_at = f"event:{number - before}"
        done = world.run(f"killed-{number}", *world.sweep, codes=(-9, 0), crash_at=crash_at)
        killed += done.returncode == -9
    assert killed > 1, chosen
    err = world.run("last", *world.sweep).stderr
    assert not [line for line in err.splitlines() if "only" in line and "note: " not in line]
    assert world.table("last") == calm.table("local"), chosen
    assert world.table("empty") == calm.table("local"), chosen  # with an empty cache folder
    trials, prepared = begun_twice(world.built, calm.built)
    assert not trials, (chosen, trials)
    assert prepared.total() <= killed, (chosen, prepared)

    assert "nothing to do" in world.run("five", *world.sweep).stderr
    listed = json.loads(world.run("six", "cache", "ls", "--json").stdout)
    assert (listed["store"], listed["leftovers"]) == (world.uri, [])
    assert all(artifact["needed_by"] == ["default/chaos"] for artifact in listed["artifacts"])
    objects = [entry.name for entry in parse(world.uri).list_objects("")]
    assert not [name for name in objects if "lock" in name]
    err = world.run("six", "cache", "gc", codes=(3,)).stderr
    assert "remove the record.json of an artifact first" in err


def test_an_unreachable_server_ends_the_run_without_losing_results(world, calm, s3_server):
    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    pipes["env"] = environment(**world.variables("one"))
    module = "tests.helpers.trivial"
    with stopped_at("trial_done", *world.sweep, module=module, **pipes) as process:
        s3_server.stop()
    try:
        _, err = process.communicate(timeout=TIMEOUT)
    finally:
        s3_server.start()
    assert process.returncode == 1, err
    assert "does not answer" in err
    assert "the same command resumes the sweep" in err
    world.run("two", *world.sweep)
    assert world.table("two") == calm.table("local")

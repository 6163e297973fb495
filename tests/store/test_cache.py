"""`airsweep cache`: list and garbage-collect the artifacts of a store."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from air_core.tools.seal import BLANK, sealed, sealed_json
from orchestrator.cluster.node_checks import TOKENS
from orchestrator.errors import StoreRefused
from orchestrator.planning import Plan, plan_of
from orchestrator.planning.plan import write_ledger
from orchestrator.reporting.screens import status_report
from orchestrator.spec import load_sweep
from orchestrator.stages import STAGES, SyntheticFeaturesSpec
from orchestrator.store import ArtifactStore, SweepLocation
from orchestrator.store.gc import contents
from orchestrator.store.records import PREDICTIONS

AIR = """
grid: {{method: [cpl, air]}}
fixed: {{images_per_class: {count}, lora.rank: {rank}, generation.block: 8}}
"""
BYTES = 1000  # about one shard here
DAY = 24 * 3600.0


def filled(name: str, size: int = BYTES):
    def build(folder: Path) -> dict:
        (folder / name).write_bytes(bytes(range(250)) * (size // 250))
        return {"images": 3, "metrics": {}, "curves": {}, "per_class": [], "objectives": {}}

    return build


FILES = {"features": "features.safetensors", "labels": "labels.safetensors"}
FILES |= {"lora": "pytorch_lora_weights.safetensors"}


@dataclass
class World:
    """A store with sweeps that were recorded without a cluster; its files have random content."""

    store: ArtifactStore

    def record(self, name: str, body: str, **origin: object) -> SweepLocation:
        """A sweep as the driver leaves it when it starts."""
        location = SweepLocation(self.store, "default", name, None)
        location.event_log().lock()
        (location.folder / "spec.yaml").write_text(f"version: 1\nname: {name}\n{body}")
        (location.folder / "resolved.json").write_bytes(sealed_json(origin))
        write_ledger(location, self.plan(location, **origin))
        location.event_log().append("sweep_started", total=1)
        return location

    def plan(self, location: SweepLocation, only: Sequence[str] = ()) -> Plan:
        return plan_of(load_sweep(location.folder / "spec.yaml", only=only), location)

    def finish(
        self, name: str, body: str, user: str = "me", more: int = 0, **origin
    ) -> SweepLocation:
        """A complete sweep, with `more` images per class than it needs."""
        location = self.record(name, body, **origin)
        os.environ["AIRSWEEP_USER"] = user
        event_log, plan = location.event_log(), self.plan(location, **origin)
        for requirement in plan.requirements:
            if isinstance(requirement.spec, SyntheticFeaturesSpec):
                count = requirement.images + more * (requirement.images > 8)
                self.draw(requirement.spec, requirement.classes, requirement.spec.blocks(count))
            else:
                self.store.get_or_build(
                    requirement.spec, filled(FILES.get(requirement.stage, "content"))
                )
        for slot in plan.slots:
            self.store.get_or_build(slot.spec, filled(PREDICTIONS))
            key = slot.key.digest
            event_log.append("trial_done", slot=slot.id, cell=slot.cell.id, key=key)
        os.environ["AIRSWEEP_USER"] = "me"
        return location

    def draw(self, spec: SyntheticFeaturesSpec, classes, blocks: int) -> None:
        for row in (self.store.open_row(spec.images), self.store.open_row(spec)):
            for c in classes:
                for block in range(blocks):
                    shard = row.shard(c, block)
                    shard.write_bytes(sealed(BLANK.encode() + os.urandom(BYTES)))

    def holdings(self) -> set[str]:
        root = self.store.artifacts
        return {str(item.path.relative_to(root)) for item in contents(self.store).artifacts}

    def give_up(self, name: str) -> None:
        (self.store.root / "sweeps/default" / name).rename(self.store.root / name)

    def files(self) -> set[Path]:
        return {p for p in self.store.artifacts.rglob("*") if p.is_file()}


@pytest.fixture
def world(tmp_path, monkeypatch) -> World:
    monkeypatch.setenv("AIRSWEEP_USER", "me")
    store = ArtifactStore(tmp_path / "runs")
    store.initialize()
    return World(store)


@pytest.fixture
def cache(world, command):
    """Run `airsweep cache ...` in this process; its exit code, stdout and stderr."""
    return lambda *words: command("cache", *words, "--store", world.store.root)


def gc_removals(cache, *words: str) -> dict[str, dict]:
    """Removals that `gc` plans, by path."""
    code, out, err = cache("gc", *words, "--json")
    assert code == 0, err
    return {one["path"].removeprefix("artifacts/"): one for one in json.loads(out)["removals"]}


# ---------------------------------------------------------------- ls


def test_ls_counts_artifacts_and_names_the_sweeps_that_need_them(world, cache):
    world.finish("one", AIR.format(count=16, rank=4), more=16)
    world.finish("two", AIR.format(count=8, rank=8), user="you")
    world.give_up("two")
    code, out, _ = cache("ls", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["sweeps"] == ["default/one"]
    counts = {
        stage: (of["artifacts"], of["unneeded_artifacts"]) for stage, of in found["stages"].items()
    }
    # Both read the same features, labels and images without LoRA; the trials of cpl are the same.
    assert counts == {
        **{"features": (1, 0), "labels": (1, 0), "lora": (2, 1), "images": (3, 1)},
        **{"synthetic": (3, 1), "trials": (9, 3)},
    }
    assert found["bytes"] == sum(file.stat().st_size for file in world.files())
    assert set(found["users"]) == {"me", "you"}
    by_need = {(one["user"], *one["needed_by"]) for one in found["artifacts"]}
    assert by_need == {("me", "default/one"), ("you",)}
    drawn = {one["images"] for one in found["artifacts"] if one["key"].startswith("images/")}
    assert drawn == {80, 320}
    assert list(found["stages"]) == [stage for stage in STAGES if stage in found["stages"]]
    assert {"features", "labels", "lora", "images", "trials"} <= found["stages"].keys()


def test_ls_and_gc_screens_fit_80_columns(world, cache):
    world.finish("one", AIR.format(count=16, rank=4))
    world.finish("a_sweep_with_quite_a_long_name", AIR.format(count=8, rank=8), user="you")
    world.finish("two", AIR.format(count=8, rank=2))
    world.give_up("two")
    for words in (["ls"], ["gc"], ["gc", "--sweep", "one"]):
        lines = cache(*words)[1].splitlines()
        assert len(lines) > 4
        assert max(map(len, lines[1:])) <= 80, words  # the first has the store's path


def test_an_empty_store_is_refused(world, cache):
    for words in (["ls"], ["gc", "--yes"]):
        code, out, err = cache(*words)
        assert (code, out) == (2, "")
        assert f"{world.store.root} has no artifacts yet" in err


# ---------------------------------------------------------------- gc


def test_gc_removes_nothing_without_yes_and_only_unneeded_artifacts_with_it(world, cache):
    one = world.finish("one", AIR.format(count=16, rank=4))
    kept = world.holdings()
    world.finish("two", AIR.format(count=16, rank=8))
    world.give_up("two")
    everything = world.files()
    listed = gc_removals(cache)
    assert set(listed) == world.holdings() - kept
    assert world.files() == everything
    code, out, _ = cache("gc", "--yes")
    assert code == 0
    assert "removed" in out.splitlines()[-1]
    assert world.holdings() == kept
    sweep = load_sweep(one.folder / "spec.yaml")
    plan = plan_of(sweep, one)
    assert plan.to_run == 0
    assert all(
        requirement.have(world.store) == requirement.total() for requirement in plan.requirements
    )
    assert gc_removals(cache) == {}


def test_gc_of_an_edited_sweep_removes_its_old_images_and_keeps_its_old_results(world, cache):
    world.finish("one", AIR.format(count=16, rank=4))
    before = world.holdings()
    location = world.finish("one", AIR.format(count=16, rank=8))
    new = world.holdings() - before
    location.event_log().append("sweep_started", total=1)
    listed = gc_removals(cache)
    assert {path.split("/")[0] for path in listed} == {"lora", "images", "synthetic"}
    assert set(listed) < before
    assert not set(listed) & new


def test_gc_keeps_the_cells_that_a_run_with_only_excludes(world, cache):
    world.finish("one", AIR.format(count=16, rank=4))
    world.record("one", AIR.format(count=16, rank=4), only=["method=cpl"])
    assert gc_removals(cache) == {}


def test_gc_removes_artifacts_of_other_users_only_with_all_users(world, cache, monkeypatch):
    for rank, user in ((4, "me"), (8, "you"), (2, "unknown")):
        world.finish(user, AIR.format(count=8, rank=rank), user=user)
        world.give_up(user)
    own, everything = gc_removals(cache), gc_removals(cache, "--all-users")
    assert {one["user"] for one in own.values()} == {"me"}
    assert {one["user"] for one in everything.values()} == {"me", "you", "unknown"}
    assert set(everything) == world.holdings()
    first, last = cache("gc")[1].splitlines()[-2:]
    assert first.startswith(f"{len(everything) - len(own)} of other users (unknown, you)")
    assert "--all-users" in last
    cache("gc", "--yes")
    assert world.holdings() == set(everything) - set(own)
    monkeypatch.setenv("AIRSWEEP_USER", "unknown")
    assert gc_removals(cache) == {}


def test_gc_removes_nothing_if_a_sweep_cannot_be_read(world, cache):
    world.finish("one", AIR.format(count=8, rank=4))
    two = world.finish("two", AIR.format(count=8, rank=8))
    (two.folder / "ledger.json").write_text("{")
    everything = world.files()
    for words in (["--yes"], ["--sweep", "one", "--yes"], []):
        code, out, err = cache("gc", *words)
        assert (code, out) == (2, "")
        assert len(err.splitlines()) == 1
        assert "the requirements of sweep default/two cannot be read, so nothing is removed" in err
        assert "ledger.json is damaged" in err
    assert world.files() == everything
    assert "the artifacts that default/two needs are unknown" in cache("ls")[1]


def test_gc_and_running_sweeps_exclude_each_other(world, cache):
    world.finish("one", AIR.format(count=8, rank=4))
    with world.store.locks.shared_store():
        code, _, err = cache("gc", "--yes")
        assert code == 3
        assert "a sweep runs in" in err
        world.store.locks.shared_store().close()  # another sweep may start
    with world.store.locks.exclusive_store(), pytest.raises(StoreRefused, match="is removing"):
        world.store.locks.shared_store()
    assert cache("gc", "--yes")[0] == 0


def test_gc_of_one_sweep_removes_what_no_other_sweep_needs(world, cache):
    one = world.finish("one", AIR.format(count=16, rank=4))
    shared = world.holdings()
    two = world.finish("two", AIR.format(count=32, rank=4))  # needs more images of the same rows
    own = world.holdings() - shared
    world.finish("three", AIR.format(count=16, rank=8))
    assert set(gc_removals(cache, "--sweep", "two")) == own
    assert {path.split("/")[0] for path in own} == {"trials"}
    code, out, _ = cache("gc", "--sweep", "two", "--yes")
    assert code == 0
    assert "default/two keeps its event log" in out
    assert shared <= world.holdings()
    assert not own & world.holdings()
    assert gc_removals(cache) == {}
    assert [status_report(each)["removed"] > 0 for each in (one, two)] == [False, True]
    assert cache("gc", "--sweep", "four")[0] == 2


def test_gc_removes_leftovers_of_killed_builders_after_a_day(world, cache):
    location = world.finish("one", AIR.format(count=8, rank=4))
    kept = world.holdings()
    features = next(world.store.artifacts.glob("features/v1/*")).parent
    row = next(world.store.artifacts.glob("images/v*/*"))
    killed, lost = features / ".0123456789ab-01234567", features / "digits-tiny-0123456789ab"
    files = [killed / "features.safetensors", lost / "features.safetensors"]
    files += [row / ".0000-00000.parquet-host-4711", world.store.root / f"{TOKENS}0123"]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"x" * 5000)
    left = {killed, lost, *files[2:]}
    found = json.loads(cache("ls", "--json")[1])["leftovers"]
    assert {world.store.root / one["path"] for one in found} == left
    assert gc_removals(cache) == {}
    for path in (killed, lost, *files):
        os.utime(path, (time.time() - 2 * DAY,) * 2)
    cache("gc", "--yes")
    assert not any(path.exists() for path in left)
    assert world.holdings() == kept
    assert location.folder.is_dir()


def test_checkpoints_are_listed_and_removed_when_no_sweep_needs_them(world, cache):
    world.finish("one", AIR.format(count=8, rank=4))
    lora = next(world.store.artifacts.glob("lora/v*/*")).name[-12:]
    waiting = world.record("two", AIR.format(count=8, rank=8))
    plan = plan_of(load_sweep(waiting.folder / "spec.yaml"), waiting)
    waiting.event_log().unlock()
    (wanted,) = [n.spec for n in plan.requirements if n.stage == "lora" and not n.have(world.store)]
    needed = world.store.checkpoint_path(wanted)
    needed.parent.mkdir()
    complete, unneeded = (needed.with_name(f"{n}.safetensors") for n in (lora, "0123456789ab"))
    for file in (needed, complete, unneeded):
        file.write_bytes(sealed(BLANK.encode()))
    found = json.loads(cache("ls", "--json")[1])["unfinished"]
    needed_by = {needed: ["default/two"], complete: ["default/one"], unneeded: []}
    assert {world.store.root / one["path"]: one["needed_by"] for one in found} == needed_by
    assert "unfinished trainings: 3" in cache("ls")[1]
    cache("gc", "--yes")
    assert [*needed.parent.iterdir()] == [needed]


def test_an_artifact_with_a_damaged_record_is_of_an_unknown_user(world, cache):
    world.finish("one", AIR.format(count=8, rank=4))
    next(world.store.artifacts.glob("lora/*/*/record.json")).write_text("[]")
    users = json.loads(cache("ls", "--json")[1])["users"]
    assert (users.keys(), users["unknown"]["artifacts"]) == ({"me", "unknown"}, 1)

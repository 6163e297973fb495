"""`airsweep cache`: what lies in a store, is it whole, what can go; and nothing else goes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from air_core.normal import normalised
from air_core.seal import BLANK, sealed, sealed_json
from air_core.specs import SyntheticFeaturesSpec
from orchestrator.__main__ import main
from orchestrator.errors import StoreRefused
from orchestrator.planning import plan_of, resolver_of
from orchestrator.planning.estimate import Pace, record_measurements
from orchestrator.planning.plan import plan_sweep
from orchestrator.spec import load_sweep
from orchestrator.store import ArtifactStore, SweepLocation
from orchestrator.store.integrity import verify
from orchestrator.store.inventory import take_inventory
from orchestrator.store.records import PREDICTIONS
from tests.helpers.sweeps import environment

AIR = """
grid: {{method: [cpl, air]}}
fixed: {{images_per_class: {count}, lora.rank: {rank}, lora.rounds: 1, generation.block: 8}}
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
    """A store in which sweeps are recorded and finished without a cluster; contents are made up."""

    store: ArtifactStore

    def record(self, name: str, body: str, **origin: object) -> SweepLocation:
        """A sweep as the driver leaves it when it starts."""
        location = SweepLocation(self.store, "default", name, None)
        location.event_log().lock()
        (location.folder / "spec.yaml").write_text(f"version: 1\nname: {name}\n{body}")
        (location.folder / "resolved.json").write_bytes(sealed_json(origin))
        location.event_log().append("sweep_started", total=1)
        return location

    def finish(
        self, name: str, body: str, user: str = "me", more: int = 0, **origin
    ) -> SweepLocation:
        """A sweep that is done; `more` images a class lie there beside those that it needs."""
        location = self.record(name, body, **origin)
        os.environ["AIRSWEEP_USER"] = user
        resolver, event_log = resolver_of(location), location.event_log()
        sweep = load_sweep(location.folder / "spec.yaml", only=origin.get("only", []))
        plan = plan_sweep(sweep, self.store, resolver, event_log)
        for requirement in plan.requirements:
            if isinstance(requirement.spec, SyntheticFeaturesSpec):
                count = requirement.images_per_class + more * (requirement.images_per_class > 8)
                self.draw(requirement.spec, requirement.classes, requirement.spec.blocks(count))
            else:
                self.store.get_or_build(requirement.spec, filled(FILES[requirement.stage]))
        for slot in plan.slots:
            self.store.get_or_build(normalised(slot.spec), filled(PREDICTIONS))
            key = slot.key.digest
            event_log.append("trial_done", slot=slot.id, cell=slot.cell.id, key=key)
        os.environ["AIRSWEEP_USER"] = "me"
        return location

    def draw(self, spec: SyntheticFeaturesSpec, classes, blocks: int) -> None:
        rows = (
            (self.store.open_row(spec.images), ".parquet"),
            (self.store.open_row(spec), ".safetensors"),
        )
        for row, suffix in rows:
            for c in classes:
                for block in range(blocks):
                    shard = row.shard(c, block, suffix)
                    shard.write_bytes(sealed(BLANK.encode() + os.urandom(BYTES)))

    def held(self) -> set[str]:
        return {holding.name for holding in take_inventory(self.store).holdings}

    def files(self) -> set[Path]:
        return {p for p in self.store.artifacts.rglob("*") if p.is_file()}


@pytest.fixture
def world(tmp_path, monkeypatch) -> World:
    monkeypatch.setenv("AIRSWEEP_USER", "me")
    return World(ArtifactStore(tmp_path / "runs"))


@pytest.fixture
def cache(world, monkeypatch, capsys):
    """Run `airsweep cache ...` here; its exit code, what it printed, what it said."""

    def run(*words: str) -> tuple[int, str, str]:
        argv = ["airsweep", "cache", *words, "--store", str(world.store.root)]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr()
        return int(end.value.code or 0), said.out, said.err

    return run


def gone(cache, *words: str) -> dict[str, dict]:
    """What `gc` would remove, by its path."""
    code, out, err = cache("gc", *words, "--json")
    assert code == 0, err
    return {one["path"].removeprefix("artifacts/"): one for one in json.loads(out)["removals"]}


# ---------------------------------------------------------------- ls


def test_ls_counts_what_lies_there_and_says_who_needs_it(world, cache):
    world.finish("one", AIR.format(count=16, rank=4), more=16)
    world.finish("two", AIR.format(count=8, rank=8), user="you")
    world.store.root.joinpath("sweeps/default/two").rename(world.store.root / "given up")
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
    assert list(found["stages"]) == ["features", "labels", "lora", "images", "synthetic", "trials"]


def test_ls_for_people_fits_80_columns(world, cache):
    world.finish("one", AIR.format(count=16, rank=4), more=16)
    world.finish("a_sweep_with_quite_a_long_name", AIR.format(count=8, rank=8), user="you")
    for words in (["ls"], ["gc"], ["gc", "--sweep", "one"]):
        lines = cache(*words)[1].splitlines()
        assert len(lines) > 4
        assert max(map(len, lines[1:])) <= 80, words  # the first has the store's path


def test_where_nothing_was_made_there_is_nothing_to_look_after(world, cache):
    for words in (["ls"], ["verify"], ["gc", "--yes"]):
        code, out, err = cache(*words)
        assert (code, out) == (2, "")
        assert f"nothing was made in {world.store.root} yet" in err


# ---------------------------------------------------------------- gc


def test_gc_removes_nothing_without_yes_and_nothing_that_a_sweep_needs_with_it(world, cache):
    one = world.finish("one", AIR.format(count=16, rank=4))
    kept = world.held()
    world.finish("two", AIR.format(count=16, rank=8))
    (world.store.root / "sweeps/default/two").rename(world.store.root / "given up")
    everything = world.files()
    listed = gone(cache)
    assert set(listed) == world.held() - kept
    assert world.files() == everything
    code, out, _ = cache("gc", "--yes")
    assert code == 0
    assert "removed" in out.splitlines()[-1]
    assert world.held() == kept
    sweep = load_sweep(one.folder / "spec.yaml")
    plan = plan_of(sweep, one)
    assert plan.to_run == 0
    assert all(
        requirement.have(world.store) == requirement.total() for requirement in plan.requirements
    )
    assert gone(cache) == {}


def test_gc_takes_images_beyond_what_any_sweep_needs(world, cache):
    one = world.finish("one", AIR.format(count=16, rank=4), more=16)
    listed = gone(cache)
    beyond = [len(of["files"]) for of in listed.values()]
    assert beyond == [20, 20]  # 2 of 4 blocks of 10 classes; images, and their features
    cache("gc", "--yes")
    plan = plan_of(load_sweep(one.folder / "spec.yaml"), one)
    assert all(
        requirement.have(world.store) == requirement.total() for requirement in plan.requirements
    )
    row = max(
        (n for n in plan.requirements if n.stage == "images"), key=lambda n: n.images_per_class
    )
    assert len(world.store.row(row.spec.images).present(".parquet")) == row.total()


def test_gc_of_an_edited_sweep_takes_its_old_images_and_keeps_its_old_results(world, cache):
    world.finish("one", AIR.format(count=16, rank=4))
    before = world.held()
    location = world.finish("one", AIR.format(count=16, rank=8))
    new = world.held() - before
    location.event_log().append("sweep_started", total=1)
    listed = gone(cache)
    assert {path.split("/")[0] for path in listed} == {"lora", "images", "synthetic"}
    assert set(listed) < before
    assert not set(listed) & new


def test_a_run_with_only_leaves_the_other_cells_wanted(world, cache):
    world.finish("one", AIR.format(count=16, rank=4))
    world.record("one", AIR.format(count=16, rank=4), only=["method=cpl"])
    assert gone(cache) == {}


def test_cells_that_were_never_run_need_no_data_here(world, cache):
    body = "grid: {dataset: [digits, flowers102]}\nfixed: {method: zero_shot}\n"
    location = world.finish("one", body, only=["dataset=digits"])
    assert gone(cache) == {}
    slot = {"slot": "s", "cell": "flowers102-ul-text-zero_shot", "key": "0" * 40}
    ran = [e["cell"] for e in location.event_log().events() if e["event"] == "trial_done"]
    location.event_log().append(
        "trial_done", **slot | {"cell": ran[0].replace("digits", "flowers102")}
    )
    code, _, err = cache("gc", "--yes")
    assert code == 2
    assert "what sweep default/one needs cannot be told, so nothing is removed: flowers102" in err


def test_what_was_prepared_for_cells_whose_data_is_not_here_stops_gc(world, cache):
    body = "grid: {dataset: [digits, flowers102]}\nfixed: {method: zero_shot}\n"
    location = world.finish("one", body, only=["dataset=digits"])
    features = next(iter(world.store.artifacts.glob("features/*/*")))
    key = f"features/v1/{features.name}"
    location.event_log().append("artifact_prepared", stage="features", key=key)
    assert gone(cache) == {}
    key = "features/v1/flowers102-tiny-0123456789ab"
    location.event_log().append("artifact_prepared", stage="features", key=key)
    code, _, err = cache("gc", "--yes")
    assert code == 2
    assert "flowers102 needs a data root" in err


def test_gc_goes_on_where_something_cannot_be_removed_and_says_so(world, cache):
    world.finish("one", AIR.format(count=8, rank=4))
    (world.store.root / "sweeps/default/one").rename(world.store.root / "given up")
    (features,) = (path for path in world.held() if path.startswith("features/"))
    elsewhere = world.store.root.parent / "another disk"
    location = world.store.artifacts / features
    location.rename(elsewhere)
    location.symlink_to(elsewhere)  # whoever linked it must unlink it
    code, out, err = cache("gc", "--yes", "--json")
    assert code == 1
    assert world.held() == {features}
    assert [one["path"] for one in json.loads(out)["others"]] == [f"artifacts/{features}"]
    assert "could not be removed" in err
    assert (elsewhere / "record.json").exists()


def test_gc_touches_only_ones_own_and_the_unknown_on_demand(world, cache, monkeypatch):
    world.finish("mine", AIR.format(count=8, rank=4))
    world.finish("yours", AIR.format(count=8, rank=8), user="you")
    world.finish("nobodys", AIR.format(count=8, rank=2), user="unknown")
    for name in ("mine", "yours", "nobodys"):
        (world.store.root / "sweeps/default" / name).rename(world.store.root / name)
    own, everything = gone(cache), gone(cache, "--all-users")
    assert {one["user"] for one in own.values()} == {"me"}
    assert {one["user"] for one in everything.values()} == {"me", "you", "unknown"}
    assert set(everything) == world.held()
    counts = sum(one["user"] != "me" for one in everything.values())
    others = cache("gc")[1].splitlines()[-2:]
    assert others[0].startswith(f"{counts} of others (")
    assert "you" in others[0]
    assert "unknown" in others[0]
    assert "--all-users" in others[1]
    cache("gc", "--yes")
    assert world.held() == set(everything) - set(own)
    monkeypatch.setenv("AIRSWEEP_USER", "unknown")
    assert gone(cache) == {}


@pytest.mark.parametrize(
    ("file", "text", "why"),
    [
        ("spec.yaml", "version: 1\nname: two\nfixed: {method: cpll}\n", "cpll"),
        (
            "spec.yaml",
            "version: 1\nname: two\nfixed: {dataset: flowers102, method: cpl}\n",
            "flowers102 needs a data root",
        ),
        ("resolved.json", "{", "Expecting"),
    ],
)
def test_where_a_sweep_cannot_be_read_nothing_is_removed(world, cache, file, text, why):
    world.finish("one", AIR.format(count=8, rank=4))
    two = world.finish("two", AIR.format(count=8, rank=8))
    (two.folder / file).write_text(text)
    everything = world.files()
    for words in (["--yes"], ["--sweep", "one", "--yes"], []):
        code, out, err = cache("gc", *words)
        assert (code, out) == (2, "")
        assert len(err.splitlines()) == 1
        assert "what sweep default/two needs cannot be told, so nothing is removed" in err
        assert why in err
    assert world.files() == everything
    assert "what default/two needs cannot be told" in cache("ls")[1]


def test_gc_is_refused_while_a_sweep_runs_and_a_sweep_while_gc_removes(world, cache):
    location = world.finish("one", AIR.format(count=8, rank=4))
    event_log = location.event_log()
    event_log.lock()
    code, out, err = cache("gc", "--yes")
    assert (code, out) == (3, "")
    assert "default/one runs in" in err
    event_log.unlock()
    with world.store.locks.use():  # a sweep that was never recorded yet
        code, _, err = cache("gc", "--yes")
        assert code == 3
        assert "a sweep runs in" in err
        world.store.locks.use().close()  # another sweep may
    with (
        world.store.locks.alone(),
        pytest.raises(StoreRefused, match="cache gc` removes artifacts"),
    ):
        world.store.locks.use()
    assert cache("gc", "--yes")[0] == 0


def test_gc_of_one_sweep_drops_what_it_alone_needs(world, cache):
    world.finish("one", AIR.format(count=16, rank=4))
    shared = world.held()
    world.finish("two", AIR.format(count=32, rank=4))
    world.finish("three", AIR.format(count=16, rank=8))
    listed = gone(cache, "--sweep", "two")
    whole = {path for path, of in listed.items() if "files" not in of}
    in_part = {path: len(of["files"]) for path, of in listed.items() if "files" in of}
    assert {path.split("/")[0] for path in whole} == {"trials"}
    assert not whole & shared
    assert sorted(in_part.values()) == [20, 20]  # blocks 2 and 3 of 10 classes
    code, out, _ = cache("gc", "--sweep", "two", "--yes")
    assert code == 0
    assert "default/two keeps its ledger" in out
    assert shared <= world.held()
    assert not whole & world.held()
    assert gone(cache) == {}
    assert cache("gc", "--sweep", "four")[0] == 2


def test_leftovers_of_killed_builders_go_when_they_are_a_day_old(world, cache):
    location = world.finish("one", AIR.format(count=8, rank=4))
    features = next(world.store.artifacts.glob("features/v1/*"))
    row = next(world.store.artifacts.glob("images/v1/*"))
    killed = features.parent / ".0123456789ab-01234567"
    lost = features.parent / "digits-tiny-0123456789ab"
    for folder in (killed, lost):
        folder.mkdir()
        (folder / "features.safetensors").write_bytes(b"x" * 5000)
    half = row / ".0000-00000.parquet-host-4711"
    stray = features / "notes.txt"
    for file in (half, stray):
        file.write_bytes(b"x")
    left = {killed, lost, half, stray}
    assert {one.path for one in take_inventory(world.store).leftovers} == left
    assert gone(cache) == {}
    for path in (*left, killed / "features.safetensors", lost / "features.safetensors"):
        os.utime(path, (time.time() - 2 * DAY,) * 2)
    kept = world.held()
    assert set(gone(cache)) == {str(path.relative_to(world.store.artifacts)) for path in left}
    assert json.loads(cache("verify", "--json")[1])["damaged"] == []
    cache("gc", "--yes")
    assert not any(path.exists() for path in left)
    assert world.held() == kept
    assert location.folder.is_dir()


# ---------------------------------------------------------------- verify


def flipped(file: Path, location: int) -> bytes:
    """Change one bit; the file as it was."""
    data = file.read_bytes()
    changed = bytearray(data)
    changed[location % len(data)] ^= 4
    file.write_bytes(changed)
    return data


def test_unfinished_work_is_listed_and_goes_when_nothing_needs_it(world, cache):
    world.finish("one", AIR.format(count=8, rank=4))
    lora = next(world.store.artifacts.glob("lora/v1/*"))
    waiting = world.record("two", AIR.format(count=8, rank=8))
    plan = plan_of(load_sweep(waiting.folder / "spec.yaml"), waiting)
    waiting.event_log().unlock()
    (wanted,) = [n.spec for n in plan.requirements if n.stage == "lora" and not n.have(world.store)]
    kept = world.store.unfinished(wanted)
    kept.parent.mkdir()
    whole = kept.with_name(f"{lora.name.rpartition('-')[2]}-0123456789ab.safetensors")
    nobodys = kept.with_name("0123456789ab-0123456789ab.safetensors")
    for file in (kept, whole, nobodys):
        save_file({"losses": np.zeros(4)}, file)
    half = kept.with_name(f".{kept.name}")
    half.write_bytes(b"x")

    found = json.loads(cache("ls", "--json")[1])
    assert {one["path"]: one["needed_by"] for one in found["unfinished"]} == {
        f"unfinished/{kept.name}": ["default/two"],
        f"unfinished/{whole.name}": ["default/one"],
        f"unfinished/{nobodys.name}": [],
    }
    assert "unfinished trainings: 3" in cache("ls")[1]
    go = {str(file.relative_to(world.store.root)) for file in (whole, nobodys)}
    assert set(gone(cache)) == go  # half a file is too young
    assert cache("verify")[0] == 0
    cache("gc", "--yes")
    assert set(kept.parent.iterdir()) == {kept, half}
    assert gone(cache) == {}


KINDS = {
    "a trial's record": "trials/*/*/record.json",
    "a row's word": "images/*/*/row.json",
    "features": "features/*/*/features.safetensors",
    "a LoRA": "lora/*/*/*.safetensors",
    "predictions": f"trials/*/*/{PREDICTIONS}",
    "images": "images/*/*/*.parquet",
    "features of images": "synthetic/*/*/*.safetensors",
}
BESIDE = ("digests.json", "history.json", "VERSION", "sweeps/*/*/resolved.json", "unfinished/*")
BESIDE += ("sweeps/*/*/events.jsonl",)


def test_verify_finds_a_flipped_bit_in_any_file_and_says_what_to_remove(world, cache):
    world.finish("one", AIR.format(count=8, rank=4))
    world.store.settle()
    record_measurements(world.store, {("trials", "x"): Pace(1.0, 1.0)})
    kept = sealed(BLANK.encode() + os.urandom(BYTES))
    world.store.write(world.store.root / "unfinished" / "0123456789ab.safetensors", kept)
    files = len(world.files()) + len(BESIDE)
    assert cache("verify")[0] == 0
    sound = verify(take_inventory(world.store))
    assert (sound.files, sound.damaged, sound.unsealed) == (files, (), 0)
    for pattern in BESIDE:
        (file,) = world.store.root.glob(pattern)
        for at in (0, file.stat().st_size // 2):
            was = flipped(file, at)
            (found,) = verify(take_inventory(world.store)).damaged
            assert (found.file, bool(found.why)) == (file, True)
            assert bool(found.remedy) == ("unfinished" not in pattern)
            code, out, err = cache("verify")
            if pattern == "VERSION":  # no command opens such a store
                assert (code, "replace it by a file that holds 1" in err) == (3, True)
            else:
                assert (code, out.count(f"damaged: {file}")) == (1, 1)
            file.write_bytes(was)
    for kind, pattern in KINDS.items():
        file = sorted(world.store.artifacts.glob(pattern))[-1]
        for location in (0, file.stat().st_size // 2, -1):
            was = flipped(file, location)
            verdict = verify(take_inventory(world.store))
            assert [one.file for one in verdict.damaged] == [file], (kind, location)
            file.write_bytes(was)
        rows = ("images/", "synthetic/")
        remove = file if pattern.startswith(rows) else file.parent
        assert verdict.damaged[0].remove == remove
    was = flipped(file, 700)
    code, out, _ = cache("verify", "--json")
    found = json.loads(out)
    assert code == 1
    assert found["damaged"] == [
        {
            "file": str(file.relative_to(world.store.root)),
            "remove": str(file.relative_to(world.store.root)),
            "why": "is not what was written: its checksum does not fit",
            "remedy": "",
        }
    ]
    code, out, _ = cache("verify")
    assert code == 1
    assert f"damaged: {file}" in out
    assert "1 damaged: do what is named and run again" in out


def test_verify_goes_on_past_links_folders_and_json_of_another_shape(world, cache):
    location = world.finish("one", AIR.format(count=8, rank=4))
    root = world.store.root
    features = next(world.store.artifacts.glob("features/*/*"))
    lora = next(world.store.artifacts.glob("lora/*/*"))
    labels = next(world.store.artifacts.glob("labels/*/*"))
    (features / "record.json").write_text("[]")
    (lora / "record.json").unlink()
    (lora / "record.json").mkdir()
    (labels / "record.json").write_text("[" * 100_000)
    (features.parent / "loop").symlink_to(features.parent / "loop")
    (features / "up").symlink_to(features.parent)
    (root / "history.json").mkdir()
    (root / "digests.json").write_text("[]")
    (location.folder / "resolved.json").write_text('"text"')
    (location.folder / "events.jsonl").write_text("[]\n")
    for words in ("ls", "verify", "gc"):
        code, _, err = cache(words)
        assert code in (0, 1, 2), err
        assert "Traceback" not in err
    found = {
        str(one.file.relative_to(root)): one for one in verify(take_inventory(world.store)).damaged
    }
    record = {f"{one.relative_to(root)}/record.json" for one in (features, lora, labels)}
    beside = {"history.json", "digests.json"}
    sweep = {
        f"{location.folder.relative_to(root)}/{name}" for name in ("resolved.json", "events.jsonl")
    }
    assert set(found) == record | beside | sweep


def test_verify_finds_a_file_that_is_gone_and_a_record_of_another_folder(world):
    world.finish("one", AIR.format(count=8, rank=4))
    features = next(world.store.artifacts.glob("features/*/*/features.safetensors"))
    features.unlink()
    lora = next(world.store.artifacts.glob("lora/*/*"))
    lora.rename(lora.with_name("other-0123456789ab"))
    why = {
        one.file.parent.parent.parent.name: one.why
        for one in verify(take_inventory(world.store)).damaged
    }
    assert why == {
        "features": "cannot be read: No such file or directory",
        "lora": "belongs to another folder",
    }


def test_shards_from_before_there_were_checksums_are_opened_and_counted(world):
    world.finish("one", AIR.format(count=8, rank=4))
    images = sorted(world.store.artifacts.glob("images/*/*/*.parquet"))[:2]
    features = sorted(world.store.artifacts.glob("synthetic/*/*/*.safetensors"))[:2]
    for file in images:
        pq.write_table(pa.table({"image": [b"png"]}), file)
    for file in features:
        save_file({"ok": np.ones(2)}, file)
    record = next(world.store.artifacts.glob("features/*/*/record.json"))
    known = json.loads(record.read_text())
    del known["seal"]
    record.write_text(json.dumps(known))
    old = verify(take_inventory(world.store))
    assert (old.unsealed, old.damaged) == (5, ())
    for file in (images[0], features[0]):
        file.write_bytes(file.read_bytes()[:-9])
    cut = verify(take_inventory(world.store))
    assert {one.file for one in cut.damaged} == {images[0], features[0]}
    assert all("cannot be read" in one.why for one in cut.damaged)


# ---------------------------------------------------------------- cost


def test_cache_imports_neither_torch_nor_ray(world):
    world.finish("one", AIR.format(count=8, rank=4))
    code = (
        "import sys\n"
        "from orchestrator.__main__ import app\n"
        "for word in ('ls', 'verify', 'gc'):\n"
        "    try: app(['cache', word, '--store', sys.argv[1]])\n"
        "    except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'ray', 'mlflow', 'optuna', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    argv = [sys.executable, "-c", code, str(world.store.root)]
    done = subprocess.run(argv, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "none is damaged" in done.stdout

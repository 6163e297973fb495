"""What every backend of a store promises: a folder, and a bucket on a real S3 server on loopback.

A machine is a name: in a bucket each has a folder of its own, which starts empty.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from air_core.specs import FeaturesSpec, FolderImages, Ref
from orchestrator.errors import MissingArtifact, StoreRefused, SweepBusy
from orchestrator.keys import artifact_key
from orchestrator.store import ArtifactStore, EventLog, open_store
from orchestrator.store._leases import LOCK_SECONDS
from orchestrator.store.backends import RECORD
from orchestrator.store.integrity import verify
from orchestrator.store.inventory import take_inventory
from orchestrator.store.location import location_named, recorded_names

SPEC = FeaturesSpec(dataset=Ref(name="digits", digest="d"), backbone=Ref(name="tiny", digest="b"))
ROW = FolderImages(model=Ref(name="folder:x", digest="f"), classnames=("a",), size=8, block=2)


@pytest.fixture(params=["folder", "bucket"])
def place(request, tmp_path) -> str:
    """Of a store that nobody has used."""
    if request.param == "folder":
        return str(tmp_path / "runs")
    return request.getfixturevalue("bucket")


@pytest.fixture
def machine(place, tmp_path, monkeypatch) -> Callable[[str], ArtifactStore]:
    """The store as a machine of a name sees it."""

    def opened(name: str) -> ArtifactStore:
        monkeypatch.setenv("AIRSWEEP_CACHE", str(tmp_path / name))
        return open_store(place)

    return opened


def numbers(text: str) -> Callable[[Path], dict[str, Any]]:
    def build(folder: Path) -> dict[str, Any]:
        (folder / "numbers").write_text(text)
        return {"said": text}

    return build


def refuse(folder: Path) -> dict[str, Any]:
    raise AssertionError("it is there already")


# ---------------------------------------------------------------- artifacts


def test_what_was_built_is_found_everywhere_and_not_built_again(machine):
    assert not machine("one").has(SPEC)
    built = machine("one").get_or_build(SPEC, numbers("1 2 3"))
    other = machine("two")
    assert other.has(SPEC)
    read = other.get_or_build(SPEC, refuse)
    assert read.record == built.record
    assert read.key == built.key == artifact_key(SPEC)
    assert (read.path / "numbers").read_text() == "1 2 3"
    (named,) = machine("three").named(FeaturesSpec, built.key.digest[:20])
    assert (named / "numbers").read_text() == "1 2 3"
    assert machine("four").bytes(SPEC) == sum(f.stat().st_size for f in read.path.iterdir())


def test_without_its_record_an_artifact_does_not_exist(machine, place):
    built = machine("one").get_or_build(SPEC, numbers("of a builder that died before the end"))
    machine("one").backend.remove(built.path / RECORD)
    other = machine("two")
    assert not other.has(SPEC)
    with pytest.raises(MissingArtifact, match=f"{place}; run `airsweep prepare"):
        other.get(SPEC)
    made = other.get_or_build(SPEC, numbers("made again"))
    assert (made.path / "numbers").read_text() == "made again"
    assert (machine("three").get(SPEC).path / "numbers").read_text() == "made again"


def test_two_builders_of_one_key_end_with_the_one_that_was_first(machine):
    """As if their locks had not held."""
    one, two = machine("one"), machine("two")
    with one.building(SPEC) as slow:
        (slow.folder / "numbers").write_text("slow")
        with two.building(SPEC) as fast:
            (fast.folder / "numbers").write_text("fast")
    for store in (one, two, machine("three")):
        artifact = store.get(SPEC)
        assert (artifact.path / "numbers").read_text() == "fast"
    (holding,) = take_inventory(machine("four")).holdings
    assert len(holding.files) == 2  # what the slow one built is gone
    assert take_inventory(machine("four")).leftovers == ()


def test_who_asks_for_what_another_machine_builds_waits_and_reads_it(machine):
    one, two = machine("one"), machine("two")
    begun, waits, go_on, found = threading.Event(), threading.Event(), threading.Event(), []
    two.locks.waits = lambda *what: waits.set()

    def build(folder: Path) -> dict[str, Any]:
        begun.set()
        assert go_on.wait(60)
        return numbers("first")(folder)

    first = threading.Thread(target=lambda: one.get_or_build(SPEC, build))
    second = threading.Thread(target=lambda: found.append(two.get_or_build(SPEC, refuse)))
    first.start()
    assert begun.wait(60)
    second.start()
    assert waits.wait(60)
    go_on.set()
    first.join(60)
    second.join(60)
    assert (found[0].path / "numbers").read_text() == "first"
    assert list((two.root / "locks").iterdir()) == []


def test_a_builder_may_ask_for_what_it_is_made_from(machine):
    store = machine("one")
    base = FeaturesSpec(dataset=Ref(name="digits", digest="e"), backbone=SPEC.backbone)

    def upon(folder: Path) -> dict[str, Any]:
        return {"of": store.get_or_build(base, numbers("1")).record["info"]["said"]}

    assert store.get_or_build(SPEC, upon).record["info"] == {"of": "1"}


def test_a_build_that_fails_leaves_nothing(machine):
    def half(folder: Path) -> dict[str, Any]:
        (folder / "numbers").write_text("1 2")
        raise RuntimeError("no more numbers")

    with pytest.raises(RuntimeError, match="no more numbers"):
        machine("one").get_or_build(SPEC, half)
    store = machine("two")
    assert not store.has(SPEC)
    assert [path for path in machine("one").artifacts.rglob("*") if path.is_file()] == []
    assert store.get_or_build(SPEC, numbers("1 2 3")).record["info"] == {"said": "1 2 3"}


def test_a_store_travels_to_a_worker_and_may_be_read_only_there(machine):
    store = machine("driver")
    store.get_or_build(SPEC, numbers("1 2 3"))
    packed = pickle.dumps(store.read_only())
    machine("worker")
    there = pickle.loads(packed)
    assert there.name == store.name
    assert there.root == machine("worker").root
    assert there.get(SPEC).record["info"] == {"said": "1 2 3"}
    with pytest.raises(MissingArtifact, match="read-only"):
        there.open_row(ROW)


def test_a_damaged_file_is_named(machine):
    built = machine("one").get_or_build(SPEC, numbers("1 2 3"))
    backend = machine("one").backend
    (file,) = (
        holding.path / name
        for holding in take_inventory(machine("one")).holdings
        for name in holding.files
        if name != RECORD
    )
    backend.write(file, b"1 2 4")
    with pytest.raises((MissingArtifact, ValueError), match="numbers"):
        machine("two").get(SPEC)
    (damaged,) = verify(take_inventory(machine("two"))).damaged
    assert damaged.file.name.endswith("numbers")
    assert built.path.name[-12:] in str(damaged.file)


# ---------------------------------------------------------------- files and rows


def test_small_files_are_those_of_the_last_writer_everywhere(machine):
    one, two = machine("one"), machine("two")
    one.write(one.root / "history.json", "{}")
    assert two.refresh(two.root / "history.json").read_text() == "{}"
    two.write(two.root / "history.json", '{"a": 1}')
    assert one.refresh(one.root / "history.json").read_text() == '{"a": 1}'


def test_a_long_work_goes_on_on_another_machine(machine):
    one, two, three = (machine(name) for name in ("one", "two", "three"))
    file = one.unfinished(SPEC)
    file.parent.mkdir(parents=True)
    file.write_text("half")
    one.backend.push(file)
    kept = two.unfinished(SPEC)
    two.backend.pull([kept])
    assert kept.read_text() == "half"
    kept.write_text("nearly all")
    two.backend.push(kept)
    assert one.refresh(file).read_text() == "nearly all"
    two.backend.remove(kept)
    assert not three.refresh(three.unfinished(SPEC)).exists()


def test_a_row_has_the_shards_that_were_published(machine):
    assert machine("one").row(ROW).present(".parquet") == frozenset()
    one = machine("one").open_row(ROW)
    for place in [(0, 0), (0, 2), (11, 3)]:
        one.publish(*place, ".parquet", b"pixels")
    one.publish(0, 1, ".safetensors", b"features")
    row = machine("two").open_row(ROW)
    assert row.present(".parquet") == {(0, 0), (0, 2), (11, 3)}
    assert row.present(".safetensors") == {(0, 1)}
    assert row.holds(0, 2, ".parquet")
    assert not row.holds(0, 1, ".parquet")
    assert row.read(11, 3, ".parquet") == b"pixels"
    assert not machine("two").has(ROW)  # a row is never whole


def test_a_block_that_killed_its_process_is_known_to_have_on_other_machines(machine):
    killed = [machine(name).open_row(ROW).deaths_counted(0, 0, 2) for name in ("one", "two")]
    for block in killed:
        block.__enter__()  # and never comes back
    with machine("three").open_row(ROW).deaths_counted(0, 0, 2) as deaths:
        assert deaths == 2
    with machine("three").open_row(ROW).deaths_counted(0, 0, 2) as deaths:
        assert deaths == 0


# ---------------------------------------------------------------- ledger and version


def ledger_of(store: ArtifactStore) -> EventLog:
    return location_named(store, "default", "x").event_log()


def said(event_log: EventLog) -> list[int]:
    return [event["number"] for event in event_log.events()]


def test_any_machine_reads_the_events_and_goes_on_with_them(machine):
    first = ledger_of(machine("one"))
    first.lock()
    for number in range(3):
        first.append("counted", number=number)
    assert said(ledger_of(machine("watching"))) == [0, 1, 2]
    first.unlock()
    second = ledger_of(machine("two"))
    second.lock()
    second.append("counted", number=3)
    second.unlock()
    assert said(second) == [0, 1, 2, 3]
    first.refresh()
    assert first.path.read_text() == second.path.read_text()
    assert recorded_names(machine("three")) == [("default", "x")]


def test_a_second_driver_is_refused_while_the_first_lives(machine, monkeypatch):
    monkeypatch.setenv(LOCK_SECONDS, "2")
    first, second = ledger_of(machine("one")), ledger_of(machine("two"))
    first.lock()
    first.append("counted", number=0)
    assert second.busy()
    with pytest.raises(SweepBusy, match="another driver runs this sweep"):
        second.lock()
    assert said(ledger_of(machine("watching"))) == [0]  # looking is allowed
    first.unlock()
    assert not second.busy()
    second.lock()
    second.append("counted", number=1)
    assert said(second) == [0, 1]
    second.unlock()


def test_a_store_of_another_version_is_refused_and_a_new_one_is_not(machine):
    store = machine("one")
    store.settle()
    assert machine("two").name == store.name
    store.write(store.root / "VERSION", "2\n")
    with pytest.raises(StoreRefused, match=r"version '2'.*reads version 1 alone.*--store"):
        machine("three")

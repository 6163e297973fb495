"""Behaviour of every store: in a folder, and a bucket on a real S3 server on loopback.

Tests open the store by a machine name. With a bucket, each machine has its own empty cache folder.
"""

from __future__ import annotations

import itertools
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from air_core.settings import Ref
from air_core.tools.seal import BLANK, sealed
from orchestrator.errors import (
    BucketUnreachable,
    DamagedArtifact,
    MissingArtifact,
    StoreRefused,
    SweepBusy,
)
from orchestrator.keys import artifact_key
from orchestrator.stages import FeaturesSpec, FolderImages
from orchestrator.store import ArtifactStore, EventLog, SweepLocation, open_store
from orchestrator.store._leases import LOCK_SECONDS
from orchestrator.store.buckets import BucketClient
from orchestrator.store.checkpoints import (
    START,
    Checkpoint,
    delete_checkpoint,
    read_checkpoint,
    write_checkpoint,
)
from orchestrator.store.storage import RECORD
from tests.helpers.sweeps import TIMEOUT

SPEC = FeaturesSpec(dataset=Ref(name="digits", digest="d"), backbone=Ref(name="tiny", digest="b"))
ROW = FolderImages(model=Ref(name="folder:x", digest="f"), classnames=("a",), size=8, block=2)


PIXELS = sealed(b"pixels " + BLANK.encode())


@pytest.fixture(params=["folder", "bucket"])
def address(request, tmp_path) -> str:
    """Address of an empty store."""
    if request.param == "folder":
        return str(tmp_path / "runs")
    return request.getfixturevalue("bucket")


def numbers(text: str) -> Callable[[Path], dict[str, Any]]:
    def build(folder: Path) -> dict[str, Any]:
        (folder / "numbers").write_text(text)
        return {"text": text}

    return build


def refuse(folder: Path) -> dict[str, Any]:
    raise AssertionError("the artifact exists already")


# ---------------------------------------------------------------- artifacts


def test_an_artifact_is_found_on_all_machines_and_not_built_again(machine):
    assert not machine("one").has(SPEC)
    built = machine("one").get_or_build(SPEC, numbers("1 2 3"))
    other = machine("two")
    assert other.has(SPEC)
    read = other.get_or_build(SPEC, refuse)
    assert read.record == built.record
    assert read.key == built.key == artifact_key(SPEC)
    assert (read.path / "numbers").read_text() == "1 2 3"
    (record,) = machine("three").find_by_digest(FeaturesSpec, built.key.digest[:20])
    assert record == built.record
    assert machine("four").bytes(SPEC) == sum(f.stat().st_size for f in read.path.iterdir())


def test_without_its_record_an_artifact_does_not_exist(machine, address):
    built = machine("one").get_or_build(SPEC, numbers("by a builder that died"))
    machine("one").storage.delete(built.path / RECORD)
    other = machine("two")
    assert not other.has(SPEC)
    with pytest.raises(MissingArtifact, match=f"{address}; run `airsweep run SPEC --prepare"):
        other.get(SPEC)
    rebuilt = other.get_or_build(SPEC, numbers("rebuilt"))
    assert (rebuilt.path / "numbers").read_text() == "rebuilt"
    assert (machine("three").get(SPEC).path / "numbers").read_text() == "rebuilt"


def test_of_two_builders_of_one_key_the_first_to_publish_wins(machine):
    """Locks do not prevent it here."""
    one, two = machine("one"), machine("two")
    with one.building(SPEC) as slow:
        (slow.folder / "numbers").write_text("slow")
        with two.building(SPEC) as fast:
            (fast.folder / "numbers").write_text("fast")
    for store in (one, two, machine("three")):
        artifact = store.get(SPEC)
        assert (artifact.path / "numbers").read_text() == "fast"
    store = machine("four")
    assert len(store.storage.list(store.path(artifact.key))) == 2  # without that of the slow one


def test_a_request_waits_for_a_build_on_another_machine_and_reads_it(machine):
    one, two = machine("one"), machine("two")
    started, waiting, resume = threading.Event(), threading.Event(), threading.Event()
    artifacts = []
    two.locks.on_wait = lambda *arguments: waiting.set()

    def build(folder: Path) -> dict[str, Any]:
        started.set()
        assert resume.wait(TIMEOUT)
        return numbers("first")(folder)

    first = threading.Thread(target=lambda: one.get_or_build(SPEC, build))
    second = threading.Thread(target=lambda: artifacts.append(two.get_or_build(SPEC, refuse)))
    first.start()
    assert started.wait(TIMEOUT)
    second.start()
    assert waiting.wait(TIMEOUT)
    resume.set()
    first.join(TIMEOUT)
    second.join(TIMEOUT)
    assert (artifacts[0].path / "numbers").read_text() == "first"
    assert list((two.root / "locks").iterdir()) == []


def test_a_store_can_be_pickled_for_a_worker(machine):
    store = machine("driver")
    store.get_or_build(SPEC, numbers("1 2 3"))
    packed = pickle.dumps(store)
    machine("worker")
    on_worker = pickle.loads(packed)
    assert on_worker.name == store.name
    assert on_worker.root == machine("worker").root
    assert on_worker.get(SPEC).record["info"] == {"text": "1 2 3"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("numbers", content) for content in (b"1 2 4", None)),
        *((RECORD, content) for content in (b"1 2 4", b"", b"[]", b"\xff\xfe", b"[" * 100_000)),
    ],
    ids=range(7),
)
def test_a_damaged_artifact_is_refused_by_name_and_made_again(machine, address, name, content):
    machine("one").get_or_build(SPEC, numbers("1 2 3"))
    storage, folder = machine("two").storage, machine("two").path(artifact_key(SPEC))
    (file,) = (folder / each for each in storage.list(folder) if each.endswith(name))
    storage.delete(file) if content is None else storage.put(file, content)
    store = machine("three")
    for read in (store.get, store.check):
        with pytest.raises(
            DamagedArtifact, match=f"^{address}/artifacts/.*{name}.*; run"
        ) as damaged:
            read(SPEC)
    store.set_aside(damaged.value)
    store.check(SPEC)
    assert not store.has(SPEC)
    assert store.get_or_build(SPEC, numbers("1 2 3")).record["info"] == {"text": "1 2 3"}
    assert (machine("four").get(SPEC).path / "numbers").read_text() == "1 2 3"


def test_a_damaged_shard_is_refused_by_name_and_made_again(machine, address):
    row = machine("one").open_row(ROW)
    row.publish(0, 0, PIXELS)
    row.storage.put(row.shard(0, 0), PIXELS[:-1])
    store = machine("two")
    with pytest.raises(DamagedArtifact, match=f"^{address}/.*/0000-00000") as damaged:
        store.row(ROW).read(0, 0)
    store.set_aside(damaged.value)
    assert store.row(ROW).existing_shards() == frozenset()
    store.open_row(ROW).publish(0, 0, PIXELS)
    assert machine("three").row(ROW).read(0, 0) == PIXELS


# ---------------------------------------------------------------- files and rows


def test_machines_continue_a_trial_from_its_last_round_in_turns(machine):
    assert read_checkpoint(SPEC, machine("one")) is START
    for rounds, (writer, reader) in enumerate([("one", "two"), ("two", "one"), ("two", "one")], 1):
        prompts = np.full((rounds, 3), 0.5, np.float32)
        curves = {"train/loss": [2.0, 1.0, 0.5][:rounds]}
        checkpoint = Checkpoint({"prompts": prompts}, curves, 5.0 * rounds)
        write_checkpoint(SPEC, machine(writer), checkpoint)
        found = read_checkpoint(SPEC, machine(reader))
        assert np.array_equal(found.arrays["prompts"], prompts)
        assert (found.curves, found.seconds) == (curves, 5.0 * rounds)
    delete_checkpoint(SPEC, machine("one"))
    assert read_checkpoint(SPEC, machine("three")) is START


def test_a_row_has_its_published_shards_on_all_machines(machine):
    assert machine("one").row(ROW).existing_shards() == frozenset()
    one = machine("one").open_row(ROW)
    for class_index, block in [(0, 0), (0, 2), (11, 3)]:
        one.publish(class_index, block, PIXELS)
    row = machine("two").open_row(ROW)
    row.publish(11, 3, sealed(b"too late" + BLANK.encode()))
    assert row.existing_shards() == {(0, 0), (0, 2), (11, 3)}
    assert row.has_shard(0, 2)
    assert not row.has_shard(0, 1)
    assert row.read(11, 3) == PIXELS
    assert not machine("two").has(ROW)  # a row is never complete
    row.remove()
    assert machine("three").row(ROW).existing_shards() == frozenset()
    machine("three").open_row(ROW).publish(0, 0, PIXELS)
    assert machine("two").row(ROW).existing_shards() == {(0, 0)}


def test_crashes_of_a_shard_are_counted_on_all_machines_until_a_reset(machine):
    def crashes(*shard: int) -> int:
        with machine("three").open_row(ROW).count_crashes(*shard) as found:
            return found

    with ExitStack() as killed:  # contexts that do not exit during the test, as after a kill
        for name, shard in (("one", (0, 0)), ("two", (0, 0)), ("two", (3, 1))):
            killed.enter_context(machine(name).open_row(ROW).count_crashes(*shard))
        assert crashes(0, 0) == 2
        with suppress(OSError), machine("one").open_row(ROW).count_crashes(0, 0):
            raise OSError
        assert crashes(0, 0) == 0  # the third has ended
        assert crashes(3, 1) == 1
        killed.enter_context(machine("one").open_row(ROW).count_crashes(0, 0))
        machine("two").row(ROW).reset_crashes()
        assert crashes(0, 0) == 0


# ---------------------------------------------------------------- event log and version


def event_log_of(store: ArtifactStore) -> EventLog:
    store.initialize()
    return SweepLocation(store, "default", "x", None).refresh().event_log()


def recorded_numbers(event_log: EventLog) -> list[int]:
    return [event["number"] for event in event_log.events()]


def test_any_machine_reads_the_events_and_appends_to_them(machine):
    first, second = event_log_of(machine("one")), event_log_of(machine("two"))
    with first.locked():
        for number in range(3):
            first.append("counted", number=number)
        assert recorded_numbers(event_log_of(machine("watching"))) == [0, 1, 2]
    with second.locked():
        second.append("counted", number=3)
    assert recorded_numbers(second) == [0, 1, 2, 3]
    assert recorded_numbers(event_log_of(machine("one"))) == [0, 1, 2, 3]
    assert first.path.read_text() == second.path.read_text()
    assert machine("three").sweeps() == [("default", "x")]


def test_a_second_driver_is_refused_while_the_first_runs(machine, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv(LOCK_SECONDS, "2")  # a driver in a bucket renews its lease twice a second
        first = event_log_of(machine("one"))
        first.lock()
    second = event_log_of(machine("two"))
    assert second.is_locked()
    with pytest.raises(SweepBusy, match="another driver runs this sweep"):
        second.lock()
    first.unlock()
    assert not second.is_locked()
    with second.locked():
        second.append("counted", number=1)
    assert recorded_numbers(second) == [1]


@pytest.mark.parametrize(
    ("content", "why"),
    [(b'{"format": 2}', "has format 2"), (b"[1]", "has a damaged")],
)
def test_a_store_of_another_format_is_refused_with_a_remedy(machine, content, why):
    store = machine("one")
    store.storage.put(store.root / "store.json", content)
    with pytest.raises(StoreRefused, match=rf'{why}.* reads format 1: .* --store.*{{"format": 1}}'):
        machine("three")


# ---------------------------------------------------------------- faults


class Fault(BucketUnreachable):
    """A call to the disk or the server fails."""


DISK = ("fsync", "rename", "replace", "link")


@contextmanager
def failing(at: int, after: bool, in_bucket: bool, monkeypatch) -> Iterator[list[str]]:
    """Let the call number `at` to the disk or the server fail, before or after it takes effect;
    the names of the calls."""
    calls: list[str] = []

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **options: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                return call(*arguments, **options)  # of the server, or a renewal
            calls.append(name)
            if len(calls) == at + 1 and not after:
                raise Fault
            result = call(*arguments, **options)
            if len(calls) == at + 1 and after:
                raise Fault
            return result

        return called

    with monkeypatch.context() as patch:
        for of, name in [(BucketClient, "_request")] if in_bucket else [(os, n) for n in DISK]:
            patch.setattr(of, name, counted(name, getattr(of, name)))
        yield calls


def all_work(store: ArtifactStore) -> list[object]:
    """One of each kind of work on a store, as far as it is missing; what the store has then."""
    store.initialize()
    artifact = store.get_or_build(SPEC, numbers("1 2 3"))
    row = store.open_row(ROW)
    with row.count_crashes(0, 0):
        if not row.has_shard(0, 0):
            row.publish(0, 0, PIXELS)
    store.storage.put(store.root / "history.json", b"{}")
    with event_log_of(store).locked() as event_log:
        if not recorded_numbers(event_log):
            event_log.append("counted", number=0)
    numbers_now = recorded_numbers(event_log)
    return [(artifact.path / "numbers").read_text(), row.read(0, 0), numbers_now, store.sweeps()]


@pytest.mark.parametrize("after", [False, True])
def test_after_a_fault_at_any_call_the_same_work_completes_and_no_part_counts(
    address, after, tmp_path, monkeypatch
):
    monkeypatch.setenv("AIRSWEEP_LOCK_SECONDS", "0.1")  # of a lease whose release failed
    expected = ["1 2 3", PIXELS, [0], [("default", "x")]]
    for at in itertools.count():
        monkeypatch.setenv("AIRSWEEP_CACHE", str(tmp_path / f"copies {at}"))
        store = open_store(f"{address}/{at}")
        failure = failing(at, after, "://" in address, monkeypatch)
        with failure as calls, suppress(Fault, ValueError):
            all_work(store)
        other = open_store(f"{address}/{at}")
        assert not [*other.artifacts.rglob(".*")]
        if other.has(SPEC):
            assert (other.get(SPEC).path / "numbers").read_text() == "1 2 3"
        if (0, 0) in other.row(ROW).existing_shards():
            assert other.row(ROW).read(0, 0) == PIXELS
        assert all_work(other) == expected, (at, calls[at:])
        if at >= len(calls):
            break
    assert at > 15

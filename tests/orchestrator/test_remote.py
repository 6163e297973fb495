"""A store in a bucket: published once, seen from every machine, whole or not at all.

Against a real S3 server on loopback. A machine is a mirror: another one starts with an empty
folder.
"""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from air_core.seal import sealed_json
from air_core.specs import FeaturesSpec, FolderImages, Ref, SyntheticFeaturesSpec
from orchestrator import remote as remote_module
from orchestrator.image_rows import build_image_block, open_generator, read_synthetic
from orchestrator.integrity import verify
from orchestrator.inventory import take_inventory
from orchestrator.keys import artifact_key
from orchestrator.ledger import Ledger, SweepBusy
from orchestrator.locks import StoreRefused
from orchestrator.mirror import stored_name
from orchestrator.place import Refused, place_named, place_of
from orchestrator.remote import (
    LOCK_SECONDS,
    MAX_ATTEMPTS,
    Lease,
    Remote,
    RemoteAway,
    _need_boto3,
    parse,
    side_by_side,
)
from orchestrator.store import ArtifactStore, MissingArtifact, open_store
from orchestrator.sweep_file import load_sweep
from orchestrator.workshop import Workshop
from tests.servers import losing_answers
from tests.sweeps import write_sweep

SPEC = FeaturesSpec(dataset=Ref(name="digits", digest="d"), backbone=Ref(name="tiny", digest="b"))
ROW = FolderImages(model=Ref(name="folder:x", digest="f"), classnames=("a",), size=8, block=2)


@pytest.fixture
def machine(bucket, tmp_path, monkeypatch) -> Callable[[str], ArtifactStore]:
    """The store as a machine of a name sees it."""

    def opened(name: str) -> ArtifactStore:
        monkeypatch.setenv("AIRSWEEP_CACHE", str(tmp_path / name))
        return open_store(bucket)

    return opened


@pytest.fixture
def remote(bucket) -> Remote:
    return parse(bucket)


def numbers(text: str) -> Callable[[Path], dict[str, Any]]:
    def build(folder: Path) -> dict[str, Any]:
        (folder / "numbers").write_text(text)
        return {"said": text}

    return build


def refuse(folder: Path) -> dict[str, Any]:
    raise AssertionError("it is there already")


def names(remote: Remote, under: str = "") -> set[str]:
    return {one.name for one in remote.listed(under)}


def requests(remote: Remote, do: Callable[[], object]) -> list[str]:
    """What the server was asked meanwhile."""
    asked: list[str] = []
    events = remote._s3.meta.events

    def note(request: Any, **more: Any) -> None:
        asked.append(f"{request.method} {request.url}")

    events.register("before-send.s3", note)
    try:
        do()
    finally:
        events.unregister("before-send.s3", note)
    return asked


# ---------------------------------------------------------------- objects


def test_of_many_writers_of_a_name_one_wins_and_all_learn_which(remote):
    won: list[int] = []

    def put(writer: int) -> None:
        if remote.put_once("place", f"writer {writer}".encode()):
            won.append(writer)

    side_by_side(put, range(12))
    assert len(won) == 1
    assert remote.get("place") == f"writer {won[0]}".encode()


def test_an_answer_that_was_lost_does_not_make_a_writer_think_that_he_lost(remote):
    assert remote.put_once("place", b"mine")
    assert remote.put_once("place", b"mine")  # asked again, since nothing was heard
    assert not remote.put_once("place", b"another's")


def test_a_listing_has_neither_folder_markers_nor_what_begins_alike(remote):
    for name in ("a/", "a/one", "a/deep/two", "ab/three"):
        remote.put(name, b"x" if name[-1] != "/" else b"")
    assert names(remote, "a") == {"one", "deep/two"}
    assert {one.name for one in remote.listed("a", deep=False)} == {"one"}
    assert [one.name for one in remote.listed("a", after="deep/two")] == ["one"]
    assert remote.folders("") == ["a", "ab"]


def test_more_objects_than_a_page_holds_are_listed(remote):
    side_by_side(lambda number: remote.put(f"many/{number:04}", b""), range(1003))
    assert len(names(remote, "many")) == 1003


def test_a_large_file_is_sent_in_parts_and_is_the_same(remote, tmp_path, monkeypatch):
    monkeypatch.setattr(remote_module, "LARGE", 1 << 20)
    (tmp_path / "large").write_bytes(bytes(range(256)) * (9 << 12))  # 9 MiB: two parts
    asked = requests(remote, lambda: remote.send("large", tmp_path / "large"))
    assert sum("partNumber" in one for one in asked) == 2
    assert remote.download("large", tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "large").read_bytes()
    assert not remote.download("small", tmp_path / "none")


# ---------------------------------------------------------------- artifacts


def test_what_one_machine_built_another_reads_and_does_not_build(machine, remote):
    built = machine("one").get_or_build(SPEC, numbers("1 2 3"))
    other = machine("two")
    assert other.has(SPEC)
    read = other.get_or_build(SPEC, refuse)
    assert read.record == built.record
    assert read.path != built.path
    assert (read.path / "numbers").read_text() == "1 2 3"
    assert requests(remote, lambda: other.get(SPEC)) == []  # it is here now


def test_data_lie_in_the_bucket_under_their_digests_and_the_record_beside_them(machine, remote):
    built = machine("one").get_or_build(SPEC, numbers("1 2 3"))
    digest = built.record["files"]["numbers"]
    folder = f"artifacts/features/v1/{artifact_key(SPEC).digest[:12]}"
    assert names(remote, folder) == {"record.json", stored_name("numbers", digest)}


def test_without_its_record_an_artifact_is_not_there(machine, remote):
    machine("one").get_or_build(SPEC, numbers("of a builder that died before the end"))
    folder = f"artifacts/features/v1/{artifact_key(SPEC).digest[:12]}"
    remote.delete(f"{folder}/record.json")
    other = machine("two")
    assert not other.has(SPEC)
    with pytest.raises(MissingArtifact, match="s3://air/"):
        other.get(SPEC)
    made = other.get_or_build(SPEC, numbers("made again"))
    assert (made.path / "numbers").read_text() == "made again"
    assert (machine("three").get(SPEC).path / "numbers").read_text() == "made again"


def test_no_record_in_a_bucket_writes_outside_of_its_folder(machine, remote, tmp_path):
    built = machine("one").get_or_build(SPEC, numbers("fine"))
    place = f"artifacts/features/v1/{artifact_key(SPEC).digest[:12]}"
    for name in ("../../../../out", "/tmp/out", "..", ""):
        digest = built.record["files"]["numbers"]
        remote.put(f"{place}/{stored_name(name, digest)}", b"fine")
        record = {**built.record, "files": {name: digest}}
        remote.put(f"{place}/record.json", sealed_json(record))
        with pytest.raises(MissingArtifact, match="no file name"):
            machine(f"reader of {len(name)}").get(SPEC)
    assert not list(tmp_path.rglob("out"))


def test_two_builders_of_one_key_end_with_the_one_that_was_first(machine, remote):
    """As if their locks had not held."""
    one, two = machine("one"), machine("two")
    with one.building(SPEC) as slow:
        (slow.folder / "numbers").write_text("slow")
        with two.building(SPEC) as fast:
            (fast.folder / "numbers").write_text("fast")
    for store in (one, two, machine("three")):
        artifact = store.get(SPEC)
        assert (artifact.path / "numbers").read_text() == "fast"
    folder = f"artifacts/features/v1/{artifact_key(SPEC).digest[:12]}"
    assert len(names(remote, folder)) == 2  # the data of the slow one are gone


def test_who_asks_for_what_another_machine_builds_waits_and_reads_it(machine):
    one, two = machine("one"), machine("two")
    begun, go_on, found = threading.Event(), threading.Event(), []

    def build(folder: Path) -> dict[str, Any]:
        begun.set()
        go_on.wait(30)
        return numbers("first")(folder)

    first = threading.Thread(target=lambda: one.get_or_build(SPEC, build))
    first.start()
    assert begun.wait(30)
    second = threading.Thread(target=lambda: found.append(two.get_or_build(SPEC, refuse)))
    second.start()
    second.join(0.7)
    assert second.is_alive()
    go_on.set()
    first.join(30)
    second.join(30)
    assert (found[0].path / "numbers").read_text() == "first"


def test_a_damaged_object_is_told_and_not_served(machine, remote):
    built = machine("one").get_or_build(SPEC, numbers("1 2 3"))
    name = stored_name("numbers", built.record["files"]["numbers"])
    remote.put(f"artifacts/features/v1/{artifact_key(SPEC).digest[:12]}/{name}", b"1 2 4")
    two = machine("two")
    with pytest.raises(MissingArtifact, match=r"is not what was written; remove record\.json"):
        two.get(SPEC)
    verdict = verify(take_inventory(two))
    assert [one.file.name for one in verdict.damaged] == [name]


def test_what_was_removed_by_hand_and_made_again_is_read_as_it_is_now(machine, remote):
    machine("one").get_or_build(SPEC, numbers("before"))
    seen = machine("two")
    seen.glance([SPEC])  # its record is here, its files are not
    folder = f"artifacts/features/v1/{artifact_key(SPEC).digest[:12]}"
    for name in names(remote, folder):
        remote.delete(f"{folder}/{name}")
    assert not machine("one").has(SPEC)  # the mirror does not say what is there
    again = machine("one").get_or_build(SPEC, numbers("after"))
    assert (again.path / "numbers").read_text() == "after"
    assert (seen.get(SPEC).path / "numbers").read_text() == "after"


def test_a_store_travels_to_a_worker_with_the_mirror_of_the_worker(machine, monkeypatch, tmp_path):
    store = machine("driver")
    store.get_or_build(SPEC, numbers("1 2 3"))
    packed = pickle.dumps(store.read_only())
    assert str(tmp_path).encode() not in packed
    monkeypatch.setenv("AIRSWEEP_CACHE", str(tmp_path / "worker"))
    there = pickle.loads(packed)
    assert there.root.is_relative_to(tmp_path / "worker")
    assert there.get(SPEC).record["info"] == {"said": "1 2 3"}
    with pytest.raises(MissingArtifact, match="read-only"):
        there.open_row(ROW)


def test_many_artifacts_are_asked_for_in_one_request(machine, remote):
    specs = [
        FeaturesSpec(dataset=Ref(name="digits", digest=f"{n}"), backbone=SPEC.backbone)
        for n in range(40)
    ]
    store = machine("one")
    for spec in specs[:4]:
        store.get_or_build(spec, numbers("1"))
    other = machine("two")
    other.survey(specs)
    assert requests(remote, lambda: other.survey(specs)) == []
    asked = requests(remote, lambda: [other.has(spec) for spec in specs])
    assert asked == []
    assert [other.has(spec) for spec in specs].count(True) == 4


def test_small_files_are_those_of_the_last_writer_everywhere(machine):
    one, two = machine("one"), machine("two")
    one.write(one.root / "history.json", "{}")
    assert two.refresh(two.root / "history.json").read_text() == "{}"
    two.write(two.root / "history.json", '{"a": 1}')
    assert one.refresh(one.root / "history.json").read_text() == '{"a": 1}'


def test_a_long_work_goes_on_on_another_machine(machine):
    killed = machine("one").unfinished(SPEC)
    killed.bring()
    killed.path.write_text("half")
    killed.keep()
    store = machine("two")
    kept = store.unfinished(SPEC)
    kept.bring()
    assert kept.path.read_text() == "half"
    kept.path.write_text("nearly all")
    kept.keep()
    killed.bring()
    assert killed.path.read_text() == "half"  # what is here is not looked for elsewhere
    killed.bring(anew=True)
    assert killed.path.read_text() == "nearly all"
    kept.drop()
    later = machine("three").unfinished(SPEC)
    later.bring()
    assert not later.path.exists()
    assert names(store.mirror.remote, "unfinished") == set()


# ---------------------------------------------------------------- rows


def test_shards_of_one_machine_are_there_on_another_and_put_once(machine):
    one, two = machine("one"), machine("two")
    one.open_row(ROW).publish(0, 3, ".parquet", b"pixels")
    row = two.open_row(ROW)
    assert row.present(".parquet") == {(0, 3)}
    assert row.holds(0, 3, ".parquet")
    assert not row.holds(0, 3, ".safetensors")
    row.publish(0, 3, ".parquet", b"other pixels")  # too late
    assert row.shard(0, 3, ".parquet").read_bytes() == b"pixels"
    assert two.code(ROW) == one.code(ROW) is not None


def test_a_block_drawn_on_one_machine_is_read_on_another(machine, drawn_digits, resolver):
    from air_core.datasets.digits import CLASSNAMES

    images = FolderImages(
        model=resolver.weights("generator", f"folder:{drawn_digits}"),
        classnames=CLASSNAMES,
        size=32,
        block=8,
    )
    spec = SyntheticFeaturesSpec(images=images, backbone=resolver.weights("backbone", "tiny"))
    shops = [Workshop(machine(name)) for name in ("one", "two")]
    drawn = [
        build_image_block(spec, 4, 0, shop, lambda shop=shop: open_generator(images, shop))["drawn"]
        for shop in shops
    ]
    assert drawn == [8, 0]
    here, there = (read_synthetic(spec, 8, shop.store, [4]) for shop in shops)
    elsewhere = read_synthetic(spec, 8, machine("three"), [4])
    assert here.batch.features.equal(there.batch.features)
    assert here.batch.features.equal(elsewhere.batch.features)
    with pytest.raises(MissingArtifact, match="image 8 of"):
        read_synthetic(spec, 9, machine("three"), [4])
    assert verify(take_inventory(machine("four"))).damaged == ()


def test_a_block_that_killed_its_process_is_known_to_have_on_other_machines(machine):
    killed = [machine(name).open_row(ROW).deaths_counted(0, 0, 2) for name in ("one", "two")]
    for block in killed:
        block.__enter__()  # and never comes back
    with machine("three").open_row(ROW).deaths_counted(0, 0, 2) as deaths:
        assert deaths == 2
    with machine("three").open_row(ROW).deaths_counted(0, 0, 2) as deaths:
        assert deaths == 0


# ---------------------------------------------------------------- locks and ledger


def test_a_lock_is_held_by_one_until_he_is_silent_for_too_long(remote, monkeypatch):
    monkeypatch.setenv(LOCK_SECONDS, "3")
    alive, dead, other = (Lease(remote, "locks/x") for _ in range(3))
    assert alive.take()
    time.sleep(4.5)  # longer than it takes to be taken for dead
    assert not other.take()
    assert other.held()
    alive.release()
    assert not other.held()
    assert dead.take()
    dead._over.set()  # renews no more, as one who was killed on another machine
    content = json.loads(remote.get("locks/x"))
    remote.put("locks/x", json.dumps({**content, "machine": "another"}).encode())
    assert not other.take()
    assert other.take_from_the_dead()
    dead.release()  # of one who was only slow: it is not his any more
    assert not dead.take()
    other.release()


@pytest.fixture
def losing(bucket, s3_server) -> Iterator[tuple[Remote, list[str]]]:
    """The bucket behind a line that loses answers, and what it loses next."""
    to_lose: list[str] = []
    with losing_answers(s3_server, to_lose) as url:
        yield parse(f"{bucket}?endpoint_override={url}"), to_lose


@pytest.mark.parametrize("attempts", ["1", "5"])  # the next renewal finds out, or boto3's own
def test_a_lock_whose_renewal_lost_its_answer_is_still_held(attempts, losing, remote, monkeypatch):
    monkeypatch.setenv(LOCK_SECONDS, "4")
    monkeypatch.setenv(MAX_ATTEMPTS, attempts)
    behind, to_lose = losing
    holder, other = Lease(behind, "locks/x"), Lease(remote, "locks/x")
    assert holder.take()
    to_lose.append("locks/x")
    time.sleep(7)  # renewed for the last time with its answer, it would be dead by now
    assert to_lose == []
    assert not other.take()
    holder.release()
    assert other.take()
    other.release()


def test_who_took_a_lock_and_heard_no_answer_has_it(losing, remote):
    behind, to_lose = losing
    holder, other = Lease(behind, "locks/x"), Lease(remote, "locks/x")
    to_lose.append("locks/x")
    assert holder.take()
    assert to_lose == []
    assert not other.take()
    holder.release()
    assert other.take()
    other.release()


def test_who_took_a_lock_from_the_dead_and_heard_no_answer_has_it(losing, remote):
    behind, to_lose = losing
    dead, holder = Lease(remote, "locks/x"), Lease(behind, "locks/x")
    assert dead.take()
    dead._over.set()
    content = json.loads(remote.get("locks/x"))
    remote.put("locks/x", json.dumps({**content, "pid": 2**22 + 1}).encode())
    to_lose.append("locks/x")
    assert holder.take_from_the_dead()
    assert to_lose == []
    holder.release()


def test_the_lock_of_a_dead_process_of_this_machine_is_free_at_once(remote):
    holder = Lease(remote, "locks/x")
    assert holder.take()
    holder._over.set()
    content = json.loads(remote.get("locks/x"))
    remote.put("locks/x", json.dumps({**content, "pid": 2**22 + 1}).encode())
    assert Lease(remote, "locks/x").take()


def test_who_waits_for_another_machine_says_so(machine):
    holder, waiting = Lease(machine("one").mirror.remote, "locks/x"), machine("two")
    told: list[tuple[str, str, float]] = []

    def let_go_when_told(*what: Any) -> None:
        told.append(what)
        holder.release()

    waiting.locks.waits = let_go_when_told
    assert holder.take()
    with waiting.locks.turn("x"):
        assert told[0][:2] == ("x", "another machine")


def ledger_of(store: ArtifactStore) -> Ledger:
    return place_named(store, "default", "x").ledger()


def said(ledger: Ledger) -> list[int]:
    return [event["number"] for event in ledger.events()]


def test_events_are_objects_that_any_machine_reads_and_goes_on_with(machine, remote):
    first = ledger_of(machine("one"))
    first.lock()
    for number in range(3):
        first.append("counted", number=number)
    assert names(remote, "sweeps/default/x/events") == {f"{n:08}.json" for n in (1, 2, 3)}
    assert said(ledger_of(machine("watching"))) == [0, 1, 2]
    first.unlock()
    second = ledger_of(machine("two"))
    second.lock()
    second.append("counted", number=3)
    second.unlock()
    assert said(second) == [0, 1, 2, 3]
    first.refresh()
    assert first.path.read_text() == second.path.read_text()


def test_a_machine_that_has_no_ledger_reads_it_in_few_requests(machine, remote):
    first = ledger_of(machine("one"))
    first.lock()
    for number in range(300):
        first.append("counted", number=number)
    asked = requests(remote, lambda: ledger_of(machine("in the middle")))
    assert len(asked) < 60
    first.unlock()
    late = machine("late")
    asked = requests(remote, lambda: ledger_of(late))
    assert len(asked) <= 4
    assert said(ledger_of(late)) == list(range(300))


def test_a_second_driver_on_another_machine_is_refused(machine, monkeypatch):
    monkeypatch.setenv(LOCK_SECONDS, "2")
    first, second = ledger_of(machine("one")), ledger_of(machine("two"))
    first.lock()
    assert second.busy()
    with pytest.raises(SweepBusy, match=r"s3://air/.*driver.lock"):
        second.lock()
    first.unlock()
    assert not second.busy()
    second.lock()
    second.unlock()


def test_a_driver_that_was_taken_for_dead_stops_at_its_next_event(machine, remote, monkeypatch):
    first, second = ledger_of(machine("one")), ledger_of(machine("two"))
    first.lock()
    first.append("counted", number=0)
    remote.delete("sweeps/default/x/driver.lock")
    second.lock()
    second.append("counted", number=1)
    with pytest.raises(SweepBusy, match="another driver has gone on"):
        first.append("counted", number=99)
    assert said(ledger_of(machine("three"))) == [0, 1]
    second.unlock()


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("uri", "remedy"),
    [
        ("s3://key:secret@air/x", "AWS_PROFILE"),
        ("s3://air/x?secret_key=secret", "AWS_"),
        ("s3://air/x?endpoint_override=http://key:secret@host", "AWS_PROFILE"),
        ("s3:///x", "s3://bucket/prefix"),
        ("gs://air/x", "file:///"),
        ("file://host/x", "file:///<absolute folder>"),
    ],
)
def test_a_uri_that_is_no_place_for_a_store_is_refused_without_its_secret(uri, remedy):
    with pytest.raises(ValueError, match=remedy) as told:
        open_store(uri)
    assert "secret@" not in str(told.value)
    assert "=secret" not in str(told.value)


def test_a_file_uri_is_the_folder(tmp_path):
    store = open_store(f"file://{tmp_path}/runs")
    assert store.root == tmp_path / "runs"
    assert store.mirror is None


def test_a_bucket_or_server_that_is_not_there_is_told(bucket, monkeypatch):
    with pytest.raises(RemoteAway, match="there is no bucket 'nowhere'; make it"):
        open_store("s3://nowhere/x")
    started = time.monotonic()
    with pytest.raises(RemoteAway, match=r"127\.0\.0\.1:1 does not answer"):
        open_store("s3://air/x?endpoint_override=127.0.0.1:1&scheme=http")
    assert time.monotonic() - started < 20


def test_who_may_not_use_a_bucket_is_told_so(bucket, s3_server):
    def guarded(requests_without: str) -> None:
        asked = urllib.request.Request(
            f"{s3_server.url}/moto-api/reset-auth",
            requests_without.encode(),
            {"Content-Type": "text/plain"},
        )
        urllib.request.urlopen(asked).close()

    guarded("0")
    try:
        with pytest.raises(RemoteAway, match=r"no permission \(InvalidAccessKeyId\).*AWS_PROFILE"):
            open_store(bucket)
        with pytest.raises(RemoteAway, match="no permission"):
            parse(bucket).has("VERSION")
        with pytest.raises(RemoteAway, match="no permission"):
            parse(bucket).put_once("VERSION", b"1")
    finally:
        guarded("inf")


def test_without_boto3_it_is_said_what_to_install(bucket, monkeypatch):
    monkeypatch.setitem(sys.modules, "boto3", None)
    _need_boto3.cache_clear()
    with pytest.raises(ValueError, match=r"pip install 'airsweep\[s3\]'"):
        open_store(bucket)


def test_a_folder_needs_neither_boto3_nor_pyarrow():
    asked = "import sys, orchestrator.driver; print({'boto3', 'pyarrow', 'torch'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_another_version_and_a_mirror_of_another_store_are_refused(machine, remote):
    store = machine("one")
    store.settle()
    assert machine("one").root == store.root
    for name in names(remote):
        remote.delete(name)
    with pytest.raises(StoreRefused, match=r"mirrors a store that was at .* and is gone"):
        machine("one")
    machine("two").settle()
    with pytest.raises(StoreRefused, match="mirrors a store"):
        machine("one")
    shutil.rmtree(store.root)
    assert machine("one").root == store.root
    remote.put("VERSION", b"2 x\n")
    with pytest.raises(StoreRefused, match="version '2'"):
        machine("three")


def test_a_bucket_is_a_place_for_a_job_and_a_relative_folder_is_not(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    sweep = load_sweep(write_sweep(tmp_path, "job", "fixed: {method: fpl}\nseeds: [1]\n"))
    assert place_of(sweep, bucket, None).store.name == bucket
    with pytest.raises(Refused, match="s3://bucket/prefix"):
        place_of(sweep, "runs", None)


def test_nothing_is_removed_from_a_bucket(machine):
    with pytest.raises(StoreRefused, match=r"remove record\.json first"):
        machine("one").refuse_bucket("nothing is removed")

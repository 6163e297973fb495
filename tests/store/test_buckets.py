"""What a store in a bucket promises beyond what every backend does (`test_backends.py`).

Against a real S3 server on loopback. Each machine has a folder of its own, which starts empty.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from air_core.seal import sealed_json
from air_core.specs import FeaturesSpec, Ref
from orchestrator.errors import MissingArtifact, Refused, RemoteAway, StoreRefused, SweepBusy
from orchestrator.keys import artifact_key
from orchestrator.planning.requests import location_of
from orchestrator.spec import load_sweep
from orchestrator.store import ArtifactStore, open_store
from orchestrator.store._leases import LOCK_SECONDS, Lease
from orchestrator.store.backends import stored_name
from orchestrator.store.buckets import Remote, parse, side_by_side
from tests.helpers.servers import counting_requests, losing_answers
from tests.helpers.sweeps import write_sweep
from tests.store.test_backends import ROW, SPEC, ledger_of, numbers, said


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


def names(remote: Remote, under: str = "") -> set[str]:
    return {one.name for one in remote.listed(under)}


@pytest.fixture
def counted(bucket, s3_server, tmp_path, monkeypatch) -> Iterator[tuple[Any, list[str]]]:
    """Another machine, whose requests are noted."""
    requests: list[str] = []
    with counting_requests(s3_server, requests) as url:

        def opened(name: str) -> ArtifactStore:
            monkeypatch.setenv("AIRSWEEP_CACHE", str(tmp_path / name))
            return open_store(f"{bucket}?endpoint_override={url}")

        yield opened, requests


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


def test_a_listing_has_neither_folder_markers_nor_what_begins_alike(remote, s3_server):
    for name in ("a/one", "a/deep/two", "ab/three"):
        remote.put(name, b"x")
    s3_server.make_folder(remote.bucket, f"{remote.prefix}/a/")
    assert names(remote, "a") == {"one", "deep/two"}
    assert [one.name for one in remote.folder("a")[1]] == ["one"]
    assert [one.name for one in remote.listed("a", after="deep/two")] == ["one"]
    assert remote.folder("")[0] == ["a", "ab"]


# ---------------------------------------------------------------- artifacts


def test_data_lie_in_the_bucket_under_their_digests_and_the_record_beside_them(machine, remote):
    built = machine("one").get_or_build(SPEC, numbers("1 2 3"))
    digest = built.record["files"]["numbers"]
    folder = f"artifacts/features/v1/{artifact_key(SPEC).digest[:12]}"
    assert names(remote, folder) == {"record.json", stored_name("numbers", digest)}


def test_no_record_in_a_bucket_writes_outside_of_its_folder(machine, remote, tmp_path):
    built = machine("one").get_or_build(SPEC, numbers("fine"))
    place = f"artifacts/features/v1/{artifact_key(SPEC).digest[:12]}"
    for name in ("../../../../out", "/tmp/out", "..", ""):
        digest = built.record["files"]["numbers"]
        record = {**built.record, "files": {name: digest}}
        remote.put(f"{place}/record.json", sealed_json(record))
        with pytest.raises(MissingArtifact, match="no file name"):
            machine(f"reader of {len(name)}").get(SPEC)
    assert not list(tmp_path.rglob("out"))


def test_what_was_removed_by_hand_and_made_again_is_read_as_it_is_now(machine, remote):
    machine("one").get_or_build(SPEC, numbers("before"))
    seen = machine("two")
    seen.record(SPEC)  # its record is here, its files are not
    folder = f"artifacts/features/v1/{artifact_key(SPEC).digest[:12]}"
    for name in names(remote, folder):
        remote.delete(f"{folder}/{name}")
    assert not machine("one").has(SPEC)  # the mirror does not say what is there
    again = machine("one").get_or_build(SPEC, numbers("after"))
    assert (again.path / "numbers").read_text() == "after"
    assert (seen.get(SPEC).path / "numbers").read_text() == "after"


def test_many_artifacts_are_asked_for_in_one_request_and_brought_once(machine, counted):
    specs = [
        FeaturesSpec(dataset=Ref(name="digits", digest=f"{n}"), backbone=SPEC.backbone)
        for n in range(40)
    ]
    for spec in specs[:4]:
        machine("one").get_or_build(spec, numbers("1"))
    opened, requests = counted
    store = opened("two")
    requests.clear()
    store.survey(specs)
    assert [store.has(spec) for spec in specs].count(True) == 4
    assert len(requests) == 1
    store.fetch(specs[:4])
    requests.clear()
    for spec in specs[:4]:
        assert store.get(spec).record["info"] == {"said": "1"}
    assert requests == []


# ---------------------------------------------------------------- rows


def test_a_shard_is_put_once(machine):
    machine("one").open_row(ROW).publish(0, 3, ".parquet", b"pixels")
    row = machine("two").open_row(ROW)
    row.publish(0, 3, ".parquet", b"other pixels")  # too late
    assert row.shard(0, 3, ".parquet").read_bytes() == b"pixels"


# ---------------------------------------------------------------- locks and ledger


def test_a_lock_is_held_by_one_until_he_is_silent_for_too_long(remote, monkeypatch):
    monkeypatch.setenv(LOCK_SECONDS, "2")
    alive, dead, other = (Lease(remote, "locks/x") for _ in range(3))
    assert alive.acquire()
    assert not other.acquire()
    assert other.held()
    alive.release()
    assert not other.held()
    assert dead.acquire()
    dead._over.set()  # renews no more, as one who was killed on another machine
    content = json.loads(remote.get("locks/x"))
    remote.put("locks/x", json.dumps({**content, "machine": "another"}).encode())
    assert other.acquire()
    dead.release()  # of one who was only slow: it is not his any more
    assert not dead.acquire()
    other.release()


@pytest.fixture
def losing(bucket, s3_server) -> Iterator[tuple[Remote, list[str]]]:
    """The bucket behind a line that loses answers, and what it loses next."""
    to_lose: list[str] = []
    with losing_answers(s3_server, to_lose) as url:
        yield parse(f"{bucket}?endpoint_override={url}"), to_lose


def test_who_took_a_lock_and_heard_no_answer_has_it(losing, remote, monkeypatch):
    monkeypatch.setenv(LOCK_SECONDS, "2")
    behind, to_lose = losing
    holder, other = Lease(behind, "locks/x"), Lease(remote, "locks/x")
    to_lose.append("locks/x")
    assert holder.acquire()
    assert to_lose == []
    assert not other.acquire()
    holder.release()
    assert other.acquire()
    other.release()


def test_who_took_a_lock_from_the_dead_and_heard_no_answer_has_it(losing, remote):
    behind, to_lose = losing
    dead, holder = Lease(remote, "locks/x"), Lease(behind, "locks/x")
    assert dead.acquire()
    dead._over.set()
    content = json.loads(remote.get("locks/x"))
    remote.put("locks/x", json.dumps({**content, "pid": 2**22 + 1}).encode())
    to_lose.append("locks/x")
    assert holder.acquire()
    assert to_lose == []
    holder.release()


def test_events_are_objects_of_which_a_machine_reads_those_that_it_lacks(machine, remote, counted):
    first = ledger_of(machine("one"))
    first.lock()
    first.append("counted", number=0)
    opened, requests = counted
    ledger_of(opened("watching"))
    for number in range(1, 4):
        first.append("counted", number=number)
    assert names(remote, "sweeps/default/x/events") == {f"{n + 1:08}.json" for n in range(4)}
    requests.clear()
    assert said(ledger_of(opened("watching"))) == [0, 1, 2, 3]
    read = {one[-6:] for one in requests if "/events/0" in one}
    assert read == {"2.json", "3.json", "4.json"}
    first.unlock()


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
        ("gs://key:secret@air/x", "GOOGLE_APPLICATION_CREDENTIALS"),
        ("az://air/x?sas=secret", "AZURE_STORAGE_ACCOUNT_KEY"),
        ("hdfs://air/x", "gs://bucket/prefix"),
        ("file://host/x", "file:///<absolute folder>"),
    ],
)
def test_a_uri_that_is_no_place_for_a_store_is_refused_without_its_secret(uri, remedy, command):
    code, out, told = command("cache", "ls", "--store", uri)
    assert (code, out) == (2, "")
    assert remedy in told
    assert "secret@" not in told
    assert "=secret" not in told


def test_a_bucket_or_server_that_is_not_there_is_told(bucket, command):
    code, out, told = command("cache", "ls", "--store", "s3://nowhere/x")
    assert (code, out) == (3, "")
    assert "there is no bucket 'nowhere'; create it" in told
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


def test_who_has_no_credentials_is_told_what_to_set(bucket, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(RemoteAway, match="no credentials were found; set AWS_ACCESS_KEY_ID and"):
        open_store(bucket)


def test_a_folder_needs_neither_obstore_nor_pyarrow():
    asked = (
        "import sys, orchestrator.execution.driver; "
        "print({'obstore', 'pyarrow', 'torch'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_copy_of_another_store_is_refused(machine, remote):
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


def test_a_bucket_is_a_place_for_a_job_and_a_relative_folder_is_not(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    sweep = load_sweep(write_sweep(tmp_path, "job", "fixed: {method: fpl}\nseeds: [1]\n"))
    assert location_of(sweep, bucket, None).store.name == bucket
    with pytest.raises(Refused, match="s3://bucket/prefix"):
        location_of(sweep, "runs", None)

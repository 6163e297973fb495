"""Behaviour of a store in a bucket, in addition to that of every backend (`test_storage.py`).

The tests use a real S3 server on loopback. Each machine has its own empty cache folder.
"""

from __future__ import annotations

import json
import shutil
import time

import pytest

from air_core.settings import Ref
from air_core.tools.seal import sealed_json
from orchestrator.errors import BucketUnreachable, DamagedArtifact, Refused, StoreRefused, SweepBusy
from orchestrator.keys import artifact_key
from orchestrator.planning.requests import SweepRequest, location_for
from orchestrator.spec import load_sweep
from orchestrator.stages import FeaturesSpec
from orchestrator.store import open_store
from orchestrator.store._leases import LOCK_SECONDS, Lease
from orchestrator.store.buckets import BucketClient, parse, run_concurrently
from tests.helpers.sweeps import write_sweep
from tests.store.test_storage import (
    PIXELS,
    ROW,
    SPEC,
    event_log_of,
    failing,
    numbers,
    recorded_numbers,
)


@pytest.fixture
def address(bucket) -> str:
    """The store that `machine` opens."""
    return bucket


@pytest.fixture
def client(bucket) -> BucketClient:
    return parse(bucket)


def names(client: BucketClient, folder: str = "") -> set[str]:
    return {entry.name for entry in client.list_objects(folder)}


# ---------------------------------------------------------------- objects


def test_of_concurrent_writers_of_an_object_exactly_one_succeeds(client):
    contents = [f"writer {n}".encode() for n in range(12)]
    created: list[bytes] = []
    run_concurrently(lambda own: created.append(own) if client.put_once("x", own) else 0, contents)
    assert created == [client.get("x")]
    # obstore repeats a request whose response was lost, and the server refuses it.
    assert client.put_once("x", created[0])
    before = client.get_versioned("x").version
    after = client.put_if("x", b"after", before)
    assert client.put_if("x", b"after", before) == after
    assert client.put_if("x", b"later", before) is None


# ---------------------------------------------------------------- artifacts


FOLDER = f"artifacts/features/v1/{artifact_key(SPEC).digest[:12]}"


def test_a_record_in_a_bucket_cannot_write_outside_of_its_folder(machine, client, tmp_path):
    record = machine("one").get_or_build(SPEC, numbers("fine")).record
    for name in ("../../../../out", "/tmp/out", "..", ""):
        forged = {**record, "files": {name: record["files"]["numbers"]}}
        client.put(f"{FOLDER}/record.json", sealed_json(forged))
        with pytest.raises(DamagedArtifact, match="does not list files of this folder"):
            machine(f"reader of {len(name)}").get(SPEC)
    assert not list(tmp_path.rglob("out"))


def test_a_damaged_copy_is_downloaded_again(machine):
    path = machine("one").get_or_build(SPEC, numbers("fine")).path
    row = machine("one").open_row(ROW)
    row.publish(0, 0, PIXELS)
    for file in (path / "numbers", path / "record.json", row.shard(0, 0)):
        file.write_bytes(b"damaged")
        assert (machine("one").get(SPEC).path / "numbers").read_text() == "fine"
        assert row.read(0, 0) == PIXELS


def test_an_artifact_that_was_removed_and_rebuilt_is_downloaded_again(machine, client):
    machine("one").get_or_build(SPEC, numbers("before"))
    reader = machine("two")
    reader.record(SPEC)  # caches the record, but no files
    for name in names(client, FOLDER):
        client.delete(f"{FOLDER}/{name}")
    assert not machine("one").has(SPEC)  # the local copy does not count
    rebuilt = machine("one").get_or_build(SPEC, numbers("after"))
    assert (rebuilt.path / "numbers").read_text() == "after"
    assert (reader.get(SPEC).path / "numbers").read_text() == "after"


def test_many_artifacts_are_listed_in_one_request_and_downloaded_once(machine, monkeypatch):
    specs = [
        FeaturesSpec(dataset=Ref(name="digits", digest=f"{n}"), backbone=SPEC.backbone)
        for n in range(40)
    ]
    for spec in specs[:4]:
        machine("one").get_or_build(spec, numbers("1"))
    store = machine("two")
    with failing(-1, False, True, monkeypatch) as requests:
        store.survey(specs)
        assert [store.has(spec) for spec in specs].count(True) == 4
        assert len(requests) == 1
        store.fetch(specs[:4])
        requests.clear()
        for spec in specs[:4]:
            assert store.get(spec).record["info"] == {"text": "1"}
        assert requests == []


# ---------------------------------------------------------------- locks and event log


def quick_lease(client: BucketClient, monkeypatch) -> Lease:
    """A lease that is renewed twice a second. Other leases wait for a minute until it expires."""
    with monkeypatch.context() as patch:
        patch.setenv(LOCK_SECONDS, "2")
        return Lease(client, "locks/x")


def test_a_lease_has_one_holder_until_it_expires(client, monkeypatch):
    alive, dead = (quick_lease(client, monkeypatch) for _ in range(2))
    other = Lease(client, "locks/x")
    assert alive.acquire()
    assert not other.acquire()
    assert other.is_held()
    alive.release()
    assert not other.is_held()
    assert dead.acquire()
    dead._stop.set()  # stops renewing, as if it was killed on another machine
    content = json.loads(client.get("locks/x"))
    client.put("locks/x", json.dumps({**content, "machine": "another"}).encode())
    following = quick_lease(client, monkeypatch)
    assert following.acquire()
    dead.release()  # as if it was only slow: the lease has another holder now
    assert not other.acquire()
    following.release()
    killed = {**content, "pid": 2**22 + 1}  # a process of this machine that has ended
    client.put("locks/x", json.dumps(killed).encode())
    assert not other.is_held()
    started = time.monotonic()
    assert other.acquire()
    assert time.monotonic() - started < other.timeout / 2  # without waiting for an expiry
    other.release()


def test_a_damaged_copy_of_the_events_is_removed_by_hand(machine):
    event_log = event_log_of(machine("one"))
    with event_log.locked():
        event_log.append("counted", number=0)
    event_log.path.write_bytes(b"damaged\n")
    with pytest.raises(ValueError, match=":1: it has no checksum; remove this file"):
        recorded_numbers(event_log)
    event_log.path.unlink()
    assert recorded_numbers(event_log_of(machine("one"))) == [0]


def test_a_driver_whose_sweep_was_taken_over_stops_at_its_next_event(machine, client):
    first, second = event_log_of(machine("one")), event_log_of(machine("two"))
    first.lock()
    first.append("counted", number=0)
    client.delete("sweeps/default/x/driver.lock")
    second.lock()
    second.append("counted", number=1)
    with pytest.raises(SweepBusy, match="another driver has continued"):
        first.append("counted", number=99)
    assert recorded_numbers(event_log_of(machine("three"))) == [0, 1]
    second.unlock()


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("uri", "remedy"),
    [
        ("s3://key:secret@air/x", "AWS_PROFILE"),
        ("s3://air/x?secret_key=secret", "AWS_"),
        ("s3:///x", "s3://bucket/prefix"),
        ("gs://key:secret@air/x", "GOOGLE_APPLICATION_CREDENTIALS"),
        ("az://air/x?sas=secret", "AZURE_STORAGE_ACCOUNT_KEY"),
        ("hdfs://air/x", "gs://bucket/prefix"),
    ],
)
def test_an_invalid_store_uri_is_refused_without_printing_its_secret(uri, remedy, command):
    code, out, err = command("cache", "ls", "--store", uri)
    assert (code, out) == (2, "")
    assert remedy in err
    assert "secret@" not in err
    assert "=secret" not in err


def test_a_missing_bucket_and_an_unreachable_server_are_reported(bucket, command, monkeypatch):
    code, out, err = command("cache", "ls", "--store", "s3://nowhere/x")
    assert (code, out) == (3, "")
    assert "bucket 'nowhere' does not exist; create it" in err
    started = time.monotonic()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(BucketUnreachable, match=r"127\.0\.0\.1:1 does not answer"):
        open_store("s3://air/x")
    assert time.monotonic() - started < 60  # obstore's default is 180


def test_missing_credentials_are_reported(bucket, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(BucketUnreachable, match="no credentials were found; set AWS_ACCESS_KEY_ID"):
        parse(bucket).has("x")


def test_a_copy_of_another_store_is_refused(machine, client):
    store = machine("one")
    for _ in range(2):
        store.initialize()
        assert machine("one").root == store.root
        for name in names(client):
            client.delete(name)
        with pytest.raises(StoreRefused, match=r"caches an earlier store at .* no longer exists"):
            machine("one")
        shutil.rmtree(store.root)


def test_a_job_accepts_a_bucket_and_refuses_a_relative_folder(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    file = write_sweep(tmp_path, "job", "fixed: {method: fpl}\nseeds: [1]\n")
    sweep = SweepRequest(load_sweep(file))
    assert location_for(sweep, bucket, None).store.name == bucket
    with pytest.raises(Refused, match="s3://bucket/prefix"):
        location_for(sweep, "runs", None)

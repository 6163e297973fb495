"""Behaviour of a store in a bucket, in addition to that of every backend (`test_storage.py`).

The tests use a real S3 server on loopback. Each machine has its own empty cache folder.
"""

from __future__ import annotations

import json
import shutil
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from air_core.settings import Ref
from air_core.tools.seal import sealed_json
from orchestrator.environment import environment
from orchestrator.errors import BucketUnreachable, DamagedArtifact, Refused, StoreRefused, SweepBusy
from orchestrator.keys import artifact_key
from orchestrator.planning.requests import SweepRequest, location_for
from orchestrator.spec import load_sweep
from orchestrator.stages import FeaturesSpec
from orchestrator.store import ArtifactStore, open_store
from orchestrator.store._leases import LOCK_SECONDS, Lease
from orchestrator.store.buckets import BucketClient, parse, run_concurrently
from tests.helpers.servers import counting_requests, losing_responses
from tests.helpers.sweeps import write_sweep
from tests.store.test_storage import PIXELS, ROW, SPEC, event_log_of, numbers, recorded_numbers


@pytest.fixture
def address(bucket) -> str:
    """The store that `machine` opens."""
    return bucket


@pytest.fixture
def client(bucket) -> BucketClient:
    return parse(bucket)


def names(client: BucketClient, folder: str = "") -> set[str]:
    return {entry.name for entry in client.list_objects(folder)}


@pytest.fixture
def counted(bucket, s3_server, tmp_path, monkeypatch) -> Iterator[tuple[Any, list[str]]]:
    """Open the store through a proxy that records the requests; the requests."""
    requests: list[str] = []
    with counting_requests(s3_server, requests) as url:

        def opened(name: str) -> ArtifactStore:
            monkeypatch.setenv("AIRSWEEP_CACHE", str(tmp_path / name))
            with environment({"AWS_ENDPOINT_URL": url}):
                return open_store(bucket)

        yield opened, requests


# ---------------------------------------------------------------- objects


def test_of_concurrent_writers_of_an_object_exactly_one_succeeds(client):
    contents = [f"writer {n}".encode() for n in range(12)]
    created: list[bytes] = []
    run_concurrently(lambda own: created.append(own) if client.put_once("x", own) else 0, contents)
    assert created == [client.get("x")]
    assert client.put_once("x", created[0])  # repeated after a lost response


def test_a_listing_omits_folder_markers_and_folders_with_the_same_prefix(client, s3_server):
    for name in ("a/one", "a/deep/two", "ab/three"):
        client.put(name, b"x")
    s3_server.make_folder(client.bucket, f"{client.prefix}/a/")
    assert names(client, "a") == {"one", "deep/two"}
    assert [entry.name for entry in client.folder("a")[1]] == ["one"]
    assert [entry.name for entry in client.list_objects("a", after="deep/two")] == ["one"]
    assert client.folder("")[0] == ["a", "ab"]


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


def test_many_artifacts_are_listed_in_one_request_and_downloaded_once(machine, counted):
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


@pytest.fixture
def losing(bucket, s3_server) -> Iterator[tuple[BucketClient, list[str]]]:
    """A client that loses responses, and the list of responses that it loses next."""
    to_lose: list[str] = []
    with losing_responses(s3_server, to_lose) as url:
        with environment({"AWS_ENDPOINT_URL": url}):
            unreliable = parse(bucket)
        yield unreliable, to_lose


@pytest.mark.parametrize("former", [None, "dead"])
def test_a_lease_is_acquired_although_the_response_was_lost(losing, client, monkeypatch, former):
    unreliable, to_lose = losing
    quick, other = quick_lease(unreliable, monkeypatch), Lease(client, "locks/x")
    holder = Lease(unreliable, "locks/x") if former else quick
    if former:  # a process of this machine that was killed
        killed = Lease(client, "locks/x")
        assert killed.acquire()
        killed._stop.set()
        content = json.loads(client.get("locks/x"))
        client.put("locks/x", json.dumps({**content, "pid": 2**22 + 1}).encode())
    to_lose.append("locks/x")
    started = time.monotonic()
    assert holder.acquire()
    assert to_lose == []
    if former:
        assert time.monotonic() - started < holder.timeout / 2  # without waiting for an expiry
    else:
        assert not other.acquire()
    holder.release()
    assert other.acquire()
    other.release()


def test_a_machine_downloads_only_the_events_that_it_lacks(machine, client, counted):
    first = event_log_of(machine("one"))
    first.lock()
    first.append("counted", number=0)
    opened, requests = counted
    event_log_of(opened("watching"))
    for number in range(1, 4):
        first.append("counted", number=number)
    assert names(client, "sweeps/default/x/events") == {f"{n + 1:08}.json" for n in range(4)}
    requests.clear()
    assert recorded_numbers(event_log_of(opened("watching"))) == [0, 1, 2, 3]
    read = {request[-6:] for request in requests if "/events/0" in request}
    assert read == {"2.json", "3.json", "4.json"}
    first.unlock()


def test_the_remedy_for_a_damaged_event_lets_the_sweep_continue(machine, client):
    with event_log_of(machine("one")).locked() as first:
        for number in range(3):
            first.append("counted", number=number)
    event = "sweeps/default/x/events/00000002.json"
    client.put(event, b"damaged")
    second = event_log_of(machine("two"))
    with pytest.raises(
        ValueError, match=rf":2: it has no checksum; remove this .*{event} is .*later"
    ):
        recorded_numbers(second)
    second.path.unlink()
    client.delete(event)
    client.delete(event.replace("2", "3"))
    with second.locked():
        second.append("counted", number=3)
    assert recorded_numbers(event_log_of(machine("three"))) == [0, 3]


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


def test_missing_permission_and_missing_credentials_are_reported(bucket, s3_server, monkeypatch):
    def check_permissions_after(requests: str) -> None:
        url, plain = f"{s3_server.url}/moto-api/reset-auth", {"Content-Type": "text/plain"}
        urllib.request.urlopen(urllib.request.Request(url, requests.encode(), plain)).close()

    client = parse(bucket)
    check_permissions_after("0")
    try:
        for request in (lambda: client.has("x"), lambda: client.put_once("x", b"1")):
            with pytest.raises(BucketUnreachable, match=r"no permission.*AWS_PROFILE"):
                request()
    finally:
        check_permissions_after("inf")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(BucketUnreachable, match="no credentials were found; set AWS_ACCESS_KEY_ID"):
        parse(bucket + "/new").has("x")


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

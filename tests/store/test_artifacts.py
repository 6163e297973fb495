"""What exists: whole or not at all, once, and wherever the folder is."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from air_core.specs import FeaturesSpec, Ref
from orchestrator.errors import DamagedArtifact, StoreRefused, SweepBusy
from orchestrator.files import file_digest
from orchestrator.keys import artifact_key
from orchestrator.store import ArtifactStore, EventLog, open_store
from tests.helpers.sweeps import environment

SPEC = FeaturesSpec(dataset=Ref(name="digits", digest="d"), backbone=Ref(name="tiny", digest="b"))
OTHER = replace(SPEC, backbone=Ref(name="large", digest="l"))

# A builder that says when it asks and when it has begun, and goes on when it is told to.
SLOW = """
import sys
from pathlib import Path
from air_core.specs import FeaturesSpec, Ref
from orchestrator.store import (ArtifactStore)

def build(folder):
    (folder / "numbers").write_text(sys.argv[2])
    print("begun", flush=True)
    sys.stdin.readline()
    return {"by": sys.argv[2]}

spec = FeaturesSpec(dataset=Ref(name="digits", digest="d"), backbone=Ref(name="tiny", digest="b"))
print("asks", flush=True)
ArtifactStore(Path(sys.argv[1])).get_or_build(spec, build)
"""


@pytest.fixture
def store(tmp_path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "runs")


def numbers(folder: Path) -> dict[str, Any]:
    (folder / "numbers").write_text("1 2 3")
    return {"count": 3}


def refuse(folder: Path) -> dict[str, Any]:
    raise AssertionError("it is there already")


def asking(store: ArtifactStore, name: str) -> subprocess.Popen[str]:
    """Another process that asks for the same artifact."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(store.root), name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "asks\n"
    return process


def folders(store: ArtifactStore) -> list[str]:
    """Artifacts that can be seen in the store."""
    return sorted(str(p.parent.relative_to(store.artifacts)) for p in records(store))


def records(store: ArtifactStore) -> list[Path]:
    return list(store.artifacts.glob("*/*/*/record.json"))


# ---------------------------------------------------------------- whole artifacts


def test_a_record_says_what_how_and_with_which_files(store):
    artifact = store.get_or_build(SPEC, numbers)
    record = artifact.record
    assert record["key"] == str(artifact_key(SPEC))
    assert record["digest"] == artifact_key(SPEC).digest
    assert record["spec"]["dataset"] == {"name": "digits", "digest": "d"}
    assert record["info"] == {"count": 3}
    assert folders(store) == [record["key"]]
    assert record["files"] == {"numbers": file_digest(artifact.path / "numbers")}
    assert record["seconds"] >= 0
    assert "torch" in record["versions"]


def test_who_may_list_an_artifact_may_read_it(store):
    """safetensors makes files for its user alone, and images run under another than people."""

    def arrays(folder: Path) -> dict[str, Any]:
        save_file({"numbers": np.arange(3)}, folder / "numbers.safetensors")
        return numbers(folder)

    artifact = store.get_or_build(SPEC, arrays)
    allowed = artifact.path.stat().st_mode & 0o666
    assert {path.stat().st_mode & 0o777 for path in artifact.path.iterdir()} == {allowed}


def test_files_reach_the_disk_before_their_record_and_it_before_the_name(store, monkeypatch):
    """After a power cut a record stands for files that are there."""
    synced: list[str] = []
    fsync, rename, replace_file = os.fsync, os.rename, os.replace

    def noted(handle: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def renamed(old: Path, new: Path) -> None:
        synced.append(f"rename to {Path(new).name}")
        rename(old, new)

    def replaced(old: Path, new: Path) -> None:
        synced.append(f"replace {Path(new).name}")
        replace_file(old, new)

    made = ArtifactStore(store.root)
    made.get_or_build(OTHER, numbers)  # folders are there
    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "rename", renamed)
    monkeypatch.setattr(os, "replace", replaced)
    path = made.get_or_build(SPEC, numbers).path
    work = next(name for name in synced if name.startswith(f".{path.name[-12:]}"))
    record = next(name for name in synced if name.startswith(".record.json"))
    assert synced == [
        "numbers",
        work,
        record,
        "replace record.json",
        work,
        f"rename to {path.name}",
        path.parent.name,
    ]


def test_a_damaged_artifact_is_not_served_and_can_be_set_aside(store):
    file = store.get_or_build(SPEC, numbers).path / "numbers"
    was = file.stat()
    file.write_text("1 2 4")
    os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns + 1))  # a clock that is coarse
    with pytest.raises(DamagedArtifact, match="numbers does not fit the digest") as damaged:
        store.get(SPEC)
    store.set_aside(damaged.value)
    assert not store.has(SPEC)
    assert store.get_or_build(SPEC, numbers).record["info"] == {"count": 3}


@pytest.mark.parametrize(
    "content", [b"[]", b"", b"{", b"\xff\xfe", b"[" * 100_000, None], ids=lambda c: repr(c)[:8]
)
def test_a_record_that_is_none_is_damage_and_no_crash(store, content):
    record = store.get_or_build(SPEC, numbers).path / "record.json"
    record.unlink()
    record.mkdir() if content is None else record.write_bytes(content)
    if content is None:  # a folder is no record, so nothing is there
        assert not store.has(SPEC)
        return
    with pytest.raises(DamagedArtifact, match=r"record\.json"):
        store.get(SPEC)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe1", None])
def test_a_damaged_version_is_refused_with_what_to_do(tmp_path, content):
    version = tmp_path / "VERSION"
    version.mkdir() if content is None else version.write_bytes(content)
    with pytest.raises(StoreRefused, match="replace it by a file that holds 1"):
        open_store(tmp_path)
    if content is not None:
        with pytest.raises(ValueError, match="is a file; a store is a folder"):
            open_store(version)


def test_an_artifact_is_found_by_content_whatever_it_was_called(store):
    """Another name of the same weights gives another slug and the same digest."""
    built = store.get_or_build(SPEC, numbers)
    renamed = replace(SPEC, backbone=Ref(name="same weights", digest="b"))
    assert artifact_key(renamed).slug != artifact_key(SPEC).slug
    assert store.get_or_build(renamed, refuse).path == built.path


# ---------------------------------------------------------------- several processes


def test_who_waits_for_a_builder_that_is_killed_builds(store):
    first = asking(store, "first")
    assert first.stdout.readline() == "begun\n"
    second = asking(store, "second")
    first.kill()
    first.communicate(timeout=60)
    said, _ = second.communicate("go on\n", timeout=60)
    assert (second.returncode, said) == (0, "begun\n")
    assert len(folders(store)) == 1  # half an artifact counts for nothing
    assert store.get(SPEC).record["info"] == {"by": "second"}


def test_two_builders_where_locks_do_not_work_end_with_one_artifact(store):
    store.root.mkdir()
    (store.root / "locks").write_text("no folder, so nobody can make a lock in it")

    def slow(folder: Path) -> dict[str, Any]:
        ArtifactStore(store.root).get_or_build(SPEC, numbers)
        return {"by": "the slow one"}

    assert store.get_or_build(SPEC, slow).record["info"] == {"count": 3}
    assert len(list(store.artifacts.glob("*/*/*"))) == 1


# ---------------------------------------------------------------- locks


def test_who_waits_is_told_for_whom_and_others_can_ask(tmp_path, monkeypatch):
    monkeypatch.setenv("AIRSWEEP_SWEEP", "team/other")
    store, told = ArtifactStore(tmp_path), []
    store.locks.waits = lambda *what: told.append(what)
    name = "0123456789abcdef"

    def wait() -> None:
        with store.locks.turn(name):
            pass

    assert store.locks.holder(name[:12]) == ""
    with ArtifactStore(tmp_path).locks.turn(name):
        waiting = threading.Thread(target=wait)
        waiting.start()
        while not told:
            time.sleep(0.01)
        assert store.locks.holder(name[:12]).startswith("team/other (")
    waiting.join(10)
    assert not waiting.is_alive()
    assert told[0][0] == name
    assert told[0][1] == f"team/other ({socket.gethostname()}, process {os.getpid()})"
    assert 0 <= told[-1][2] < 10


@contextmanager
def becoming(user: int, group: int, umask: int = 0o022) -> Iterator[None]:
    """Another user of this machine, for a moment."""
    before = os.geteuid(), os.getegid(), os.getgroups(), os.umask(umask)
    _become(user, group, [])
    try:
        yield
    finally:
        _become(*before[:3])
        os.umask(before[3])


def _become(user: int, group: int, groups: list[int]) -> None:
    os.seteuid(0)
    os.setgroups(groups)
    os.setegid(group)
    os.seteuid(user)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
@pytest.mark.parametrize(("folder", "lock"), [(0o700, 0o600), (0o2755, 0o644), (0o2775, 0o664)])
def test_who_may_not_write_a_store_may_not_write_its_locks(folder, lock, umask, tmp_path):
    for place in (tmp_path, tmp_path / "locks", tmp_path / "sweep"):
        place.mkdir(exist_ok=True)
        place.chmod(folder)
    before = os.umask(umask)
    try:
        event_log = EventLog(tmp_path / "sweep")
        event_log.lock()
        with ArtifactStore(tmp_path).locks.turn("x"), ArtifactStore(tmp_path).locks.use():
            files = [*(tmp_path / "locks").iterdir(), tmp_path / "sweep" / ".driver.lock"]
            modes = {file.name: oct(file.stat().st_mode & 0o777) for file in files}
        event_log.unlock()
    finally:
        os.umask(before)
    assert modes == dict.fromkeys(("x", "store", ".driver.lock"), oct(lock))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, who can become somebody else")
@pytest.mark.parametrize("umask", [0o002, 0o022])
def test_two_users_of_a_group_wait_for_each_others_locks(umask):
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # that of pytest is closed to others
    for place in (folder, folder / "locks", folder / "sweep"):
        place.mkdir(exist_ok=True)
        os.chown(place, 0, 2000)
        place.chmod(0o2775)
    store, event_log = ArtifactStore(folder), EventLog(folder / "sweep")
    told: list[str] = []
    store.locks.waits = lambda name, holder, seconds: told.append(name) or held.close()
    try:
        with becoming(1001, 2000, umask), ExitStack() as held:
            event_log.lock()
            held.enter_context(ArtifactStore(folder).locks.turn("x"))
            held.enter_context(ArtifactStore(folder).locks.use())
            with becoming(1002, 2000):
                with pytest.raises(StoreRefused, match="a sweep runs"), store.locks.alone():
                    pass
                with pytest.raises(SweepBusy):
                    EventLog(folder / "sweep").lock()
                with store.locks.turn("x"):
                    assert told[0] == "x"
            event_log.unlock()
            with becoming(1002, 2000):
                event_log.lock()
                event_log.unlock()
    finally:
        shutil.rmtree(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, who can become somebody else")
def test_who_may_only_read_a_store_keeps_it_from_being_removed_while_he_reads():
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o755)
    store = ArtifactStore(folder / "runs")
    try:
        with store.locks.use():
            pass
        with becoming(65534, 65534):
            reader = store.locks.use()
        with reader, pytest.raises(StoreRefused, match="a sweep runs"), store.locks.alone():
            pass
        with store.locks.alone():
            pass
    finally:
        shutil.rmtree(folder)


def test_the_lock_of_a_dead_process_is_nobodys(tmp_path):
    code = (
        "import os, sys; from pathlib import Path\n"
        "from orchestrator.store.artifacts import ArtifactStore\n"
        "with ArtifactStore(Path(sys.argv[1])).locks.turn('0123456789ab'): os._exit(1)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment(), check=False)
    assert (tmp_path / "locks" / "0123456789ab").read_text()
    assert ArtifactStore(tmp_path).locks.holder("0123456789ab") == ""

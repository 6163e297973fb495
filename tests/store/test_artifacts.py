"""Artifact store: artifacts are published atomically and once; locks of builders and users."""

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

from air_core.specs import Ref
from orchestrator.errors import DamagedArtifact, StoreRefused, SweepBusy
from orchestrator.files import file_digest
from orchestrator.keys import artifact_key
from orchestrator.stages import FeaturesSpec
from orchestrator.store import ArtifactStore, EventLog, open_store
from tests.helpers.sweeps import TIMEOUT, python

SPEC = FeaturesSpec(dataset=Ref(name="digits", digest="d"), backbone=Ref(name="tiny", digest="b"))
OTHER = replace(SPEC, backbone=Ref(name="large", digest="l"))

# A builder that reports its request and its start, and continues after a line on its input.
SLOW = """
import sys
from pathlib import Path
from orchestrator.stages import FeaturesSpec
from air_core.specs import Ref
from orchestrator.store import ArtifactStore

def build(folder):
    (folder / "numbers").write_text(sys.argv[2])
    print("started", flush=True)
    sys.stdin.readline()
    return {"by": sys.argv[2]}

spec = FeaturesSpec(dataset=Ref(name="digits", digest="d"), backbone=Ref(name="tiny", digest="b"))
print("requested", flush=True)
ArtifactStore(Path(sys.argv[1])).get_or_build(spec, build)
"""


@pytest.fixture
def store(tmp_path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "runs")


def numbers(folder: Path) -> dict[str, Any]:
    (folder / "numbers").write_text("1 2 3")
    return {"count": 3}


def refuse(folder: Path) -> dict[str, Any]:
    raise AssertionError("the artifact exists already")


def start_builder(store: ArtifactStore, name: str) -> subprocess.Popen[str]:
    """Start another process that requests the same artifact."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(store.root), name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout.readline() == "requested\n"
    return process


def folders(store: ArtifactStore) -> list[str]:
    """Complete artifacts of the store."""
    return sorted(str(p.parent.relative_to(store.artifacts)) for p in records(store))


def records(store: ArtifactStore) -> list[Path]:
    return list(store.artifacts.glob("*/*/*/record.json"))


# ---------------------------------------------------------------- artifacts


def test_a_record_contains_key_spec_info_and_file_digests(store):
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


def test_files_have_the_permissions_of_the_folder(store):
    """safetensors makes files private to the user, but several users may share a store."""

    def arrays(folder: Path) -> dict[str, Any]:
        save_file({"numbers": np.arange(3)}, folder / "numbers.safetensors")
        return numbers(folder)

    artifact = store.get_or_build(SPEC, arrays)
    allowed = artifact.path.stat().st_mode & 0o666
    assert {path.stat().st_mode & 0o777 for path in artifact.path.iterdir()} == {allowed}


def test_all_files_are_synced_before_the_folder_is_renamed(store, monkeypatch):
    """After a power cut, all files of an artifact with a record exist."""
    calls: list[str] = []

    def note(name: str) -> None:
        of = getattr(os, name)

        def noted(at: int | Path, *to: Path) -> None:
            path = Path(os.readlink(f"/proc/self/fd/{at}") if name == "fsync" else to[0])
            calls.append(f"{name} {path.name.partition('-')[0]}")
            of(at, *to)

        monkeypatch.setattr(os, name, noted)

    store.get_or_build(OTHER, numbers)  # creates the folders
    for name in ("fsync", "rename", "replace"):
        note(name)
    path = store.get_or_build(SPEC, numbers).path
    work = f"fsync .{path.name[-12:]}"
    assert calls == ["fsync numbers", "fsync record.json", work, "rename digits", "fsync v1"]


def test_a_damaged_artifact_is_refused_and_can_be_set_aside(store):
    file = store.get_or_build(SPEC, numbers).path / "numbers"
    was = file.stat()
    file.write_text("1 2 4")
    os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns + 1))  # even if the clock is coarse
    with pytest.raises(DamagedArtifact, match="numbers does not match its digest") as damaged:
        store.get(SPEC)
    store.set_aside(damaged.value)
    assert not store.has(SPEC)
    assert store.get_or_build(SPEC, numbers).record["info"] == {"count": 3}


@pytest.mark.parametrize(
    "content", [b"[]", b"", b"{", b"\xff\xfe", b"[" * 100_000, None], ids=lambda c: repr(c)[:8]
)
def test_an_invalid_record_is_reported_as_damage(store, content):
    record = store.get_or_build(SPEC, numbers).path / "record.json"
    record.unlink()
    record.mkdir() if content is None else record.write_bytes(content)
    if content is None:  # a folder is no record, so the artifact does not exist
        assert not store.has(SPEC)
        return
    with pytest.raises(DamagedArtifact, match=r"record\.json"):
        store.get(SPEC)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe1", b"[1]", None])
def test_a_damaged_format_file_is_refused_with_a_remedy(tmp_path, content):
    about = tmp_path / "store.json"
    about.mkdir() if content is None else about.write_bytes(content)
    with pytest.raises(StoreRefused, match=r'damaged store.json.* write into it: {"format": 1}'):
        open_store(tmp_path)
    if content is not None:
        with pytest.raises(ValueError, match="is a file; a store is a folder"):
            open_store(about)


def test_an_artifact_is_found_by_digest_under_another_slug(store):
    """Another name of the same weights changes the slug, but not the digest."""
    built = store.get_or_build(SPEC, numbers)
    renamed = replace(SPEC, backbone=Ref(name="same weights", digest="b"))
    assert artifact_key(renamed).slug != artifact_key(SPEC).slug
    assert store.get_or_build(renamed, refuse).path == built.path


# ---------------------------------------------------------------- several processes


def test_a_waiting_process_builds_after_the_builder_was_killed(store):
    first = start_builder(store, "first")
    assert first.stdout.readline() == "started\n"
    second = start_builder(store, "second")
    first.kill()
    first.communicate(timeout=TIMEOUT)
    output, _ = second.communicate("continue\n", timeout=TIMEOUT)
    assert (second.returncode, output) == (0, "started\n")
    assert len(folders(store)) == 1  # the partial artifact does not count
    assert store.get(SPEC).record["info"] == {"by": "second"}


def test_two_builders_without_working_locks_leave_one_artifact(store):
    store.root.mkdir()
    (store.root / "locks").write_text("a file, so that no lock can be created in it")

    def slow(folder: Path) -> dict[str, Any]:
        ArtifactStore(store.root).get_or_build(SPEC, numbers)
        return {"by": "the slow one"}

    assert store.get_or_build(SPEC, slow).record["info"] == {"count": 3}
    assert len(list(store.artifacts.glob("*/*/*"))) == 1


# ---------------------------------------------------------------- locks


def test_on_wait_and_holder_name_the_process_that_holds_a_lock(tmp_path, monkeypatch):
    monkeypatch.setenv("AIRSWEEP_SWEEP", "team/other")
    store, calls = ArtifactStore(tmp_path), []
    store.locks.on_wait = lambda *arguments: calls.append(arguments)
    name = "0123456789abcdef"

    def wait() -> None:
        with store.locks.exclusive(name):
            pass

    assert store.locks.holder(name[:12]) == ""
    with ArtifactStore(tmp_path).locks.exclusive(name):
        waiting = threading.Thread(target=wait)
        waiting.start()
        while not calls:
            time.sleep(0.01)
        assert store.locks.holder(name[:12]).startswith("team/other (")
    waiting.join(TIMEOUT)
    assert not waiting.is_alive()
    assert calls[0][0] == name
    assert calls[0][1] == f"team/other ({socket.gethostname()}, process {os.getpid()})"
    assert 0 <= calls[-1][2] < TIMEOUT


@contextmanager
def as_user(user: int, group: int, umask: int = 0o022) -> Iterator[None]:
    """Switch to another user of this machine."""
    before = os.geteuid(), os.getegid(), os.getgroups(), os.umask(umask)
    _switch_user(user, group, [])
    try:
        yield
    finally:
        _switch_user(*before[:3])
        os.umask(before[3])


def _switch_user(user: int, group: int, groups: list[int]) -> None:
    os.seteuid(0)
    os.setgroups(groups)
    os.setegid(group)
    os.seteuid(user)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
@pytest.mark.parametrize(("folder", "lock"), [(0o700, 0o600), (0o2755, 0o644), (0o2775, 0o664)])
def test_lock_files_have_the_write_permissions_of_their_folder(folder, lock, umask, tmp_path):
    for path in (tmp_path, tmp_path / "locks", tmp_path / "sweep"):
        path.mkdir(exist_ok=True)
        path.chmod(folder)
    before = os.umask(umask)
    try:
        event_log = EventLog(tmp_path / "sweep")
        event_log.lock()
        with (
            ArtifactStore(tmp_path).locks.exclusive("x"),
            ArtifactStore(tmp_path).locks.shared_store(),
        ):
            files = [*(tmp_path / "locks").iterdir(), tmp_path / "sweep" / ".driver.lock"]
            modes = {file.name: oct(file.stat().st_mode & 0o777) for file in files}
        event_log.unlock()
    finally:
        os.umask(before)
    assert modes == dict.fromkeys(("x", "store", ".driver.lock"), oct(lock))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to switch users")
@pytest.mark.parametrize("umask", [0o002, 0o022])
def test_two_users_of_a_group_wait_for_the_locks_of_each_other(umask):
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # pytest's folder is private
    for path in (folder, folder / "locks", folder / "sweep"):
        path.mkdir(exist_ok=True)
        os.chown(path, 0, 2000)
        path.chmod(0o2775)
    store, event_log = ArtifactStore(folder), EventLog(folder / "sweep")
    waited: list[str] = []
    store.locks.on_wait = lambda name, holder, seconds: waited.append(name) or held.close()
    try:
        with as_user(1001, 2000, umask), ExitStack() as held:
            event_log.lock()
            held.enter_context(ArtifactStore(folder).locks.exclusive("x"))
            held.enter_context(ArtifactStore(folder).locks.shared_store())
            with as_user(1002, 2000):
                with (
                    pytest.raises(StoreRefused, match="a sweep runs"),
                    store.locks.exclusive_store(),
                ):
                    pass
                with pytest.raises(SweepBusy):
                    EventLog(folder / "sweep").lock()
                with store.locks.exclusive("x"):
                    assert waited[0] == "x"
            event_log.unlock()
            with as_user(1002, 2000):
                event_log.lock()
                event_log.unlock()
    finally:
        shutil.rmtree(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to switch users")
def test_a_reader_without_write_permission_prevents_removal():
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o755)
    store = ArtifactStore(folder / "runs")
    try:
        with store.locks.shared_store():
            pass
        with as_user(65534, 65534):
            reader = store.locks.shared_store()
        with (
            reader,
            pytest.raises(StoreRefused, match="a sweep runs"),
            store.locks.exclusive_store(),
        ):
            pass
        with store.locks.exclusive_store():
            pass
    finally:
        shutil.rmtree(folder)


def test_the_lock_of_a_dead_process_has_no_holder(tmp_path):
    code = (
        "import os, sys; from pathlib import Path\n"
        "from orchestrator.store.artifacts import ArtifactStore\n"
        "with ArtifactStore(Path(sys.argv[1])).locks.exclusive('0123456789ab'): os._exit(1)"
    )
    python("-c", code, tmp_path, check=False)
    assert (tmp_path / "locks" / "0123456789ab").read_text()
    assert ArtifactStore(tmp_path).locks.holder("0123456789ab") == ""

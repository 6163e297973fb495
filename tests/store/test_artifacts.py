"""Artifact store: artifacts are published atomically and once; locks of builders and users."""

from __future__ import annotations

import os
import shutil
import socket
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from air_core.settings import Ref
from orchestrator.errors import DamagedArtifact
from orchestrator.files import file_digest
from orchestrator.keys import artifact_key
from orchestrator.store import ArtifactStore, EventLog
from tests.helpers.sweeps import python
from tests.store.test_storage import SPEC, failing, numbers, refuse

OTHER = replace(SPEC, backbone=Ref(name="large", digest="l"))

# A builder that is killed while it builds.
KILLED = """
import os, sys
from pathlib import Path
from orchestrator.store import ArtifactStore
from tests.store.test_storage import SPEC

ArtifactStore(Path(sys.argv[1])).get_or_build(SPEC, lambda folder: os._exit(9))
"""


@pytest.fixture
def store(tmp_path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "runs")


# ---------------------------------------------------------------- artifacts


def test_a_record_contains_key_spec_info_and_digests_of_files_that_all_users_may_read(store):
    """safetensors makes files private to the user, but several users may share a store."""

    def arrays(folder: Path) -> dict[str, Any]:
        save_file({"numbers": np.arange(3)}, folder / "numbers.safetensors")
        return {"count": 3}

    artifact = store.get_or_build(SPEC, arrays)
    record, (file,) = artifact.record, artifact.path.glob("*.safetensors")
    assert record["key"] == str(artifact_key(SPEC))
    assert record["digest"] == artifact_key(SPEC).digest
    assert record["spec"]["dataset"]["digest"] == "d"
    assert record["info"] == {"count": 3}
    assert record["files"] == {file.name: file_digest(file)}
    assert record["seconds"] >= 0
    assert "torch" in record["versions"]
    allowed = artifact.path.stat().st_mode & 0o666
    assert {path.stat().st_mode & 0o777 for path in artifact.path.iterdir()} == {allowed}


def test_all_files_are_synced_before_the_folder_is_renamed(store, monkeypatch):
    """After a power cut, all files of an artifact with a record exist."""
    store.get_or_build(OTHER, numbers("1"))  # creates the folders
    with failing(-1, False, False, monkeypatch) as calls:
        store.get_or_build(SPEC, numbers("1"))
    # Both files and their folder before, the folder of the stage after.
    assert calls == ["fsync", "fsync", "fsync", "rename", "fsync"]


def test_a_file_is_verified_again_when_it_changes(store):
    file = store.get_or_build(SPEC, numbers("1")).path / "numbers"
    was = file.stat()
    file.write_text("1 2 4")
    os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns + 1))  # even if the clock is coarse
    with pytest.raises(DamagedArtifact, match="numbers does not match its digest"):
        store.get(SPEC)


def test_a_folder_with_the_files_of_another_artifact_is_damaged(store):
    path, other = (store.get_or_build(spec, numbers("1")).path for spec in (SPEC, OTHER))
    shutil.rmtree(path)
    shutil.copytree(other, path)
    with pytest.raises(DamagedArtifact, match="that of another artifact"):
        store.get(SPEC)


def test_an_artifact_is_found_by_digest_under_another_slug(store):
    """Another name of the same weights changes the slug, but not the digest."""
    built = store.get_or_build(SPEC, numbers("1"))
    renamed = replace(SPEC, backbone=Ref(name="same weights", digest="b"))
    assert artifact_key(renamed).slug != artifact_key(SPEC).slug
    assert store.get_or_build(renamed, refuse).path == built.path


# ---------------------------------------------------------------- several processes


def test_the_lock_and_the_part_of_a_killed_builder_do_not_count(store):
    assert python("-c", KILLED, store.root, check=False).returncode == 9
    digest = artifact_key(SPEC).digest
    assert (store.root / "locks" / digest).read_text()
    assert store.locks.holder(digest[:12]) == ""
    assert not store.has(SPEC)
    assert store.get_or_build(SPEC, numbers("1")).record["info"] == {"text": "1"}
    assert len(list(store.artifacts.glob("*/*/[!.]*"))) == 1


def test_two_builders_without_working_locks_leave_one_artifact(store):
    store.root.mkdir()
    (store.root / "locks").write_text("a file, so that no lock can be created in it")

    def slow(folder: Path) -> dict[str, Any]:
        ArtifactStore(store.root).get_or_build(SPEC, numbers("1"))
        return {"by": "the slow one"}

    assert store.get_or_build(SPEC, slow).record["info"] == {"text": "1"}
    assert len(list(store.artifacts.glob("*/*/*"))) == 1


# ---------------------------------------------------------------- locks


def test_the_holder_of_a_lock_is_named_to_those_who_wait(tmp_path, monkeypatch):
    store, calls = ArtifactStore(tmp_path), []
    store.locks.on_wait = lambda *arguments: calls.append(arguments) or held.close()
    name = "0123456789abcdef"
    assert store.locks.holder(name[:12]) == ""
    with monkeypatch.context() as patch, ExitStack() as held:
        patch.setenv("AIRSWEEP_SWEEP", "team/other")
        held.enter_context(ArtifactStore(tmp_path).locks.exclusive(name))
        holder = f"team/other ({socket.gethostname()}, process {os.getpid()})"
        assert store.locks.holder(name[:12]) == holder
        with store.locks.exclusive(name):
            assert calls[0][:2] == (name, holder)


@pytest.mark.parametrize(("folder", "lock"), [(0o700, 0o600), (0o2755, 0o644), (0o2775, 0o664)])
def test_lock_files_have_the_write_permissions_of_their_folder(folder, lock, tmp_path):
    for path in (tmp_path, tmp_path / "locks", tmp_path / "sweep"):
        path.mkdir(exist_ok=True)
        path.chmod(folder)
    locks = ArtifactStore(tmp_path).locks
    with locks.exclusive("x"), locks.shared_store(), EventLog(tmp_path / "sweep").locked():
        files = [*(tmp_path / "locks").iterdir(), tmp_path / "sweep" / ".driver.lock"]
        modes = {file.name: oct(file.stat().st_mode & 0o777) for file in files}
    assert modes == dict.fromkeys(("x", "store", ".driver.lock"), oct(lock))

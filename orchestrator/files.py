"""Atomic file writes, digests of files, and file locks."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import pwd
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

Stamp = tuple[int, int, int]  # size, modification time in ns, inode

ROOT = Path(__file__).resolve().parents[1]  # the folder of air_core and orchestrator
SHIPPED = ROOT / "orchestrator" / "shipped"  # sweeps/ of an installed package


def file_stamp(path: Path) -> Stamp:
    """Size, modification time and inode, which change when a file is rewritten."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk.

    Some file systems cannot sync folders; they keep entries in order themselves.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as problem:
        if problem.errno != errno.EINVAL:
            raise
    finally:
        os.close(handle)


def make_folders(path: Path) -> None:
    """Create a folder and its missing parents, and flush their entries to the disk."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync(folder.parent)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file atomically and durably: after a power loss it is complete or absent."""
    data = content.encode() if isinstance(content, str) else content
    with temporary_for(path) as temporary, open(temporary, "wb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())
    sync(path.parent)


def file_digest(path: Path) -> str:
    """The blake2b digest of a file's content."""
    found = hashlib.blake2b(digest_size=20)
    # `hashlib.file_digest` clears 256 KB of memory first: most of the time for a small file.
    with open(path, "rb", buffering=0) as handle:
        while block := handle.read(1 << 16):
            found.update(block)
    return found.hexdigest()


def write_atomic_unsynced(path: Path, data: bytes) -> None:
    """Write a file atomically, without a sync: the bucket has a durable copy."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_for(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def temporary_for(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder; afterwards its file replaces `path`.

    If the block fails or is interrupted, the file is removed: on a full disk, an incomplete file
    would occupy space.
    """
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def permission_message(path: Path) -> str:
    """The message for a PermissionError: owner, group, mode, and how to get access."""
    existing = next(entry for entry in (path, *path.parents) if os.path.exists(entry))
    if os.statvfs(existing).f_flag & os.ST_RDONLY:
        return f"the file system of {path} is read-only; choose another folder"
    user = _account_name(lambda: pwd.getpwuid(os.geteuid()).pw_name)
    owner, group = _account_name(existing.owner), _account_name(existing.group)
    verb = "write" if os.access(existing, os.R_OK, effective_ids=True) else "read"
    relation = ", which" if existing == path else f": {existing}"
    return (
        f"{user} may not {verb} {path}{relation} belongs to {owner}, group {group}, "
        f"{stat.filemode(existing.stat().st_mode)}; change the permissions (docs/storage.md "
        "explains shared stores) or choose another folder"
    )


def _account_name(name: Callable[[], str]) -> str:
    try:
        return name()
    except KeyError:  # containers often have no entry for their user
        return "an account without a name"


def is_flocked(file: Path) -> bool:
    """Whether a process holds this lock; needs no write permission."""
    try:
        handle = os.open(file, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def lock_mode(folder: Path) -> int:
    """The mode of a lock file: the users who can write to its folder can write to it."""
    return 0o666 & stat.S_IMODE(folder.stat().st_mode)


@contextmanager
def hold_flock(file: Path, how: int) -> Iterator[None]:
    # The filelock package is not used: without flock it falls back to lock files that outlive their
    # process.
    file.parent.mkdir(parents=True, exist_ok=True)
    mode = lock_mode(file.parent)
    handle = os.open(file, os.O_RDWR | os.O_CREAT, mode)
    try:
        with suppress(OSError):  # fails if the file belongs to another user
            os.fchmod(handle, mode)  # the umask must not exclude other users of the folder
        fcntl.flock(handle, how)
        yield
    finally:
        os.close(handle)

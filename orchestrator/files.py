"""Files that are there whole or not at all; digests; locks of files."""

from __future__ import annotations

import errno
import fcntl
import grp
import hashlib
import os
import pwd
import stat
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

Stamp = tuple[int, int, int]  # size, modification time in ns, inode

ROOT = Path(__file__).resolve().parents[1]  # holds air_core and orchestrator
SHIPPED = ROOT / "orchestrator" / "shipped"  # sweeps/ and cluster/ of an installed package


def file_stamp(path: Path) -> Stamp:
    """What changes when the content of a file does."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk. Some file systems cannot sync folders;
    they keep names in order themselves."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as problem:
        if problem.errno != errno.EINVAL:
            raise
    finally:
        os.close(handle)


def make_folders(path: Path) -> None:
    """Create a folder and its parents where they are missing, and bring their names to the disk."""
    missing = [one for one in (path, *path.parents) if not one.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for one in missing:
        sync(one.parent)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that it is there whole or not at all, also after a power cut."""
    data = content.encode() if isinstance(content, str) else content
    with _beside(path) as temporary, open(temporary, "wb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())
    sync(path.parent)


def write_new(path: Path, content: str) -> None:
    """The same, but never in the place of a file that is there.

    Raises:
        FileExistsError: one is.
    """
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        with open(temporary, "x", encoding="utf-8") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        _linked(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _linked(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # some file systems have no second name for a file
        if path.exists():
            raise FileExistsError(path) from None
        os.rename(temporary, path)


def file_digest(path: Path) -> str:
    """blake2b of a file's content."""
    with open(path, "rb") as handle:
        return content_digest(handle)


def write_beside(path: Path, data: bytes) -> None:
    """Written whole or not at all; not synced, since the bucket has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _beside(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A name to write under; what is written there takes the path's place."""
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError:  # on a full disk half a file takes the room that others need
        temporary.unlink(missing_ok=True)
        raise


def content_digest(handle: BinaryIO) -> str:
    """blake2b of what can be read from here on."""
    return hashlib.file_digest(
        handle,  # type: ignore[arg-type]
        lambda: hashlib.blake2b(digest_size=20),
    ).hexdigest()


def barred(place: Path) -> str:
    """A sentence for who may not read or write there: whose it is, and what to do."""
    there = next(one for one in (place, *place.parents) if os.path.exists(one))
    status = there.stat()
    me = _named(pwd.getpwuid, os.geteuid())
    owner, group = _named(pwd.getpwuid, status.st_uid), _named(grp.getgrgid, status.st_gid)
    verb = "write" if os.access(there, os.R_OK, effective_ids=True) else "read"
    which = ", which" if there == place else f": {there}"
    return (
        f"{me} may not {verb} {place}{which} belongs to {owner}, group {group}, "
        f"{stat.filemode(status.st_mode)}; ask for the right (docs/storage.md says how several "
        "share a store), or take another place"
    )


def _named(look: Callable[[int], Sequence[Any]], number: int) -> str:
    try:
        return str(look(number)[0])
    except KeyError:  # as in containers
        return str(number)


def is_flocked(file: Path) -> bool:
    """Does a process hold this lock? Asked without the right to write."""
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
    """Permissions of a lock file: those users may write it who may write its folder."""
    return 0o666 & stat.S_IMODE(folder.stat().st_mode)


@contextmanager
def flocked(file: Path, how: int) -> Iterator[None]:
    # flock itself: where it is missing, filelock turns to files that outlive their process.
    file.parent.mkdir(parents=True, exist_ok=True)
    mode = lock_mode(file.parent)
    try:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, mode)
    except PermissionError:
        if not file.exists():
            raise
        handle = os.open(file, os.O_RDONLY)  # another user's: local file systems lock that too
    try:
        with suppress(OSError):  # it is not ours
            os.fchmod(handle, mode)  # whatever the umask: who shares the folder waits for it
        fcntl.flock(handle, how)
        yield
    finally:
        os.close(handle)

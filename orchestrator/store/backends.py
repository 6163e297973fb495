"""Where a store keeps its files: in a folder, or in a bucket through a folder. Knows no spec.

Everything is named by its path below `root`, a folder of this machine in which files are opened.
`FolderBackend` is that folder. `BucketBackend` extends it: what is made is put into the bucket
first and into the folder then, and what is read is brought into the folder once. So the folder
never says that something exists, the bucket does, and the folder can be thrown away at any time.

In the bucket an artifact lies below `artifacts/<stage>/v<recipe>/<digest12>/`, its files under
names that begin with their digests: two builders of one key never write over each other's. Its
`record.json` is put last and once, and names the files that count; without it the rest is nothing.
Shards are put once. A bucket has no rename, and needs none.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

from air_core.seal import intact
from orchestrator.errors import StoreRefused
from orchestrator.files import Stamp, file_digest, file_stamp, sync, write_beside, write_whole
from orchestrator.store._leases import Lease
from orchestrator.store.buckets import Entry, Remote, folder_of, is_bucket, parse, side_by_side
from orchestrator.store.verification import parse_record, read_record

CACHE = "AIRSWEEP_CACHE"
RECORD = "record.json"
VERSION = "1"
LOCKS = "locks"  # folder
FRESH = 5.0  # seconds for which a listing may say that something is not there
Waits = Callable[[str, str, float], None]  # called while waiting: name, holder, seconds so far


class FolderBackend:
    """A store in a folder that every machine mounts, and what a store asks of every backend."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def name(self) -> str:
        """As people would give it with --store."""
        return str(self.root)

    def label(self, path: Path) -> str:
        """A file or folder of the store, for people."""
        return str(path)

    def settle(self) -> None:
        """Before the first thing is written: record which version of a store this is.

        Raises:
            StoreRefused: a server that does not keep what was put once.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        write_whole(self.root / "VERSION", VERSION + "\n")

    def refuse_removal(self) -> None:
        """
        Raises:
            StoreRefused: nothing can be removed here, since who uses it cannot be told.
        """

    def sweeps(self) -> list[tuple[str, str]]:
        """Project and name of each recorded sweep."""
        found = (self.root / "sweeps").glob("*/*/events.jsonl")
        return sorted((file.parent.parent.name, file.parent.name) for file in found)

    @contextmanager
    def turn(self, name: str, waits: Waits) -> Iterator[None]:
        """Waits until no other machine makes `name`. Those that mount the folder see its locks."""
        yield

    def look_again(self) -> None:
        """Other processes have made something; what did not exist may exist now."""

    # ---------------------------------------------------------------- artifacts

    def survey(self, folders: Iterable[Path]) -> None:
        """`has` will be asked for many: learn of them in few requests."""

    def has(self, folder: Path) -> bool:
        """Is an artifact there, whole?"""
        return (folder / RECORD).is_file()

    def record(self, folder: Path) -> dict[str, Any] | None:
        """The record of an artifact, without its other files; None: it does not exist.

        Raises:
            DamagedArtifact: it is not what was written.
        """
        with suppress(FileNotFoundError):
            return read_record(folder / RECORD)
        return None

    def bring(self, folders: Iterable[Path]) -> bool:
        """Bring artifacts to this machine, side by side; did any have to be brought?

        Raises:
            ValueError: a file is not what the record says.
        """
        return False

    def bring_named(self, stage: Path, digest: str) -> None:
        """The same of the artifacts of a stage whose digests begin with these 12 digits."""

    def publish(self, folder: Path, work: Path, record: bytes) -> None:
        """Make what was built in a folder the artifact, unless another builder was faster."""
        write_whole(work / RECORD, record)
        try:
            os.rename(work, folder)
        except OSError:
            # Somebody else was faster, and the same key is the same thing; or a folder that lost
            # its record is in the way, and what has no record is nothing.
            if not (folder / RECORD).is_file():
                shutil.rmtree(folder)
                os.rename(work, folder)
        sync(folder.parent)

    def size(self, folder: Path) -> int:
        """Of what exists of an artifact or row."""
        return sum(file.stat().st_size for file in folder.glob("*"))

    # ---------------------------------------------------------------- files

    def listed(self, pattern: str) -> list[Entry]:
        """Files by their paths below the root, and their folders as `folder/`, as they are now.

        Args:
            pattern: of their folders.
        """
        found: list[Entry] = []
        for folder in sorted(self.root.glob(pattern)):
            name = folder.relative_to(self.root).as_posix()
            if folder.is_dir():
                with suppress(FileNotFoundError), os.scandir(folder) as entries:
                    found.append(Entry(f"{name}/", 0, None, folder.stat().st_mtime))
                    for entry in entries:  # some may be renamed or removed at this moment
                        stat = entry.stat(follow_symlinks=False)
                        place = f"{name}/{entry.name}"
                        found.append(Entry(place, stat.st_size, None, stat.st_mtime))
        return found

    def beside(self, pattern: str) -> Iterable[Path]:
        """Files beside the artifacts; none where those of this machine are copies."""
        return sorted(self.root.glob(pattern))

    def open(self, file: Path) -> BinaryIO:
        """A file as all machines see it.

        Raises:
            OSError: it does not exist, or cannot be read.
        """
        return open(file, "rb")

    def names(self, folder: Path) -> Collection[str]:
        """Names of the files of a row."""
        return os.listdir(folder) if folder.is_dir() else ()

    def exists(self, file: Path) -> bool:
        """Is a file there, as of now?"""
        return file.exists()

    def pull(self, files: Iterable[Path], *, anew: bool = True) -> None:
        """Bring files to this machine, those that exist.

        Args:
            anew: also those that have a copy here.
        """

    def pull_folder(self, folder: Path) -> None:
        """Bring the files of a folder that have changed, not those of folders in it."""

    def push(self, file: Path) -> None:
        """Make a file that was written here the one that all machines see."""

    def write(self, file: Path, data: bytes) -> None:
        """A small file: there whole or not at all, for every machine."""
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, data)

    def put_once(self, file: Path, data: bytes) -> bytes:
        """What all machines see as this file: these bytes, or those of whoever was faster. The
        caller writes it here."""
        return data

    def mark(self, file: Path) -> bool:
        """Create a file of no content. False: it exists."""
        try:
            file.touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def remove(self, file: Path) -> None:
        file.unlink(missing_ok=True)

    def set_aside(self, path: Path, hidden: Path) -> bool:
        """Rename what is damaged, so that it counts as missing. False: it is not damaged here."""
        with suppress(FileNotFoundError):  # another driver was faster
            os.rename(path, hidden)
        return True


class BucketBackend(FolderBackend):
    """A store in a bucket. Its folder is a copy of what this machine has made or read."""

    def __init__(self, remote: Remote) -> None:
        super().__init__(copy_folder(remote))
        self.remote = remote
        self._whole: set[str] = set()  # artifacts that exist; they never go
        # When a folder was listed, and bytes by the names below it.
        self._listings: dict[str, tuple[float, dict[str, int]]] = {}
        self._sent: dict[Path, Stamp] = {}  # files as the bucket has them

    def __reduce__(self) -> Any:
        """In another process, perhaps on another machine: with the folder of that one."""
        return open_backend, (self.remote.uri,)

    @property
    def name(self) -> str:
        return self.remote.uri

    def label(self, path: Path) -> str:
        return f"{self.remote}/{self.object(path)}"

    def object(self, path: Path) -> str:
        """The name in the bucket: artifacts lie below their digests, without the words before."""
        parts = list(path.relative_to(self.root).parts)
        if parts[0] == "artifacts" and len(parts) > 3:
            parts[3] = parts[3].rpartition("-")[2]
        return "/".join(parts)

    def settle(self) -> None:
        remote = self.remote
        remote.put_once("VERSION", f"{VERSION} {uuid.uuid4().hex}\n".encode())
        if remote.put_once("VERSION", f"{VERSION} another\n".encode()):
            remote.delete("VERSION")
            raise StoreRefused(
                f"the server of {remote} writes over objects that were to be put once "
                "(If-None-Match), so two machines could spoil each other's work; allowed: one that "
                "refuses, such as Amazon S3 or a recent MinIO; or a folder with --store"
            )
        self.pull([self.root / "VERSION"])

    def refuse_removal(self) -> None:
        raise StoreRefused(
            f"{self.name}: nothing is removed from a bucket, since who uses it cannot be told; "
            f"`airsweep cache ls` says what no sweep needs: of an artifact remove {RECORD} first, "
            "then the rest, with the tools of your storage, while no sweep runs"
        )

    def sweeps(self) -> list[tuple[str, str]]:
        projects, _ = self.remote.folder("sweeps")
        return [(p, name) for p in projects for name in self.remote.folder(f"sweeps/{p}")[0]]

    @contextmanager
    def turn(self, name: str, waits: Waits) -> Iterator[None]:
        lease = Lease(self.remote, f"{LOCKS}/{name}")
        lease.acquire(lambda seconds: waits(name, "another machine", seconds))
        try:
            self.look_again()
            yield
        finally:
            lease.release()

    def look_again(self) -> None:
        self._listings.clear()

    # ---------------------------------------------------------------- artifacts

    def survey(self, folders: Iterable[Path]) -> None:
        for parent in dict.fromkeys(folder.parent for folder in folders):
            self._listing(parent)

    def has(self, folder: Path) -> bool:
        name = self.object(folder)
        parent, _, digest = name.rpartition("/")
        if name not in self._whole:
            when, listed = self._listings.get(parent, (None, {}))
            record = f"{digest}/{RECORD}"
            if record in listed or (not _is_fresh(when) and self.remote.has(f"{parent}/{record}")):
                self._whole.add(name)
        return name in self._whole

    def record(self, folder: Path) -> dict[str, Any] | None:
        if (folder / RECORD).is_file():
            return super().record(folder)
        data = self._record(folder)
        file = folder / RECORD
        return None if data is None else parse_record(data, file, self.label(file))

    def _record(self, folder: Path) -> bytes | None:
        """The record of an artifact whose files are not here."""
        kept, name = self._kept(folder), self.object(folder)
        with suppress(FileNotFoundError):
            here = kept.read_bytes()
            if intact(here) is not False:  # a damaged copy is fetched again
                return here
        data = self.remote.get(f"{name}/{RECORD}")
        if data is not None:
            self._whole.add(name)
            write_beside(kept, data)
        return data

    def _kept(self, folder: Path) -> Path:
        return self.root / "records" / f"{self.object(folder).removeprefix('artifacts/')}.json"

    def bring(self, folders: Iterable[Path]) -> bool:
        missing = [folder for folder in folders if not (folder / RECORD).is_file()]
        side_by_side(self._bring, missing)
        return bool(missing)

    def bring_named(self, stage: Path, digest: str) -> None:
        for name in self.remote.folder(self.object(stage))[0]:
            if name.startswith(digest) and (record := self.record(stage / name)) is not None:
                words = str(record["key"]).rpartition("/")[2].removesuffix(f"-{name}")
                self.bring([stage / f"{words}-{name}"])

    def _bring(self, folder: Path) -> None:
        known = self._kept(folder).exists()
        record = self._record(folder)
        if record is None:
            return
        try:
            self._bring_files(folder, record)
        except ValueError:
            if not known:
                raise
            # It may have been removed by hand since we read its record, and made again.
            self._kept(folder).unlink(missing_ok=True)
            self._whole.discard(self.object(folder))
            self._bring(folder)

    def _bring_files(self, folder: Path, record: bytes) -> None:
        names = self._stored_names(record)
        work = folder.parent / f".{folder.name}-{uuid.uuid4().hex[:8]}"
        work.mkdir(parents=True)

        def fetch(name: str) -> None:
            found = self._download(f"{self.object(folder)}/{names[name]}", work / name)
            if not found or file_digest(work / name) != digests[name]:
                raise ValueError(
                    f"{self.label(folder / names[name])} "
                    f"{'is not what was written' if found else 'is gone'}; remove {RECORD} beside "
                    "it and run again"
                )

        digests = json.loads(record)["files"]
        try:
            side_by_side(fetch, names)
            (work / RECORD).write_bytes(record)
            if not (folder / RECORD).is_file():  # nobody has brought it meanwhile
                shutil.rmtree(folder, ignore_errors=True)
                os.rename(work, folder)
        except OSError:
            if not (folder / RECORD).is_file():
                raise
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def publish(self, folder: Path, work: Path, record: bytes) -> None:
        place = self.object(folder)
        names = self._stored_names(record)
        side_by_side(lambda name: self.remote.put(f"{place}/{names[name]}", work / name), names)
        won = self.remote.put_once(f"{place}/{RECORD}", record)
        self._kept(folder).unlink(missing_ok=True)
        self._whole.add(place)
        if won:
            shutil.rmtree(folder, ignore_errors=True)  # of a store that was emptied by hand
            super().publish(folder, work, record)
        else:
            theirs = self._stored_names(self.remote.get(f"{place}/{RECORD}") or b"{}")
            for name in {*names.values()} - {*theirs.values()}:
                self.remote.delete(f"{place}/{name}")

    def _stored_names(self, record: bytes) -> dict[str, str]:
        """Names in the bucket by names in the folder."""
        files: Mapping[str, str] = json.loads(record).get("files", {})
        for name in files:
            # It becomes a file of this machine, and whoever writes to the bucket may have put it.
            if Path(name).name != name or name in ("", ".."):
                raise ValueError(f"a record in {self.remote} names {name!r}, which is no file name")
        return {name: stored_name(name, digest) for name, digest in files.items()}

    def size(self, folder: Path) -> int:
        return sum(self._listing(folder).values())

    # ---------------------------------------------------------------- files

    def listed(self, pattern: str) -> list[Entry]:
        top, depth = pattern.partition("/*")[0], pattern.count("/") + 1
        found = (replace(one, name=f"{top}/{one.name}") for one in self.remote.listed(top))
        return [one for one in found if one.name.count("/") == depth]

    def beside(self, pattern: str) -> Iterable[Path]:
        return ()

    def open(self, file: Path) -> BinaryIO:
        handle = TemporaryFile()  # noqa: SIM115
        if not self.remote.download(self.object(file), handle):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(file))
        handle.seek(0)
        return handle

    def names(self, folder: Path) -> Collection[str]:
        return tuple(self._listing(folder))

    def _listing(self, folder: Path) -> dict[str, int]:
        name = self.object(folder)
        when, listed = self._listings.get(name, (None, {}))
        if not _is_fresh(when):
            started = time.monotonic()
            listed = {one.name: one.size for one in self.remote.listed(name)}
            self._listings[name] = started, listed
        return listed

    def exists(self, file: Path) -> bool:
        return self.remote.has(self.object(file))

    def pull(self, files: Iterable[Path], *, anew: bool = True) -> None:
        side_by_side(self._pull, [file for file in files if anew or not file.exists()])

    def _pull(self, file: Path) -> None:
        if self._download(self.object(file), file):
            self._sent[file] = file_stamp(file)

    def _download(self, name: str, file: Path) -> bool:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}-{uuid.uuid4().hex[:8]}")
        try:
            with open(temporary, "wb") as handle:
                found = self.remote.download(name, handle)
            if found:
                os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)
        return found

    def pull_folder(self, folder: Path) -> None:
        tags = folder / ".tags.json"
        known: dict[str, Any] = json.loads(tags.read_text()) if tags.exists() else {}
        _, listed = self.remote.folder(self.object(folder))
        there = {one.name: one.etag for one in listed}
        changed = [
            folder / name
            for name, tag in there.items()
            if known.get(name) != tag or not (folder / name).exists()
        ]
        self.pull(changed)
        if changed:
            write_beside(tags, json.dumps(there).encode())

    def push(self, file: Path) -> None:
        stamp = file_stamp(file) if file.exists() else None
        if stamp is not None and stamp != self._sent.get(file):
            self.remote.put(self.object(file), file)
            self._sent[file] = stamp

    def write(self, file: Path, data: bytes) -> None:
        super().write(file, data)
        # Not the file: readers of this machine may replace it meanwhile.
        self.remote.put(self.object(file), data)

    def put_once(self, file: Path, data: bytes) -> bytes:
        name = self.object(file)
        won = self.remote.put_once(name, data)
        _, listed = self._listings.get(self.object(file.parent), (None, {}))
        listed[file.name] = len(data)
        return data if won else self.remote.get(name) or data

    def mark(self, file: Path) -> bool:
        return self.remote.put_once(self.object(file), os.urandom(8).hex().encode())

    def remove(self, file: Path) -> None:
        super().remove(file)
        self.remote.delete(self.object(file))

    def set_aside(self, path: Path, hidden: Path) -> bool:
        """Remove the damaged copy of this machine; the next reader brings it again."""
        if not path.exists():
            return False  # so the damage is in the bucket
        with suppress(FileNotFoundError):
            os.rename(path, hidden)
            shutil.rmtree(hidden) if hidden.is_dir() else hidden.unlink()
        return True


def stored_name(name: str, digest: str) -> str:
    """A file of an artifact in the bucket: two builders' never lie in each other's place."""
    return f"{digest[:12]}-{name}"


def _is_fresh(listed: float | None) -> bool:
    return listed is not None and time.monotonic() - listed < FRESH


def copy_folder(remote: Remote) -> Path:
    """The folder of this machine for a bucket."""
    cache = os.environ.get(CACHE) or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / (
        "airsweep/stores"
    )
    whole = f"{remote.endpoint or os.environ.get('AWS_ENDPOINT_URL', '')} {remote}"
    digest = hashlib.blake2b(whole.encode(), digest_size=6).hexdigest()
    name = f"{remote.bucket}/{remote.prefix}".rpartition("/")[2] or remote.bucket
    return Path(cache).expanduser().absolute() / f"{name}-{digest}"


# ---------------------------------------------------------------- opening


def open_backend(place: Path | str) -> FolderBackend:
    """Of the store in a folder or in a bucket; there may be nothing yet.

    Args:
        place: a path, `file:///...`, or `s3://bucket/prefix` and its like.

    Raises:
        StoreRefused: another version made it, or the folder of this machine copies another store.
        RemoteAway: the bucket cannot be read.
        ValueError: it is no folder, or such a URI means no store.
    """
    if is_bucket(place):
        return _open_bucket(parse(str(place)))
    root = folder_of(place)
    if root.exists() and not root.is_dir():
        raise ValueError(f"{root} is a file; a store is a folder: choose another with --store")
    _refuse_version(_version_in(root), root)
    return FolderBackend(root.absolute())


def _open_bucket(remote: Remote) -> BucketBackend:
    there = (remote.get("VERSION") or b"").decode().strip()
    _refuse_version(there.partition(" ")[0] or VERSION, remote)
    backend = BucketBackend(remote)
    root, here = backend.root, _version_in(backend.root)
    if here and here != there:
        raise StoreRefused(
            f"{root} mirrors a store that was at {remote} before and is gone; remove that folder, "
            f"or set {CACHE} to another place for mirrors"
        )
    if there and not here:
        write_beside(root / "VERSION", f"{there}\n".encode())
    return backend


def _version_in(root: Path) -> str | None:
    try:
        return (root / "VERSION").read_text(errors="replace").strip()
    except FileNotFoundError:
        return None  # an empty folder: the first run writes it
    except IsADirectoryError:
        return "a folder"


def _refuse_version(found: str | None, place: object) -> None:
    if found is not None and found != VERSION:
        raise StoreRefused(
            f"{place} is a store of version {found[:20]!r}; this airsweep reads version {VERSION} "
            "alone: use the airsweep that made it, or another folder with --store; if VERSION "
            f"there was damaged, replace it by a file that holds {VERSION}"
        )

"""Backends: a store keeps its files in a folder, or in a bucket with a local copy.

Files are named by their paths below `root`, a folder of this machine. `FolderBackend` is that
folder. `BucketBackend` extends it: it uploads new files to the bucket before they appear in the
folder, and downloads a file when it is first read. The bucket alone decides what exists; the folder
is a cache that can be deleted at any time.

In the bucket, an artifact is stored below `artifacts/<stage>/v<recipe>/<digest12>/`. The names of
its files start with their digests, so two builders of one key never overwrite each other's files.
`record.json` is uploaded last, with a conditional create, and lists the files that belong to the
artifact; without it the other objects are ignored. Shards are created conditionally too. No step
needs a rename, which buckets do not have.
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
from orchestrator.failures import is_disk_full
from orchestrator.files import (
    Stamp,
    file_digest,
    file_stamp,
    permission_message,
    sync,
    write_atomic,
    write_atomic_unsynced,
)
from orchestrator.store._leases import Lease
from orchestrator.store.buckets import (
    BucketClient,
    Entry,
    is_bucket,
    parse,
    run_concurrently,
    store_folder,
)
from orchestrator.store.verification import parse_record, read_record

CACHE = "AIRSWEEP_CACHE"
RECORD = "record.json"
FORMAT = 1  # of the files and folders of a store
ABOUT = "store.json"  # contains the format
LOCKS = "locks"  # folder
LISTING_LIFETIME = 5.0  # seconds for which a cached listing may report that an object is missing
OnWait = Callable[[str, str, float], None]  # called with lock name, holder and seconds waited


class FolderBackend:
    """A store in a folder that every machine mounts. Also the interface of all backends."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def name(self) -> str:
        """The value for --store."""
        return str(self.root)

    def label(self, path: Path) -> str:
        """Name of a file or folder of the store in messages."""
        return str(path)

    def initialize(self) -> None:
        """Record the format of the store.

        Raises:
            ValueError: the folder cannot be created.
            StoreRefused: the server overwrites objects that were to be created only once.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            if is_disk_full(problem):
                raise
            raise ValueError(
                f"the store {self.root} cannot be created ({problem.strerror}); choose a folder "
                "that you may write to with --store"
            ) from problem
        write_atomic(self.root / ABOUT, _about())

    def refuse_removal(self) -> None:
        """
        Raises:
            StoreRefused: this backend cannot lock out other users, so nothing may be removed.
        """

    def sweeps(self) -> list[tuple[str, str]]:
        """Project and name of each recorded sweep."""
        logs = (self.root / "sweeps").glob("*/*/events.jsonl")
        return sorted((log.parent.parent.name, log.parent.name) for log in logs)

    @contextmanager
    def lock(self, name: str, on_wait: OnWait) -> Iterator[None]:
        """Hold a lock among machines. In a folder the file locks suffice."""
        yield

    def refresh_listings(self) -> None:
        """Forget cached listings, so that new files of other processes are found."""

    # ---------------------------------------------------------------- artifacts

    def survey(self, folders: Iterable[Path]) -> None:
        """Prepare many `has` calls by a few listings."""

    def has(self, folder: Path) -> bool:
        """Whether a complete artifact exists."""
        return (folder / RECORD).is_file()

    def record(self, folder: Path) -> dict[str, Any] | None:
        """The record of an artifact, without its other files; None: it does not exist.

        Raises:
            DamagedArtifact: the record was changed.
        """
        with suppress(FileNotFoundError):
            return read_record(folder / RECORD)
        return None

    def download(self, folders: Iterable[Path]) -> bool:
        """Copy artifacts to this machine concurrently. Whether any copy was missing.

        Raises:
            ValueError: a file does not match its digest in the record.
        """
        return False

    def download_by_digest(self, stage: Path, digest: str) -> None:
        """Copy the artifacts of a stage whose digests start with these 12 digits."""

    def publish(self, folder: Path, work: Path, record: bytes) -> None:
        """Turn the work folder into the artifact, unless another builder has published it."""
        write_atomic(work / RECORD, record)
        try:
            os.rename(work, folder)
        except OSError:
            # The folder exists. With a record it is another builder's artifact: the same key has
            # the same content. Without a record it is invalid and is replaced.
            if not (folder / RECORD).is_file():
                shutil.rmtree(folder)
                os.rename(work, folder)
        sync(folder.parent)

    def size(self, folder: Path) -> int:
        """Bytes of the existing files of an artifact or row."""
        return sum(file.stat().st_size for file in folder.glob("*"))

    # ---------------------------------------------------------------- files

    def list_files(self, pattern: str) -> list[Entry]:
        """Current files in matching folders, by paths below the root; folders end with `/`.

        Args:
            pattern: glob pattern of the folders.
        """
        found: list[Entry] = []
        for folder in sorted(self.root.glob(pattern)):
            name = folder.relative_to(self.root).as_posix()
            if folder.is_dir():
                with suppress(FileNotFoundError), os.scandir(folder) as entries:
                    found.append(Entry(f"{name}/", 0, None, folder.stat().st_mtime))
                    for entry in entries:  # a concurrent process may rename or remove one
                        stat = entry.stat(follow_symlinks=False)
                        path = f"{name}/{entry.name}"
                        found.append(Entry(path, stat.st_size, None, stat.st_mtime))
        return found

    def open(self, file: Path) -> BinaryIO:
        """Open the version of a file that all machines share.

        Raises:
            OSError: it does not exist or cannot be read.
        """
        return open(file, "rb")

    def names(self, folder: Path) -> Collection[str]:
        """Names of the files of a row."""
        return os.listdir(folder) if folder.is_dir() else ()

    def exists(self, file: Path) -> bool:
        """Whether a file exists now, without using a cached listing."""
        return file.exists()

    def pull(self, files: Iterable[Path], *, overwrite: bool = True) -> None:
        """Download files that exist to this machine.

        Args:
            overwrite: also replace existing local copies.
        """

    def pull_folder(self, folder: Path) -> None:
        """Download the changed files of a folder, without subfolders."""

    def push(self, file: Path) -> None:
        """Upload a local file, so that all machines see it."""

    def write(self, file: Path, data: bytes) -> None:
        """Write a small file atomically, for all machines."""
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, data)

    def put_once(self, file: Path, data: bytes) -> bytes:
        """Create a shared file; the content that it has: `data`, or that of an earlier writer.

        The caller writes the returned content to the local file.
        """
        return data

    def create_marker(self, file: Path) -> bool:
        """Create a marker file. False: it exists."""
        try:
            file.touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def remove(self, file: Path) -> None:
        file.unlink(missing_ok=True)

    def set_aside(self, path: Path, hidden: Path) -> bool:
        """Rename a damaged file or folder, so that it counts as missing.

        Returns:
            False: this machine has no copy, so the damage is elsewhere.
        """
        with suppress(FileNotFoundError):  # another process has renamed it
            os.rename(path, hidden)
        return True


class BucketBackend(FolderBackend):
    """A store in a bucket. Its folder caches what this machine has written or read."""

    def __init__(self, client: BucketClient) -> None:
        super().__init__(copy_folder(client))
        self.client = client
        self._complete: set[str] = set()  # complete artifacts; they are never removed
        # Time of the listing, and bytes by name, of each listed folder.
        self._listings: dict[str, tuple[float, dict[str, int]]] = {}
        self._synced: dict[Path, Stamp] = {}  # local files that equal their objects

    def __reduce__(self) -> Any:
        """Reopen in another process, with the cache folder of its machine."""
        return open_backend, (self.client.uri,)

    @property
    def name(self) -> str:
        return self.client.uri

    def label(self, path: Path) -> str:
        return f"{self.client}/{self.object(path)}"

    def object(self, path: Path) -> str:
        """Object name of a path. Artifacts are named by digest alone, without the slug."""
        parts = list(path.relative_to(self.root).parts)
        if parts[0] == "artifacts" and len(parts) > 3:
            parts[3] = parts[3].rpartition("-")[2]
        return "/".join(parts)

    def initialize(self) -> None:
        client = self.client
        client.put_once(ABOUT, _about(id=uuid.uuid4().hex).encode())
        if client.put_once(ABOUT, _about(id="another").encode()):
            client.delete(ABOUT)
            raise StoreRefused(
                f"the server of {client} ignores If-None-Match and overwrites existing objects, so "
                "two machines could destroy each other's results; use a server that supports "
                "conditional writes, such as Amazon S3 or a recent MinIO, or a folder, with --store"
            )
        self.pull([self.root / ABOUT])

    def refuse_removal(self) -> None:
        raise StoreRefused(
            f"{self.name}: airsweep removes nothing from a bucket, because it cannot lock out "
            "running sweeps; `airsweep cache ls` lists what no sweep needs: while no sweep runs, "
            f"remove the {RECORD} of an artifact first, then its other objects, with the tools of "
            "your storage"
        )

    def sweeps(self) -> list[tuple[str, str]]:
        projects, _ = self.client.folder("sweeps")
        return [(p, name) for p in projects for name in self.client.folder(f"sweeps/{p}")[0]]

    @contextmanager
    def lock(self, name: str, on_wait: OnWait) -> Iterator[None]:
        lease = Lease(self.client, f"{LOCKS}/{name}")
        lease.acquire(lambda seconds: on_wait(name, "another machine", seconds))
        try:
            self.refresh_listings()
            yield
        finally:
            lease.release()

    def refresh_listings(self) -> None:
        self._listings.clear()

    # ---------------------------------------------------------------- artifacts

    def survey(self, folders: Iterable[Path]) -> None:
        for parent in dict.fromkeys(folder.parent for folder in folders):
            self._listing(parent)

    def has(self, folder: Path) -> bool:
        name = self.object(folder)
        parent, _, digest = name.rpartition("/")
        if name not in self._complete:
            when, listed = self._listings.get(parent, (None, {}))
            record = f"{digest}/{RECORD}"
            if record in listed or (not _is_fresh(when) and self.client.has(f"{parent}/{record}")):
                self._complete.add(name)
        return name in self._complete

    def record(self, folder: Path) -> dict[str, Any] | None:
        if (folder / RECORD).is_file():
            return super().record(folder)
        data = self._record(folder)
        file = folder / RECORD
        return None if data is None else parse_record(data, file, self.label(file))

    def _record(self, folder: Path) -> bytes | None:
        """The record of an artifact whose files were not downloaded yet."""
        cached, name = self._cached_record(folder), self.object(folder)
        with suppress(FileNotFoundError):
            data = cached.read_bytes()
            if intact(data):  # else download it again
                return data
        downloaded = self.client.get(f"{name}/{RECORD}")
        if downloaded is not None:
            self._complete.add(name)
            write_atomic_unsynced(cached, downloaded)
        return downloaded

    def _cached_record(self, folder: Path) -> Path:
        return self.root / "records" / f"{self.object(folder).removeprefix('artifacts/')}.json"

    def download(self, folders: Iterable[Path]) -> bool:
        missing = [folder for folder in folders if not (folder / RECORD).is_file()]
        run_concurrently(self._download_artifact, missing)
        return bool(missing)

    def download_by_digest(self, stage: Path, digest: str) -> None:
        for name in self.client.folder(self.object(stage))[0]:
            if name.startswith(digest) and (record := self.record(stage / name)) is not None:
                slug = str(record["key"]).rpartition("/")[2].removesuffix(f"-{name}")
                self.download([stage / f"{slug}-{name}"])

    def _download_artifact(self, folder: Path) -> None:
        had_record = self._cached_record(folder).exists()
        record = self._record(folder)
        if record is None:
            return
        try:
            self._download_files(folder, record)
        except ValueError:
            if not had_record:
                raise
            # The artifact may have been removed by hand and rebuilt since its record was cached.
            self._cached_record(folder).unlink(missing_ok=True)
            self._complete.discard(self.object(folder))
            self._download_artifact(folder)

    def _download_files(self, folder: Path, record: bytes) -> None:
        names = self._stored_names(record)
        digests = json.loads(record)["files"]
        work = folder.parent / f".{folder.name}-{uuid.uuid4().hex[:8]}"
        work.mkdir(parents=True)

        def fetch(name: str) -> None:
            exists = self._download_object(f"{self.object(folder)}/{names[name]}", work / name)
            if not exists or file_digest(work / name) != digests[name]:
                raise ValueError(
                    f"{self.label(folder / names[name])} "
                    f"{'does not match its digest' if exists else 'is missing'}; remove the "
                    f"{RECORD} beside it and run again"
                )

        try:
            run_concurrently(fetch, names)
            (work / RECORD).write_bytes(record)
            if not (folder / RECORD).is_file():  # else another process has downloaded it
                shutil.rmtree(folder, ignore_errors=True)
                os.rename(work, folder)
        except OSError:
            if not (folder / RECORD).is_file():
                raise
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def publish(self, folder: Path, work: Path, record: bytes) -> None:
        prefix = self.object(folder)
        names = self._stored_names(record)
        run_concurrently(lambda n: self.client.put(f"{prefix}/{names[n]}", work / n), names)
        created = self.client.put_once(f"{prefix}/{RECORD}", record)
        self._cached_record(folder).unlink(missing_ok=True)
        self._complete.add(prefix)
        if created:
            shutil.rmtree(folder, ignore_errors=True)  # outdated if the bucket was emptied by hand
            super().publish(folder, work, record)
        else:  # another builder published first: delete our files that its record does not list
            winner = self._stored_names(self.client.get(f"{prefix}/{RECORD}") or b"{}")
            for name in {*names.values()} - {*winner.values()}:
                self.client.delete(f"{prefix}/{name}")

    def _stored_names(self, record: bytes) -> dict[str, str]:
        """Object names by file names in the folder."""
        files: Mapping[str, str] = json.loads(record).get("files", {})
        for name in files:
            # Anyone who may write to the bucket may have written the record, and the name becomes
            # a path of this machine.
            if Path(name).name != name or name in ("", ".."):
                raise ValueError(f"a record in {self.client} has the invalid file name {name!r}")
        return {name: stored_name(name, digest) for name, digest in files.items()}

    def size(self, folder: Path) -> int:
        return sum(self._listing(folder).values())

    # ---------------------------------------------------------------- files

    def list_files(self, pattern: str) -> list[Entry]:
        top, depth = pattern.partition("/*")[0], pattern.count("/") + 1
        found = (
            replace(entry, name=f"{top}/{entry.name}") for entry in self.client.list_objects(top)
        )
        return [entry for entry in found if entry.name.count("/") == depth]

    def open(self, file: Path) -> BinaryIO:
        handle = TemporaryFile()  # noqa: SIM115
        if not self.client.download(self.object(file), handle):
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
            listed = {entry.name: entry.size for entry in self.client.list_objects(name)}
            self._listings[name] = started, listed
        return listed

    def exists(self, file: Path) -> bool:
        return self.client.has(self.object(file))

    def pull(self, files: Iterable[Path], *, overwrite: bool = True) -> None:
        run_concurrently(self._pull, [file for file in files if overwrite or not file.exists()])

    def _pull(self, file: Path) -> None:
        if self._download_object(self.object(file), file):
            self._synced[file] = file_stamp(file)

    def _download_object(self, name: str, file: Path) -> bool:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}-{uuid.uuid4().hex[:8]}")
        try:
            with open(temporary, "wb") as handle:
                exists = self.client.download(name, handle)
            if exists:
                os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)
        return exists

    def pull_folder(self, folder: Path) -> None:
        file = folder / ".tags.json"
        old: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        _, listed = self.client.folder(self.object(folder))
        tags = {entry.name: entry.etag for entry in listed}
        changed = [
            folder / name
            for name, tag in tags.items()
            if old.get(name) != tag or not (folder / name).exists()
        ]
        self.pull(changed)
        if changed:
            write_atomic_unsynced(file, json.dumps(tags).encode())

    def push(self, file: Path) -> None:
        stamp = file_stamp(file) if file.exists() else None
        if stamp is not None and stamp != self._synced.get(file):
            self.client.put(self.object(file), file)
            self._synced[file] = stamp

    def write(self, file: Path, data: bytes) -> None:
        super().write(file, data)
        # Upload the data, not the file: another process of this machine may replace the file.
        self.client.put(self.object(file), data)

    def put_once(self, file: Path, data: bytes) -> bytes:
        name = self.object(file)
        created = self.client.put_once(name, data)
        _, listed = self._listings.get(self.object(file.parent), (None, {}))
        listed[file.name] = len(data)
        return data if created else self.client.get(name) or data

    def create_marker(self, file: Path) -> bool:
        return self.client.put_once(self.object(file), os.urandom(8).hex().encode())

    def remove(self, file: Path) -> None:
        super().remove(file)
        self.client.delete(self.object(file))

    def set_aside(self, path: Path, hidden: Path) -> bool:
        """Remove the damaged local copy; the next reader downloads it again."""
        if not path.exists():
            return False
        with suppress(FileNotFoundError):
            os.rename(path, hidden)
            shutil.rmtree(hidden) if hidden.is_dir() else hidden.unlink()
        return True


def stored_name(name: str, digest: str) -> str:
    """Name of an artifact's file in the bucket: different content has a different name."""
    return f"{digest[:12]}-{name}"


def _is_fresh(listed: float | None) -> bool:
    return listed is not None and time.monotonic() - listed < LISTING_LIFETIME


def copy_folder(client: BucketClient) -> Path:
    """Cache folder of this machine for a bucket."""
    cache = os.environ.get(CACHE) or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / (
        "airsweep/stores"
    )
    identity = f"{client.endpoint or os.environ.get('AWS_ENDPOINT_URL', '')} {client}"
    digest = hashlib.blake2b(identity.encode(), digest_size=6).hexdigest()
    name = f"{client.bucket}/{client.prefix}".rpartition("/")[2] or client.bucket
    return Path(cache).expanduser().absolute() / f"{name}-{digest}"


# ---------------------------------------------------------------- opening


def open_backend(address: Path | str) -> FolderBackend:
    """The backend of a store, which may be empty or missing.

    Args:
        address: a path, `file:///...`, or the URI of a bucket such as `s3://bucket/prefix`.

    Raises:
        StoreRefused: the store has another format, or the cache folder copies another store.
        BucketUnreachable: the bucket cannot be read.
        ValueError: the path is a file or below one, this user may not read the folder, or the URI
            cannot be the address of a store.
    """
    if is_bucket(address):
        return _open_bucket(parse(str(address)))
    root = store_folder(address).absolute()
    existing = next(path for path in (root, *root.parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise ValueError(f"{existing} is a file; a store is a folder: choose another with --store")
    try:
        backend = FolderBackend(root)
        _check_format(_about_in(root), backend)
    except PermissionError:
        raise ValueError(f"{permission_message(root)} with --store") from None
    return backend


def _open_bucket(client: BucketClient) -> BucketBackend:
    backend, stored = BucketBackend(client), client.get(ABOUT)
    _check_format(stored, backend)
    root, cached = backend.root, _about_in(backend.root)
    if cached is not None and cached != stored:
        raise StoreRefused(
            f"{root} caches an earlier store at {client} that no longer exists; remove that "
            f"folder, or set {CACHE} to another cache folder"
        )
    if stored is not None and cached is None:
        write_atomic_unsynced(root / ABOUT, stored)
    return backend


def _about(**facts: str) -> str:
    """The content of `store.json`."""
    return json.dumps({"format": FORMAT, **facts}) + "\n"


def _about_in(root: Path) -> bytes | None:
    """The content of `store.json`; None: the store is new, and the first run writes the file."""
    try:
        return (root / ABOUT).read_bytes()
    except FileNotFoundError:
        return None
    except IsADirectoryError:
        return b""


def _check_format(about: bytes | None, backend: FolderBackend) -> None:
    if about is None:
        if not backend.sweeps():
            return
        found = f"has results but no {ABOUT}"
    else:
        try:
            found = f"has format {json.loads(about)['format']!r:.20}"
        except (ValueError, TypeError, KeyError, RecursionError):
            found = f"has a damaged {ABOUT}"
        if found == f"has format {FORMAT}":
            return
    raise StoreRefused(
        f"the store {backend.name} {found}, but this airsweep reads format {FORMAT}: choose "
        f"another store or an empty folder with --store; if the {ABOUT} of a store of format "
        f"{FORMAT} was lost or damaged, write into it: {_about().strip()}"
    )

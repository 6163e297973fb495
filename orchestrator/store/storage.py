"""Storage: the files of a store, in a folder or in a bucket with a local copy.

`Folder` and `Bucket` have the same six calls: `get`, `put`, `put_once`, `list`, `delete` and
`local`; `has` answers without reading. Files are named by their paths below `root`, a folder of
this machine. In a `Bucket`, it contains copies of what this machine has written or read, and can be
deleted at any time: the bucket alone decides what exists.

In the bucket, an artifact is stored below `artifacts/<stage>/v<recipe>/<digest12>/`. The names of
its files start with their digests, so two builders of one key never overwrite each other's files.
`record.json` is uploaded last, with a conditional create, and lists the files that belong to the
artifact; without it the other objects are ignored. Shards are created conditionally too. No step
needs a rename, which buckets do not have.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.errors import StoreRefused
from orchestrator.failures import is_disk_full
from orchestrator.files import (
    permission_message,
    sync,
    temporary_for,
    write_atomic,
    write_atomic_unsynced,
)
from orchestrator.store.buckets import (
    BucketClient,
    Entry,
    is_bucket,
    parse,
    run_concurrently,
    store_folder,
)
from orchestrator.store.verification import recorded_files

CACHE = "AIRSWEEP_CACHE"
RECORD = "record.json"
FORMAT = 1  # of the files and folders of a store
ABOUT = "store.json"  # contains the format
EVENTS = "events.jsonl"
LISTING_LIFETIME = 5.0  # seconds for which a cached listing may report that an object is missing


class Folder:
    """A store in a folder that every machine mounts."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def name(self) -> str:
        """The value for --store."""
        return str(self.root)

    def has(self, path: Path) -> bool:
        """Whether a file exists."""
        return path.is_file()

    def get(self, path: Path) -> bytes | None:
        """Content of a file; None: it does not exist."""
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None

    def put(self, path: Path, content: bytes) -> None:
        """Write a small file atomically and durably, for all machines."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)

    def put_once(self, path: Path, content: bytes | Path) -> bool:
        """Create a file or an artifact. False: it exists, and stays as it is.

        Args:
            content: bytes; the files of an artifact as a folder on this machine, with their
                `record.json`, which the call moves; or nothing, for a marker.
        """
        if isinstance(content, Path):
            return self._publish(path, content)
        if not content:
            try:
                path.touch(exist_ok=False)
            except FileExistsError:
                return False
        elif path.exists():
            return False
        else:  # two writers at the same time write the same
            # Not synced: thousands of syncs are slow on a shared file system. If a power cut
            # damages a shard, its checksum reveals that, and the block is generated again.
            write_atomic_unsynced(path, content)
        return True

    def _publish(self, path: Path, work: Path) -> bool:
        sync(work)  # all files are on disk before the folder has its name
        try:
            os.rename(work, path)
        except OSError:
            # The folder exists. With a record it is another builder's artifact: the same key has
            # the same content. Without a record it is invalid and is replaced.
            if (path / RECORD).is_file():
                return False
            shutil.rmtree(path, ignore_errors=True)
            os.rename(work, path)
        sync(path.parent)
        return True

    def list(self, path: Path) -> Sequence[str]:
        """Names of the files and folders in a folder."""
        return os.listdir(path) if path.is_dir() else []

    def entries(self, path: Path, depth: int) -> Sequence[Entry]:
        """Files in a folder, `depth` levels deep, and its subfolders, whose names end with `/`."""
        found = []
        with suppress(FileNotFoundError), os.scandir(path) as inside:
            for each in inside:  # a concurrent process may rename or remove one
                with suppress(OSError):
                    about = each.stat(follow_symlinks=False)
                    is_folder = depth > 1 and each.is_dir()
                    name = each.name + "/" * is_folder
                    found.append(Entry(name, about.st_size * (not is_folder), about.st_mtime))
                    if is_folder:
                        below = self.entries(path / each.name, depth - 1)
                        found += [replace(entry, name=name + entry.name) for entry in below]
        return found

    def refresh_listings(self) -> None:
        """Forget cached listings, so that new files of other processes are found."""

    def delete(self, path: Path) -> None:
        """Remove a file, if it exists."""
        path.unlink(missing_ok=True)

    def local(self, path: Path, digest: str = "", fresh: bool = False) -> Path:
        """The path of a file, downloaded if it exists and this machine has no copy.

        Args:
            digest: of the content of an artifact's file.
            fresh: replace an existing copy.
        """
        return path

    def label(self, path: Path) -> str:
        """Name of a file in messages."""
        return str(path)


class Bucket:
    """A store in a bucket, with copies of its files in a folder of this machine."""

    def __init__(self, client: BucketClient) -> None:
        self.client, self.copies = client, Folder(copy_folder(client))
        self.root = self.copies.root
        self._records: set[str] = set()  # of artifacts that exist
        # Each listed folder with the time of its listing, and its objects by name.
        self._listings: dict[str, tuple[float, dict[str, Entry]]] = {}

    def __reduce__(self) -> Any:
        """Reopen in another process, with the copies of its machine."""
        return open_storage, (self.name,)

    @property
    def name(self) -> str:
        return str(self.client)

    def object(self, path: Path, digest: str = "") -> str:
        """Object name of a file. An artifact is named by its digest alone, without the slug.

        Args:
            digest: of the content of an artifact's file: different content has another name.
        """
        parts = list(path.relative_to(self.root).parts)
        if parts[0] == "artifacts" and len(parts) > 3:
            parts[3] = parts[3].rpartition("-")[2]
        return "/".join([*parts[:-1], f"{digest[:12]}-{parts[-1]}" if digest else parts[-1]])

    def has(self, path: Path) -> bool:
        name = self.object(path)
        if path.name != RECORD:
            return self.client.has(name)
        if name not in self._records:
            listed = self._fresh_listing(name.rsplit("/", 2)[0])
            if listed is None and self.client.has(name):  # `survey` has found all that are listed
                self._records.add(name)
        return name in self._records

    def survey(self, stage: Path) -> None:
        """Find all artifacts of a stage by one listing, before many `has` calls."""
        name = self.object(stage)
        self._records |= {
            f"{name}/{each}" for each in self._listing(name) if each.endswith(f"/{RECORD}")
        }

    def get(self, path: Path) -> bytes | None:
        return self.client.get(self.object(path))

    def put(self, path: Path, content: bytes) -> None:
        self.copies.put(path, content)
        self.client.put(self.object(path), content)

    def put_once(self, path: Path, content: bytes | Path) -> bool:
        if isinstance(content, Path):
            return self._publish(path, content)
        # A marker excludes every other writer, so its content must differ from that of others.
        created = self.client.put_once(self.object(path), content or os.urandom(16))
        if content:
            listed = self._fresh_listing(self.object(path.parent)) or {}
            listed[path.name] = Entry(path.name, len(content), time.time())
        if created and content:
            write_atomic_unsynced(path, content)
        return created

    def _publish(self, path: Path, work: Path) -> bool:
        record = (work / RECORD).read_bytes()
        objects = self._objects(path, record)
        run_concurrently(lambda file: self.client.put(objects[file], work / file), objects)
        created = self.client.put_once(self.object(path / RECORD), record)
        self._records.add(self.object(path / RECORD))
        if created:
            shutil.rmtree(path, ignore_errors=True)  # outdated if the bucket was emptied by hand
            self.copies.put_once(path, work)
        else:  # another builder published first: delete our files that its record does not list
            winner = self._objects(path, self.get(path / RECORD) or b"{}")
            for name in {*objects.values()} - {*winner.values()}:
                self.client.delete(name)
        return created

    def _objects(self, path: Path, record: bytes) -> dict[str, str]:
        """Object names of an artifact's files."""
        files = recorded_files(path, json.loads(record))
        return {file: self.object(path / file, digest) for file, digest in files.items()}

    def list(self, path: Path) -> Sequence[str]:
        return [*self._listing(self.object(path))]

    def entries(self, path: Path, depth: int) -> Sequence[Entry]:
        return [*self._listing(self.object(path)).values()]

    def _listing(self, name: str) -> dict[str, Entry]:
        listed = self._fresh_listing(name)
        if listed is None:
            started = time.monotonic()
            listed = {entry.name: entry for entry in self.client.list_objects(name)}
            self._listings[name] = started, listed
        return listed

    def _fresh_listing(self, name: str) -> dict[str, Entry] | None:
        when, listed = self._listings.get(name, (-LISTING_LIFETIME, {}))
        return listed if time.monotonic() - when < LISTING_LIFETIME else None

    def refresh_listings(self) -> None:
        self._listings.clear()

    def delete(self, path: Path) -> None:
        self.copies.delete(path)
        self.client.delete(self.object(path))
        self._records.discard(self.object(path))

    def local(self, path: Path, digest: str = "", fresh: bool = False) -> Path:
        if path.exists() and not fresh:
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            suppress(FileNotFoundError),
            temporary_for(path) as temporary,
            open(temporary, "wb") as handle,
        ):
            if not self.client.download(self.object(path, digest), handle):
                raise FileNotFoundError
        return path

    def refresh(self, folder: Path) -> None:
        """Download the files of a folder, without subfolders."""
        files = [folder / entry.name for entry in self.client.folder(self.object(folder))[1]]
        run_concurrently(lambda file: self.local(file, fresh=True), files)

    def label(self, path: Path) -> str:
        return f"{self.client}/{self.object(path)}"


def copy_folder(client: BucketClient) -> Path:
    """Folder of this machine for copies of a bucket's files."""
    cache = os.environ.get(CACHE) or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / (
        "airsweep/stores"
    )
    identity = f"{client.endpoint} {client}".encode()
    digest = hashlib.blake2b(identity, digest_size=6).hexdigest()
    name = f"{client.bucket}/{client.prefix}".rpartition("/")[2] or client.bucket
    return Path(cache).expanduser().absolute() / f"{name}-{digest}"


# ---------------------------------------------------------------- opening


def open_storage(address: Path | str) -> Folder | Bucket:
    """The storage of a store, which may be empty or missing.

    Args:
        address: a path, or the URI of a bucket such as `s3://bucket/prefix`.

    Raises:
        StoreRefused: the store has another format, or the folder of copies is of another store.
        BucketUnreachable: the bucket cannot be read.
        ValueError: the path is a file or below one, this user may not read the folder, or the URI
            cannot be the address of a store.
    """
    if is_bucket(address):
        return _open_bucket(Bucket(parse(str(address))))
    root = store_folder(address).absolute()
    existing = next(path for path in (root, *root.parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise ValueError(f"{existing} is a file; a store is a folder: choose another with --store")
    storage = Folder(root)
    try:
        _check_format(storage, storage.get(root / ABOUT))
    except PermissionError:
        raise ValueError(f"{permission_message(root)} with --store") from None
    return storage


def _open_bucket(bucket: Bucket) -> Bucket:
    file = bucket.root / ABOUT
    stored, copied = bucket.get(file), bucket.copies.get(file)
    _check_format(bucket, stored)
    if copied is not None and copied != stored:
        raise StoreRefused(
            f"{bucket.root} caches an earlier store at {bucket.client} that no longer exists; "
            f"remove that folder, or set {CACHE} to another cache folder"
        )
    if stored is not None and copied is None:
        write_atomic_unsynced(file, stored)
    return bucket


def _check_format(storage: Folder | Bucket, about: bytes | None) -> None:
    """Check the content of `store.json`; None: the store is new, and the first run writes it."""
    try:
        found = f"has format {json.loads(_about() if about is None else about)['format']!r:.20}"
    except (ValueError, TypeError, KeyError, RecursionError):
        found = f"has a damaged {ABOUT}"
    if found != f"has format {FORMAT}":
        raise StoreRefused(
            f"the store {storage.name} {found}, but this airsweep reads format {FORMAT}: choose "
            f"another store or an empty folder with --store; if the {ABOUT} of a store of format "
            f"{FORMAT} was damaged, write into it: {_about().decode().strip()}"
        )


def initialize(storage: Folder | Bucket) -> None:
    """Write `store.json` if it is missing.

    Raises:
        ValueError: the folder cannot be created.
        StoreRefused: the server overwrites objects that were to be created only once.
    """
    file = storage.root / ABOUT
    if file.exists():
        return
    if isinstance(storage, Folder):
        try:
            storage.put(file, _about())
        except OSError as problem:
            if is_disk_full(problem):
                raise
            raise ValueError(
                f"the store {storage.root} cannot be created ({problem.strerror}); choose a folder "
                "that you may write to with --store"
            ) from problem
        return
    client = storage.client
    client.put_once(ABOUT, _about(id=uuid.uuid4().hex))
    if client.put_once(ABOUT, _about(id="another")):
        client.delete(ABOUT)
        raise StoreRefused(
            f"the server of {client} ignores If-None-Match and overwrites existing objects, so "
            "two machines could destroy each other's results; use a server that supports "
            "conditional writes, such as Amazon S3 or a recent MinIO, or a folder, with --store"
        )
    storage.local(file)


def _about(**facts: str) -> bytes:
    """The content of `store.json`."""
    return f"{json.dumps({'format': FORMAT, **facts})}\n".encode()

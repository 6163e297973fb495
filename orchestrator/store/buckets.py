"""Client for buckets of Amazon S3, Google Cloud Storage and Azure, through obstore.

The correctness of a store in a bucket rests on `put_once`: of several writers of a name exactly one
succeeds, and each learns whether it did. obstore reads credentials, region and endpoint from the
environment.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TypeVar
from urllib.parse import urlsplit

from orchestrator.errors import BucketUnreachable
from orchestrator.redact import redact

if TYPE_CHECKING:
    from obstore import UpdateVersion

T = TypeVar("T")

S3 = "s3"
# Schemes of buckets that can hold a store, and how to set their credentials.
CREDENTIALS = {
    S3: "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY on every machine; for AWS_PROFILE, run "
    '`eval "$(aws configure export-credentials --format env)"`',
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS on every machine",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY on every machine",
}
MAX_REQUESTS = 32  # at the same time
PART = 16 << 20  # bytes: larger files are uploaded in parts of this size
POLL = 0.5  # seconds before a refused request is repeated
RETRIES = {"max_retries": 4, "retry_timeout": timedelta(minutes=2)}


@dataclass(frozen=True)
class Entry:
    """An object or file in a listing."""

    name: str  # below the listed folder
    size: int  # bytes
    modified: float  # seconds since the epoch


@dataclass(frozen=True)
class VersionedObject:
    """Content and version of an object."""

    data: bytes
    version: UpdateVersion
    modified: float  # seconds since the epoch, by the server's clock


def is_bucket(address: str | Path) -> bool:
    """Whether an address is the URI of a bucket, not a folder.

    Raises:
        ValueError: it is a URI that cannot be the address of a store.

    >>> [is_bucket(address) for address in ("runs", "s3://bucket/team")]
    [False, True]
    """
    scheme, colon, _ = str(address).partition("://")
    if colon and scheme not in CREDENTIALS:
        raise ValueError(
            f"{scheme}:// cannot hold a store; allowed: a folder, s3://bucket/prefix of any server "
            "that honours If-None-Match, gs://bucket/prefix, and az://container/prefix"
        )
    return bool(colon)


def store_folder(address: str | Path) -> Path:
    """The folder of a path.

    Raises:
        ValueError: the path is empty or in the home of an unknown user.
    """
    if not str(address):
        raise ValueError("the store is empty; give a folder or s3://bucket/prefix with --store")
    try:
        return Path(address).expanduser()
    except RuntimeError:
        raise ValueError(
            f"the store {address} is in the home of an unknown user; choose another with --store"
        ) from None


def parse(uri: str) -> BucketClient:
    """The client for `s3://bucket/prefix`.

    Raises:
        ValueError: the URI is invalid, or contains a secret or an option.
    """
    parts = urlsplit(uri)
    if "@" in parts.netloc or parts.query:  # do not print the URI: logs would show it
        raise ValueError(
            "the store's URI contains credentials or options: leave them out, and "
            f"{CREDENTIALS[parts.scheme]}; region and endpoint are AWS_REGION and AWS_ENDPOINT_URL"
        )
    if not parts.netloc or parts.fragment:
        raise ValueError(f"{uri!r} is not {parts.scheme}://bucket/prefix")
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL") if parts.scheme == S3 else ()
    endpoint = next(filter(None, map(os.environ.get, names)), "")
    return BucketClient(parts.netloc, parts.path.strip("/"), parts.scheme, endpoint)


@dataclass(frozen=True)
class BucketClient:
    """Requests to the objects below one prefix of a bucket. Plain data that can be pickled."""

    bucket: str
    prefix: str = ""
    scheme: str = S3
    endpoint: str = ""  # of s3://; empty: Amazon's

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.prefix}".rstrip("/")

    # ---------------------------------------------------------------- reading

    def get(self, name: str) -> bytes | None:
        """Content of an object; None: it does not exist."""
        found = self.get_versioned(name)
        return None if found is None else found.data

    def get_versioned(self, name: str) -> VersionedObject | None:
        """Content and version of an object; None: it does not exist."""

        def read(objects: Any) -> VersionedObject:
            found = objects.get(name)
            modified = found.meta["last_modified"].timestamp()
            return VersionedObject(bytes(found.bytes()), _version(found.meta), modified)

        return self._request(read)

    def has(self, name: str) -> bool:
        return self._request(lambda objects: objects.head(name)) is not None

    def download(self, name: str, file: BinaryIO) -> bool:
        """Write the content of an object to a file. False: the object does not exist."""

        def read(objects: Any) -> bool:
            for chunk in objects.get(name):
                file.write(chunk)
            return True

        return self._request(read) is not None

    def list_objects(self, folder: str, after: str = "") -> list[Entry]:
        """All objects below a folder, sorted by name.

        Args:
            after: list only names that sort after this one.
        """
        offset = f"{folder}/{after}" if after else None
        found = self._request(lambda objects: objects.list(folder, offset=offset).collect())
        return self._entries(found or [], folder)

    def folder(self, folder: str) -> tuple[list[str], list[Entry]]:
        """Names of the subfolders of a folder, and the objects directly in it."""
        found = self._request(lambda objects: objects.list_with_delimiter(folder))
        if found is None:
            return [], []
        subfolders = [prefix.rpartition("/")[2] for prefix in found["common_prefixes"]]
        return sorted(subfolders), self._entries(found["objects"], folder)

    def _entries(self, found: Iterable[Any], folder: str) -> list[Entry]:
        above = len(folder) + 1 if folder else 0
        entries = (
            Entry(o["path"][above:], o["size"], o["last_modified"].timestamp()) for o in found
        )
        return sorted(entries, key=lambda entry: entry.name)

    # ---------------------------------------------------------------- writing

    def put(self, name: str, data: bytes | Path) -> None:
        """Write bytes or a file to an object, replacing an existing one."""
        if self._request(lambda objects: objects.put(name, data, chunk_size=PART)) is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(data))

    def put_if(
        self, name: str, data: bytes, condition: UpdateVersion | Literal["create"]
    ) -> UpdateVersion | None:
        """Create an object (`create`) or replace one version of it; the new version.

        Returns:
            None: the condition does not hold. Repeating a write that succeeded gives its version:
                obstore does so if the response was lost. So the content of writers must differ.
        """
        done = self._request(lambda objects: objects.put(name, data, mode=condition))
        if done is not None:
            return _version(done)
        current = self.get_versioned(name)
        return current.version if current is not None and current.data == data else None

    def put_once(self, name: str, data: bytes) -> bool:
        """Create an object. False: it exists with other content."""
        while self.put_if(name, data, "create") is None:
            if self.has(name):
                return False
            time.sleep(POLL)  # S3 also refuses while another write is in progress
        return True

    def delete(self, name: str) -> None:
        self._request(lambda objects: objects.delete(name))

    # ---------------------------------------------------------------- requests

    def _request(self, do: Callable[[Any], T]) -> T | None:
        """Result of an obstore call; None: the object does not exist or a condition does not hold.

        Raises:
            BucketUnreachable: any other error, with a message that explains what to do.
        """
        from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

        try:
            return do(_object_store(self))
        except (AlreadyExistsError, PreconditionError):
            return None
        except (BaseError, FileNotFoundError) as problem:
            no_bucket = any(f"<Code>{code}<" in str(problem) for code in NO_BUCKET)
            if isinstance(problem, FileNotFoundError) and not no_bucket:
                return None
            raise BucketUnreachable(self._message(str(problem))) from None

    def _message(self, problem: str) -> str:
        text = " ".join(redact(problem.partition("\nDebug source")[0]).split())
        status, code = (m[1] if (m := pattern.search(text)) else "" for pattern in RESPONSE)
        if code in NO_BUCKET:
            return f"{self}: bucket {self.bucket!r} does not exist; create it, or correct the name"
        if any(sign in text for sign in NO_CREDENTIALS):
            return f"{self}: no credentials were found; {CREDENTIALS[self.scheme]}"
        if status == "507" or code in FULL:
            return f"{self} is full ({code or status}); free some space, or choose another --store"
        if not status and "HTTP error" in text:
            server = self.endpoint or self.scheme
            return (
                f"{self}: {server} does not answer ({text.rpartition('HTTP error: ')[2]}): check "
                "that it runs, that this machine can reach it, and that AWS_ENDPOINT_URL is right"
            )
        return f"{self}: {text}"


RESPONSE = (re.compile(r"status code: (\d+)"), re.compile("<Code>(.*?)</Code>"))
NO_BUCKET = ("NoSuchBucket", "ContainerNotFound")
FULL = (
    "InsufficientStorage",
    "QuotaExceeded",
    "XMinioStorageFull",
    "XMinioAdminBucketQuotaExceeded",
)
# Without credentials in the environment, obstore requests those of a cloud machine from these
# addresses.
NO_CREDENTIALS = (
    *("/latest/api/token", "/computeMetadata/", "/metadata/identity/"),
    "Account must be specified",
)


def _version(meta: Any) -> UpdateVersion:
    """Version of an object: S3 has ETags, Google Cloud Storage has numbers."""
    version: Any = {name: meta[name] for name in ("e_tag", "version") if meta[name] is not None}
    found: UpdateVersion = version
    return found


@cache
def _object_store(bucket: BucketClient) -> Any:
    # A store in a folder must not need obstore, so import it here.
    from obstore.store import from_url

    config: dict[str, Any] = {}
    client: dict[str, Any] = {"connect_timeout": "5s", "read_timeout": "60s", "timeout": "10min"}
    if bucket.scheme == S3:
        config["disable_bulk_delete"] = True  # some servers do not support it
        if bucket.endpoint:
            config["endpoint"] = bucket.endpoint
            client["allow_http"] = bucket.endpoint.startswith("http://")
    if bundle := os.environ.get("AWS_CA_BUNDLE"):  # as in the AWS CLI
        client["root_certificate"] = Path(bundle).read_bytes()
    opened: Any = from_url  # its overloads are typed by scheme
    return opened(str(bucket), config=config, client_options=client, retry_config=RETRIES)


def run_concurrently(do: Callable[[T], object], items: Collection[T]) -> None:
    """Call `do` for all items in threads. Raises the first error."""
    if len(items) < 2:
        for item in items:
            do(item)
        return
    with ThreadPoolExecutor(min(MAX_REQUESTS, len(items))) as threads:
        for _ in threads.map(do, items):
            pass

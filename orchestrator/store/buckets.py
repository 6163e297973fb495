"""Objects in a bucket of Amazon S3, Google Cloud Storage or Azure, through obstore. Knows no store.

`put_once` is what correctness rests on: of several writers of a name exactly one wins, and each
learns whether it did. Credentials, region and endpoint come from the environment as obstore reads
them, or region and endpoint from the URI; no secret is ever in a URI.
"""

from __future__ import annotations

import errno
import os
import re
import threading
import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TypeVar
from urllib.parse import parse_qsl, urlsplit

from orchestrator.errors import RemoteAway
from orchestrator.redact import redacted

if TYPE_CHECKING:
    from obstore import UpdateVersion

T = TypeVar("T")

FILE, S3 = "file", "s3"
# What to set, by scheme of the buckets that can hold a store.
CREDENTIALS = {
    S3: "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY on every machine; for AWS_PROFILE, run "
    '`eval "$(aws configure export-credentials --format env)"`',
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS on every machine",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY on every machine",
}
OPTIONS = {"region", "endpoint_override", "scheme"}  # of an s3:// URI, as pyarrow.fs names them
AT_ONCE = 32  # requests
PART = 16 << 20  # bytes: larger files are sent in parts of this size
POLL = 0.5  # seconds before a refused request is sent again
RETRIES = {"max_retries": 4, "retry_timeout": timedelta(minutes=2)}


@dataclass(frozen=True)
class Entry:
    """An object as a listing has it."""

    name: str  # below what was listed
    size: int  # bytes
    etag: str | None
    changed: float  # seconds since the epoch


@dataclass(frozen=True)
class Content:
    """An object with its version."""

    data: bytes
    version: UpdateVersion
    changed: float  # seconds since the epoch, by the server's clock


def is_bucket(place: str | Path) -> bool:
    """Is this the URI of a bucket, and not a folder?

    Raises:
        ValueError: it is a URI of something that cannot hold a store.

    >>> [is_bucket(place) for place in ("runs", "s3://bucket/team", "file:///shared/runs")]
    [False, True, False]
    """
    scheme, colon, _ = str(place).partition("://")
    if not colon or scheme == FILE:
        return False
    if scheme in CREDENTIALS:
        return True
    raise ValueError(
        f"{scheme}:// cannot hold a store; allowed: a folder, file:///..., s3://bucket/prefix of "
        "any server that honours If-None-Match, gs://bucket/prefix, and az://container/prefix"
    )


def folder_of(place: str | Path) -> Path:
    """The folder that a path or a file:// URI means.

    Raises:
        ValueError: the URI names a host, or no folder.

    >>> str(folder_of("file:///shared/runs")), str(folder_of("runs"))
    ('/shared/runs', 'runs')
    """
    text = str(place)
    if not text.startswith(f"{FILE}://"):
        return Path(place)
    found = urlsplit(text)
    if found.netloc or not found.path.strip("/") or found.query:
        raise ValueError(f"{text} is not file:///<absolute folder>")
    return Path(found.path)


def parse(uri: str) -> Remote:
    """A bucket from `s3://bucket/prefix?region=...&endpoint_override=...&scheme=http`.

    Raises:
        ValueError: it means no bucket, or holds a secret.
    """
    found = urlsplit(uri)
    if "@" in found.netloc or "@" in found.query:  # not shown: it would be in a log then
        raise ValueError(
            f"the store's URI holds credentials: leave them out, and {CREDENTIALS[found.scheme]}"
        )
    options = dict(parse_qsl(found.query))
    unknown = options.keys() - (OPTIONS if found.scheme == S3 else set())
    if unknown:
        raise ValueError(
            f"{found.scheme}://{found.netloc}: unknown option {', '.join(sorted(unknown))} in the "
            f"store's URI; allowed: {', '.join(sorted(OPTIONS))} of s3://; for credentials, "
            f"{CREDENTIALS[found.scheme]}"
        )
    if not found.netloc or found.fragment:
        raise ValueError(f"{uri!r} is not {found.scheme}://bucket/prefix")
    endpoint = options.get("endpoint_override")
    if endpoint and "://" not in endpoint:
        endpoint = f"{options.get('scheme', 'https')}://{endpoint}"
    prefix = found.path.strip("/")
    return Remote(found.netloc, prefix, endpoint, options.get("region"), found.scheme)


@dataclass(frozen=True)
class Remote:
    """The objects below one prefix of a bucket. Plain data: it travels to workers."""

    bucket: str
    prefix: str = ""
    endpoint: str | None = None  # None: as the environment says
    region: str | None = None
    scheme: str = S3

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.prefix}".rstrip("/")

    @property
    def uri(self) -> str:
        """With what is needed to find it again."""
        options = {"region": self.region, "endpoint_override": self.endpoint}
        query = "&".join(f"{name}={value}" for name, value in options.items() if value)
        return f"{self}?{query}" if query else str(self)

    # ---------------------------------------------------------------- reading

    def get(self, name: str) -> bytes | None:
        """An object; None: it does not exist."""
        found = self.versioned(name)
        return None if found is None else found.data

    def versioned(self, name: str) -> Content | None:
        """An object and its version; None: it does not exist."""

        def read(bucket: Any) -> Content:
            found = bucket.get(name)
            changed = found.meta["last_modified"].timestamp()
            return Content(bytes(found.bytes()), _version(found.meta), changed)

        return self._ask(read)

    def has(self, name: str) -> bool:
        return self._ask(lambda bucket: bucket.head(name)) is not None

    def download(self, name: str, file: BinaryIO) -> bool:
        """Write an object into a file; False: it does not exist."""

        def read(bucket: Any) -> bool:
            for piece in bucket.get(name):
                file.write(piece)
            return True

        return self._ask(read) is not None

    def listed(self, under: str, after: str = "") -> list[Entry]:
        """The objects below a folder, by name.

        Args:
            after: only names that come after this one.
        """
        offset = f"{under}/{after}" if after else None
        found = self._ask(lambda bucket: bucket.list(under, offset=offset).collect())
        return self._entries(found or [], under)

    def folder(self, under: str) -> tuple[list[str], list[Entry]]:
        """Names of the folders in a folder, and the objects in it."""
        found = self._ask(lambda bucket: bucket.list_with_delimiter(under))
        if found is None:
            return [], []
        folders = [one.rpartition("/")[2] for one in found["common_prefixes"]]
        return sorted(folders), self._entries(found["objects"], under)

    def _entries(self, found: Iterable[Any], under: str) -> list[Entry]:
        above = len(under) + 1 if under else 0
        entries = [
            Entry(one["path"][above:], one["size"], one["e_tag"], one["last_modified"].timestamp())
            for one in found
        ]
        # Without the empty object of the folder's own name that some tools leave.
        return sorted((one for one in entries if one.name), key=lambda one: one.name)

    # ---------------------------------------------------------------- writing

    def put(self, name: str, data: bytes | Path) -> None:
        """Write an object, or a file as one, over what is there."""
        if self._ask(lambda bucket: bucket.put(name, data, chunk_size=PART)) is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(data))

    def put_if(
        self, name: str, data: bytes, condition: UpdateVersion | Literal["create"]
    ) -> UpdateVersion | None:
        """Write an object where none is (`create`), or over one version; the version written.

        Returns:
            None: the object is another. After a lost answer it may be what this call has written.
        """
        done = self._ask(lambda bucket: bucket.put(name, data, mode=condition))
        return None if done is None else _version(done)

    def put_once(self, name: str, data: bytes) -> bool:
        """Write an object if there is none of its name. False: there is, and it is another."""
        while self.put_if(name, data, "create") is None:
            there = self.get(name)
            if there is not None:
                return there == data  # if equal, it is ours, and the answer was lost
            time.sleep(POLL)  # S3 also refuses while another write is under way
        return True

    def delete(self, name: str) -> None:
        self._ask(lambda bucket: bucket.delete(name))

    # ---------------------------------------------------------------- requests

    def _ask(self, do: Callable[[Any], T]) -> T | None:
        """What obstore answers; None: the object does not exist, or a condition does not hold.

        Raises:
            RemoteAway: every other error, as a sentence that says what to do.
        """
        from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

        try:
            return _interruptible(lambda: do(_client(self)))
        except (AlreadyExistsError, PreconditionError):
            return None
        except (BaseError, FileNotFoundError) as problem:
            no_bucket = any(f"<Code>{code}<" in str(problem) for code in NO_BUCKET)
            if isinstance(problem, FileNotFoundError) and not no_bucket:
                return None
            raise RemoteAway(self._sentence(str(problem))) from None

    def _sentence(self, problem: str) -> str:
        text = redacted(problem.partition("\nDebug source")[0]).strip()  # then follow structures
        status, code, message = (
            found[1] if (found := pattern.search(text)) else "" for pattern in ANSWER
        )
        answer = f"({code or status}): {message}" if message else f"({code or status})"
        if code in NO_BUCKET:
            return f"{self}: there is no bucket {self.bucket!r}; create it, or correct the name"
        if any(sign in text for sign in NO_CREDENTIALS):
            return f"{self}: no credentials were found; {CREDENTIALS[self.scheme]}"
        if status in ("401", "403") or code == "ExpiredToken":
            return f"{self}: no permission {answer}; {CREDENTIALS[self.scheme]}"
        if status == "507" or code in FULL:
            return f"{self} is full {answer}; make room there, or give another --store"
        if not status and "HTTP error" in text:
            where = self.endpoint or _environment_endpoint() or self.scheme
            return (
                f"{self}: {where} does not answer ({text.rpartition('HTTP error: ')[2]}): is it "
                "up, can it be reached from here, and is AWS_ENDPOINT_URL right?"
            )
        return f"{self}: {text}"


ANSWER = [
    re.compile(pattern, re.DOTALL)
    for pattern in (r"status code: (\d+)", "<Code>(.*?)</Code>", "<Message>(.*?)</Message>")
]
NO_BUCKET = ("NoSuchBucket", "ContainerNotFound")
FULL = (
    "InsufficientStorage",
    "QuotaExceeded",
    "XMinioStorageFull",
    "XMinioAdminBucketQuotaExceeded",
)
NO_CREDENTIALS = (  # where none are set, the machine's cloud is asked for them at these addresses
    *("/latest/api/token", "/computeMetadata/", "/metadata/identity/"),
    "Account must be specified",
)


def _version(said: Any) -> UpdateVersion:
    """What tells an object from what is later written over it; S3 has tags, Google numbers."""
    version: Any = {name: said[name] for name in ("e_tag", "version") if said[name] is not None}
    found: UpdateVersion = version
    return found


def _environment_endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


@cache
def _client(remote: Remote) -> Any:
    # Imported here: a store in a folder needs none of it.
    from obstore.store import from_url

    config: dict[str, Any] = {}
    client: dict[str, Any] = {"connect_timeout": "5s", "read_timeout": "60s", "timeout": "10min"}
    if remote.scheme == S3:
        config["disable_bulk_delete"] = True  # which some servers do not have
        config |= {"region": remote.region} if remote.region else {}
        endpoint = remote.endpoint or _environment_endpoint()
        if endpoint:
            config["endpoint"] = endpoint
            client["allow_http"] = endpoint.startswith("http://")
    if bundle := os.environ.get("AWS_CA_BUNDLE"):  # as the AWS CLI reads it
        client["root_certificate"] = Path(bundle).read_bytes()
    opened: Any = from_url  # typed for each scheme apart
    return opened(str(remote), config=config, client_options=client, retry_config=RETRIES)


def _interruptible(do: Callable[[], T]) -> T:
    """Run a request so that Ctrl-C ends the wait for it: obstore hears no signal meanwhile."""
    if threading.current_thread() is not threading.main_thread():
        return do()  # signals go to the main thread
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(do())
        except BaseException as problem:
            done.set_exception(problem)

    threading.Thread(target=run, daemon=True).start()
    return done.result()


def side_by_side(do: Callable[[T], object], each: Collection[T]) -> None:
    """Many requests at once; the first that fails is raised."""
    if len(each) < 2:
        for one in each:
            do(one)
        return
    with ThreadPoolExecutor(min(AT_ONCE, len(each))) as threads:
        for _ in threads.map(do, each):
            pass

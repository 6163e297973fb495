"""Objects in a bucket of S3: whole, found by name, and put once where it matters. Knows no store.

`put_once` is what all correctness rests on: of several writers of a name one wins, and all learn
which. boto3 is needed, since nothing else asks a server for that; it is imported when the first
object is. Credentials, region and endpoint come from the environment and files as boto3 reads
them, or region and endpoint from the URI; no secret is ever in one.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlsplit

T = TypeVar("T")

S3, FILE = "s3", "file"
OPTIONS = {"region", "endpoint_override", "scheme"}  # of a URI, as pyarrow.fs names them
AT_ONCE = 16  # requests
LARGE = 64 << 20  # bytes: from here on a file is sent in parts
LOCK_SECONDS = "AIRSWEEP_LOCK_SECONDS"  # after which a silent holder counts as dead
MAX_ATTEMPTS = "AWS_MAX_ATTEMPTS"  # boto3's own
POLL = 0.5  # seconds between looks at somebody else's lock


class RemoteAway(OSError):
    """The bucket cannot be used: nobody answers, it is not there, or it lets us not in."""


@dataclass(frozen=True)
class Entry:
    """An object as a listing has it."""

    name: str  # below what was listed
    size: int  # bytes
    etag: str
    changed: float  # seconds since the epoch


def scheme_of(place: str | Path) -> str:
    """`s3` or `file`, of a URI or a plain path.

    Raises:
        ValueError: it is a URI of something that has no publish-once.

    >>> scheme_of("runs"), scheme_of("s3://bucket/team"), scheme_of("file:///shared/runs")
    ('file', 's3', 'file')
    """
    name, colon, _ = str(place).partition("://")
    if not colon or name == FILE:
        return FILE
    if name == S3:
        return S3
    raise ValueError(
        f"{name}:// has no way to put an object once and for all, which a store needs; allowed: a "
        "folder, file:///..., and s3://bucket/prefix of any server that honours If-None-Match"
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
            "the store's URI holds credentials: leave them out, and set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, on every machine"
        )
    options = dict(parse_qsl(found.query))
    if options.keys() - OPTIONS:
        raise ValueError(
            f"s3://{found.netloc}: unknown option {', '.join(sorted(options.keys() - OPTIONS))} in "
            f"the store's URI; allowed: {', '.join(sorted(OPTIONS))}; credentials come from AWS_* "
            "variables or AWS_PROFILE"
        )
    if not found.netloc or found.fragment:
        raise ValueError(f"{uri!r} is not s3://bucket/prefix")
    endpoint = options.get("endpoint_override")
    if endpoint and "://" not in endpoint:
        endpoint = f"{options.get('scheme', 'https')}://{endpoint}"
    return Remote(found.netloc, found.path.strip("/"), endpoint, options.get("region"))


@dataclass(frozen=True)
class Remote:
    """The objects below one prefix of a bucket. Plain data: it travels to workers."""

    bucket: str
    prefix: str = ""
    endpoint: str | None = None  # None: as the environment says
    region: str | None = None

    def __str__(self) -> str:
        return f"{S3}://{self.bucket}/{self.prefix}".rstrip("/")

    @property
    def uri(self) -> str:
        """With what is needed to find it again."""
        asked = {"region": self.region, "endpoint_override": self.endpoint}
        query = "&".join(f"{name}={value}" for name, value in asked.items() if value)
        return f"{self}?{query}" if query else str(self)

    def below(self, name: str) -> Remote:
        return Remote(self.bucket, self._key(name).strip("/"), self.endpoint, self.region)

    # ---------------------------------------------------------------- reading

    def get(self, name: str) -> bytes | None:
        """An object; None: it is not there."""
        found = self._opened(name)
        return None if found is None else self._asked(found["Body"].read)

    def open(self, name: str) -> Any:
        """An object to be read piece by piece; None: it is not there."""
        found = self._opened(name)
        return None if found is None else found["Body"]

    def tagged(self, name: str) -> tuple[bytes, str, float] | None:
        """An object, its tag, and its age in seconds by the server's own clock."""
        from email.utils import parsedate_to_datetime

        found = self._opened(name)
        if found is None:
            return None
        now = found["ResponseMetadata"]["HTTPHeaders"].get("date")
        asked = parsedate_to_datetime(now).timestamp() if now else time.time()
        age = asked - found["LastModified"].timestamp()
        return self._asked(found["Body"].read), found["ETag"], age

    def has(self, name: str) -> bool:
        return self._there(lambda s3: s3.head_object(**self._at(name))) is not None

    def download(self, name: str, file: Path) -> bool:
        """An object as a file; False: it is not there."""
        body = self.open(name)
        if body is None:
            return False
        with open(file, "wb") as handle:
            while piece := self._asked(lambda: body.read(1 << 20)):
                handle.write(piece)
        return True

    def listed(self, under: str, after: str = "", deep: bool = True) -> Iterator[Entry]:
        """What lies below a folder, by name; without the markers that some tools leave.

        Args:
            after: only names that come after this one.
            deep: also in folders of the folder.
        """
        start = self._key(under).rstrip("/") + "/" if self._key(under) else ""
        asked: dict[str, Any] = {"Bucket": self.bucket, "Prefix": start}
        if after:
            asked["StartAfter"] = start + after
        if not deep:
            asked["Delimiter"] = "/"
        while True:
            page = self._asked(lambda: self._s3.list_objects_v2(**asked))
            for one in page.get("Contents", ()):
                name = one["Key"][len(start) :]
                if name and not name.endswith("/"):
                    yield Entry(name, one["Size"], one["ETag"], one["LastModified"].timestamp())
            if not page.get("IsTruncated"):
                return
            asked["ContinuationToken"] = page["NextContinuationToken"]

    def folders(self, under: str) -> list[str]:
        """Names of the folders in a folder."""
        start = self._key(under).rstrip("/") + "/" if self._key(under) else ""
        asked: dict[str, Any] = {"Bucket": self.bucket, "Prefix": start, "Delimiter": "/"}
        found: list[str] = []
        while True:
            page = self._asked(lambda: self._s3.list_objects_v2(**asked))
            found += [one["Prefix"][len(start) : -1] for one in page.get("CommonPrefixes", ())]
            if not page.get("IsTruncated"):
                return found
            asked["ContinuationToken"] = page["NextContinuationToken"]

    # ---------------------------------------------------------------- writing

    def put(self, name: str, data: bytes) -> str:
        """Write an object over what is there; its tag."""
        done = self._asked(lambda: self._s3.put_object(**self._at(name), Body=data))
        return str(done["ETag"])

    def put_once(self, name: str, data: bytes) -> bool:
        """Write an object if there is none of its name. False: there is, and it is another."""
        if self._put_if(name, data, IfNoneMatch="*") is not None:
            return True
        # An answer that was lost on its way was asked for again: then it is ours that is there.
        return self.get(name) == data

    def put_over(self, name: str, data: bytes, tag: str) -> str | None:
        """Write over the version of a tag; its new tag. None: it is no longer that one."""
        return self._put_if(name, data, IfMatch=tag)

    def send(self, name: str, file: Path) -> None:
        """Write a file as an object, over what is there; a large one in parts."""
        if file.stat().st_size < LARGE:
            self.put(name, file.read_bytes())
        else:
            self._asked(lambda: self._s3.upload_file(str(file), self.bucket, self._key(name)))

    def delete(self, name: str) -> None:
        self._asked(lambda: self._s3.delete_object(**self._at(name)))

    def delete_version(self, name: str, tag: str) -> None:
        """Delete an object unless somebody has written over it."""
        self._there(lambda s3: s3.delete_object(**self._at(name), IfMatch=tag))

    # ---------------------------------------------------------------- asking

    @property
    def _s3(self) -> Any:
        return _client(self.endpoint, self.region)

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix and name else self.prefix or name

    def _at(self, name: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self._key(name)}

    def _opened(self, name: str) -> dict[str, Any] | None:
        return self._there(lambda s3: s3.get_object(**self._at(name)))

    def _put_if(self, name: str, data: bytes, **condition: str) -> str | None:
        while True:
            try:
                with self._told():
                    done = self._s3.put_object(**self._at(name), Body=data, **condition)
                return str(done["ETag"])
            except _Refused as refused:
                # A conflict means that somebody is at it in this moment: look again.
                if refused.code not in ("409", "ConditionalRequestConflict"):
                    return None
                time.sleep(POLL)

    def _there(self, ask: Callable[[Any], dict[str, Any]]) -> dict[str, Any] | None:
        try:
            with self._told():
                return ask(self._s3)
        except _Refused:
            return None

    def _asked(self, ask: Callable[[], T]) -> T:
        with self._told():
            return ask()

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What botocore raises, as one line that says what to do."""
        _need_boto3()
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import (
            BotoCoreError,
            ClientError,
            NoCredentialsError,
            PartialCredentialsError,
            ProfileNotFound,
        )

        try:
            yield
        except (NoCredentialsError, PartialCredentialsError, ProfileNotFound) as problem:
            raise RemoteAway(f"{self}: {problem}; {CREDENTIALS}") from None
        except ClientError as problem:
            code = str(problem.response.get("Error", {}).get("Code", ""))
            if code in ABSENT:
                raise _Refused(code) from None
            raise RemoteAway(self._sentence(code, problem.response)) from None
        except (BotoCoreError, Boto3Error, OSError) as problem:
            where = self.endpoint or _environment_endpoint() or "S3"
            raise RemoteAway(
                f"{self}: {where} does not answer ({type(problem).__name__}): is it up, can it be "
                "reached from here, and is AWS_ENDPOINT_URL right?"
            ) from problem

    def _sentence(self, code: str, response: Any) -> str:
        said = response.get("Error", {}).get("Message", "")
        if code == "NoSuchBucket":
            return f"{self}: there is no bucket {self.bucket!r}; make it, or mind the name"
        if code in DENIED:
            return f"{self}: no permission ({code}): {said}; {CREDENTIALS}"
        if code in NO_ROOM:
            return f"{self} is full ({code}: {said}); make room there, or give another --store"
        return f"{self}: {code}: {said}"


CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, on every machine"
ABSENT = ("NoSuchKey", "404", "412", "PreconditionFailed", "409", "ConditionalRequestConflict")
NO_ROOM = (
    *("507", "InsufficientStorage", "QuotaExceeded"),
    *("XMinioStorageFull", "XMinioAdminBucketQuotaExceeded"),
)
DENIED = ("AccessDenied", "403", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken")


class _Refused(Exception):
    """It is not there, or not the version that was meant."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


def _environment_endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


_making = threading.Lock()  # boto3's session is not safe while it makes a client


def _client(endpoint: str | None, region: str | None) -> Any:
    with _making:
        return _made_client(endpoint, region)


@cache
def _made_client(endpoint: str | None, region: str | None) -> Any:
    import boto3
    from botocore.config import Config

    own = endpoint or _environment_endpoint()
    config = Config(
        retries={"mode": "standard"} | ({} if MAX_ATTEMPTS in os.environ else {"max_attempts": 5}),
        connect_timeout=5,
        read_timeout=60,
        max_pool_connections=2 * AT_ONCE,
        # Servers other than Amazon's know neither the new checksums nor buckets as host names.
        # Our own digests are looked at when a file is read.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={"addressing_style": "path"} if own else {},
    )
    return boto3.session.Session().client(
        "s3", endpoint_url=endpoint, region_name=region, config=config
    )


@cache
def _need_boto3() -> None:
    if importlib.util.find_spec("boto3") is None:
        raise ValueError(
            "a store on s3:// needs boto3, which is not installed; pip install 'airsweep[s3]'"
        )


def side_by_side(do: Callable[[T], object], each: Collection[T]) -> None:
    """Many requests at once; the first that fails is raised."""
    if len(each) < 2:
        for one in each:
            do(one)
        return
    with ThreadPoolExecutor(min(AT_ONCE, len(each))) as threads:
        _drain(threads.map(do, each))


def _drain(each: Iterable[object]) -> None:
    for _ in each:
        pass


# ---------------------------------------------------------------- locks


class Lease:
    """A lock as an object. Its holder renews it; one that has been silent for long is dead.

    Age is read off the server's clock alone. Two may come to hold it after a long silence, so it
    saves work and nothing else may hang on it.
    """

    def __init__(self, remote: Remote, name: str) -> None:
        self.remote, self.name = remote, name
        self.patience = float(os.environ.get(LOCK_SECONDS) or 60)  # seconds
        self._me = uuid.uuid4().hex
        self._tag: str | None = None
        self._renewals = 0
        self._over = threading.Event()
        self._asking = threading.Lock()  # a renewal and a release do not cross

    def take(self) -> bool:
        """Take it if it is free, or its holder dead."""
        tag = self._put_new()
        if tag is None:
            found = self.remote.tagged(self.name)
            if found is None:
                tag = self._put_new() or self._own_tag()
            elif self._is_own(found[0]):
                tag = found[1]
            elif self._dead(*found):
                tag = self._put_over(found[1])
        if tag is None:
            return False
        self._tag = tag
        threading.Thread(target=self._renew, args=(self._over,), daemon=True).start()
        return True

    def wait(self, told: Callable[[float], None] = lambda seconds: None) -> None:
        """Take it as soon as it can be had.

        Args:
            told: seconds so far, again and again.
        """
        started = time.monotonic()
        while not self.take():
            told(time.monotonic() - started)
            time.sleep(POLL)

    def take_from_the_dead(self) -> bool:
        """Take it, where need be after its holder has been silent for long enough to be dead;
        False as soon as he is heard of."""
        held = self.remote.tagged(self.name)
        while not self.take():
            now = self.remote.tagged(self.name)
            if held is not None and now is not None and held[1] != now[1]:
                return False
            held = now
            time.sleep(POLL)
        return True

    def held(self) -> bool:
        """Does somebody alive hold it?"""
        found = self.remote.tagged(self.name)
        return found is not None and not self._dead(*found)

    def release(self) -> None:
        self._over.set()
        with self._asking:
            tag, self._tag = self._tag, None
            if tag is not None:
                self.remote.delete_version(self.name, tag)
        self._over = threading.Event()

    def _put_new(self) -> str | None:
        return self.remote._put_if(self.name, self._content(), IfNoneMatch="*")

    def _put_over(self, tag: str) -> str | None:
        """Renew it, or take it from the dead; its new tag. None: another has it."""
        return self.remote.put_over(self.name, self._content(), tag) or self._own_tag()

    def _own_tag(self) -> str | None:
        """The tag of what is there, if we wrote it.

        A write may succeed although its answer is lost. boto3 then sends it again, and the server
        refuses it because of our own version.
        """
        found = self.remote.tagged(self.name)
        return found[1] if found is not None and self._is_own(found[0]) else None

    def _is_own(self, content: bytes) -> bool:
        try:
            return bool(json.loads(content)["by"] == self._me)
        except (ValueError, KeyError, TypeError):
            return False

    def _content(self) -> bytes:
        self._renewals += 1  # each version has a tag of its own
        said = {"by": self._me, "renewed": self._renewals, "pid": os.getpid()}
        return json.dumps({**said, "host": socket.gethostname(), "machine": _machine()}).encode()

    def _dead(self, content: bytes, tag: str, age: float) -> bool:
        if age > self.patience:
            return True
        try:
            who = json.loads(content)
        except ValueError:
            return False
        return who["machine"] == _machine() and not _alive(who["pid"])

    def _renew(self, over: threading.Event) -> None:
        while not over.wait(self.patience / 4):
            with self._asking:
                if self._tag is None:
                    return  # released in this moment, or somebody took us for dead
                with suppress(RemoteAway):  # the next time, perhaps
                    self._tag = self._put_over(self._tag)


@cache
def _machine() -> str:
    """Where a process id means the same: containers may share a host's name. Else nowhere."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return uuid.uuid4().hex


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

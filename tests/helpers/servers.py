"""Real servers on loopback, for tests that start, kill and restart one, or cut the line to it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import signal
import socket
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from orchestrator.tracking.types import SERVER_ENVIRONMENT, serve_command
from tests.helpers.sweeps import wait_until


class MlflowProcess:
    """A server of MLflow on one port.

    Args:
        log: where it writes.
    """

    def __init__(self, log: Path) -> None:
        self.log, self.port = log, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def _launch(self, command: Sequence[str], env: Mapping[str, str], folder: Path | None) -> None:
        """Start it, and wait until it answers."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                env=env,
                cwd=folder,
                stdout=log,
                stderr=log,
                start_new_session=True,  # its workers go with it
            )
        wait_until(self._answers, self.log.read_text)

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log.read_text()
        with contextlib.suppress(OSError):  # of HTTP, too
            urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
            return True
        return False

    def kill(self) -> None:
        """At once, as a power cut would."""
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def stop(self) -> None:
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(self._process.pid, signal.SIGTERM)
            self._process.wait(timeout=20)
        self.kill()


class MlflowServer(MlflowProcess):
    """Over one store, as `airsweep ui` starts it.

    Args:
        store: a folder whose database and artifacts are shown.
        log: where it writes.
    """

    def __init__(self, store: Path, log: Path) -> None:
        super().__init__(log)
        self.store = store

    def start(self) -> None:
        self.store.mkdir(parents=True, exist_ok=True)
        command = serve_command(self.store, "127.0.0.1", self.port)
        self._launch(command, os.environ | SERVER_ENVIRONMENT | {"OMP_NUM_THREADS": "1"}, None)


class S3Server:
    """On one port, in this process, which keeps what it holds while it is stopped."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # else one line a request
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=self.port, verbose=False)
        self._server.start()

    def stop(self) -> None:
        self._server.stop()

    def make_bucket(self, name: str) -> None:
        self._client().create_bucket(Bucket=name)

    def make_folder(self, bucket: str, name: str) -> None:
        """The empty object by which some tools show a folder."""
        self._client().put_object(Bucket=bucket, Key=name)

    def objects(self, bucket: str) -> dict[str, bytes]:
        """All that is in a bucket."""
        client = self._client()
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
        keys = [found["Key"] for page in pages for found in page.get("Contents", [])]
        return {key: client.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys}

    def _client(self) -> Any:
        import boto3

        # Any key will do for moto; without one, boto3 would look for the role of a machine.
        keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
        return boto3.client("s3", endpoint_url=self.url, region_name="us-east-1", **keys)


Answer = tuple[int, bytes, Mapping[str, str]]  # status, body, headers


def forwarding(url: str) -> type[BaseHTTPRequestHandler]:
    """What passes each request on to a server, and its answer back."""

    class Forwarding(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # connections are kept

        def do_GET(self) -> None:
            answer = self.forward()
            if answer is None:
                self.close_connection = True
                return
            status, body, headers = answer
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_HEAD = do_PUT = do_DELETE = do_POST = do_PATCH = do_GET

        def forward(self) -> Answer | None:
            """The server's answer; None: it is lost."""
            own = ("host", "expect", "connection")
            headers = {
                name: value for name, value in self.headers.items() if name.lower() not in own
            }
            headers.setdefault("Content-Type", "binary/octet-stream")  # urllib's is of a form
            asked = urllib.request.Request(
                url + self.path, self.body() or None, headers, method=self.command
            )
            try:
                answer = urllib.request.urlopen(asked)
            except urllib.error.HTTPError as refusal:
                answer = refusal
            with answer:
                return answer.status, answer.read(), dict(answer.headers)

        def body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def log_message(self, *of: object) -> None:
            pass

    return Forwarding


@contextlib.contextmanager
def counting_requests(server: S3Server, requests: list[str]) -> Iterator[str]:
    """The address of the same server, which notes each request: method and path."""

    class Counting(forwarding(server.url)):  # type: ignore[misc]
        def forward(self) -> Answer | None:
            requests.append(f"{self.command} {self.path}")
            return super().forward()

    with served(Counting) as url:
        yield url


@contextlib.contextmanager
def full_bucket(server: S3Server) -> Iterator[str]:
    """The address of the same server when its disk has no room: what is there can be read, and
    each write gets MinIO's answer."""

    class Full(forwarding(server.url)):  # type: ignore[misc]
        def forward(self) -> Answer | None:
            if self.command not in ("PUT", "DELETE"):
                return super().forward()
            self.body()
            said = "Storage backend has reached its minimum free drive threshold."
            body = f"<Error><Code>XMinioStorageFull</Code><Message>{said}</Message></Error>"
            return 507, body.encode(), {"Content-Type": "application/xml"}

    with served(Full) as url:
        yield url


@contextlib.contextmanager
def losing_answers(server: S3Server, to_lose: list[str]) -> Iterator[str]:
    """The address of the same server behind a line that breaks.

    Args:
        to_lose: ends of names. A write to one takes effect, but its answer is lost; then the end is
            removed from the list.
    """

    class Losing(forwarding(server.url)):  # type: ignore[misc]
        def forward(self) -> Answer | None:
            found = super().forward()
            lost = next((end for end in to_lose if self.path.endswith(end)), None)
            if lost is None or self.command != "PUT" or found[0] != 200:
                return found
            to_lose.remove(lost)
            return None

    with served(Losing) as url:
        yield url


@contextlib.contextmanager
def in_trouble(url: str, trouble: list[str]) -> Iterator[str]:
    """The address of a server of MLflow that may be in trouble.

    Args:
        trouble: holds `away`: requests get no answer; `busy`: they get that of a server whose pool
            of connections to its database is used up.
    """
    busy = {"error_code": "BAD_REQUEST", "message": "QueuePool limit of size 1 overflow 0 reached"}

    class Troubled(forwarding(url)):  # type: ignore[misc]
        def forward(self) -> Answer | None:
            if not trouble:
                return super().forward()
            self.body()
            if "away" in trouble:
                return None
            return 400, json.dumps(busy).encode(), {"Content-Type": "application/json"}

    with served(Troubled) as address:
        yield address


@contextlib.contextmanager
def served(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """A small HTTP server on loopback; its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def free_port() -> int:
    """Below those that the system gives to whoever asks: one of these may be given away before the
    server that it is meant for has bound it."""
    for port in random.sample(range(20000, 32768), 1000):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port")

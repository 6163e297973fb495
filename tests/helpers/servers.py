"""Real servers on loopback, for tests that start, kill and restart servers or break connections."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import signal
import socket
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from orchestrator.tracking.database import SERVER_ENVIRONMENT, check_database, serve_command
from orchestrator.tracking_uri import DATABASE
from tests.helpers.sweeps import wait_until


class ServerProcess:
    """The process of a server, with its workers.

    Args:
        log: file for its output.
    """

    def __init__(self, log: Path) -> None:
        self.log, self.port = log, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def _launch(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        """Start the process, and wait until the server responds."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                env=env,
                cwd=self.log.parent,
                stdout=log,
                stderr=log,
                start_new_session=True,  # so that `kill` ends its workers too
            )
        wait_until(self._answers, self.log.read_text)

    def _answers(self) -> bool:
        assert self._process.poll() is None, self.log.read_text()
        with contextlib.suppress(Exception):
            urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
            return True
        return False

    def kill(self) -> None:
        """Kill the server and its workers with SIGKILL."""
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


class MlflowServer(ServerProcess):
    """The MLflow server of a store, as `airsweep ui` starts it.

    Args:
        store: folder with the database and the artifacts.
        log: file for its output.
    """

    def __init__(self, store: Path, log: Path) -> None:
        super().__init__(log)
        self.store = store

    def start(self) -> None:
        self.store.mkdir(parents=True, exist_ok=True)
        if (database := self.store / DATABASE).exists():
            check_database(database)
        command = serve_command(self.store, self.port)
        self._launch(command, os.environ | SERVER_ENVIRONMENT | {"OMP_NUM_THREADS": "1"})


class S3Server:
    """An S3 server (moto) in this process. It keeps its objects while it is stopped."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        from moto.server import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
        from werkzeug.serving import make_server

        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # no line per request
        app = one_write_at_a_time(DomainDispatcherApplication(create_backend_app))

        def bound() -> bool:
            # After `stop`, the port may be busy for a moment; werkzeug then exits.
            with contextlib.suppress(SystemExit):
                self._server = make_server(
                    "127.0.0.1", self.port, app, threaded=True, request_handler=MotoRequestHandler
                )
                return True
            return False

        wait_until(bound, lambda: f"port {self.port} is in use")
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def make_bucket(self, name: str) -> None:
        self._client().create_bucket(Bucket=name)

    def _client(self) -> Any:
        import boto3

        # moto accepts any key. Without one, boto3 searches for the role of a cloud machine.
        keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
        return boto3.client("s3", endpoint_url=self.url, region_name="us-east-1", **keys)


def one_write_at_a_time(app: Any) -> Any:
    """A WSGI application that handles its writes one after another.

    moto checks If-None-Match and If-Match before it stores an object, in threads and without a
    lock, so two concurrent conditional writes could both succeed.
    """
    writing = threading.Lock()

    def serialized(environ: dict[str, Any], start_response: Any) -> Any:
        if environ["REQUEST_METHOD"] in ("GET", "HEAD"):
            return app(environ, start_response)
        with writing:
            return app(environ, start_response)

    return serialized


Response = tuple[int, bytes, Mapping[str, str]]  # status, body, headers
# Receives method and path of a request, and a function that forwards it and returns the response of
# the server; returns the response, or None to close the connection without one.
Respond = Callable[[str, str, Callable[[], Response]], Response | None]


@contextlib.contextmanager
def proxy(url: str, respond: Respond) -> Iterator[str]:
    """URL of a proxy to the server at `url`."""

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # persistent connections

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            response = respond(self.command, self.path, lambda: self.forward(body))
            if response is None:
                self.close_connection = True
                return
            status, content, headers = response
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_HEAD = do_PUT = do_DELETE = do_POST = do_PATCH = do_GET

        def forward(self, body: bytes) -> Response:
            own = ("host", "expect", "connection")
            headers = {
                name: value for name, value in self.headers.items() if name.lower() not in own
            }
            headers.setdefault("Content-Type", "binary/octet-stream")  # instead of urllib's default
            request = urllib.request.Request(
                url + self.path, body or None, headers, method=self.command
            )
            try:
                response = urllib.request.urlopen(request)
            except urllib.error.HTTPError as error:
                response = error
            with response:
                return response.status, response.read(), dict(response.headers)

        def log_message(self, *arguments: object) -> None:
            pass

    with serve(Proxy) as address:
        yield address


def full_bucket(server: S3Server) -> contextlib.AbstractContextManager[str]:
    """URL of a proxy that behaves like MinIO on a full disk: reads succeed, writes fail."""
    message = "Storage backend has reached its minimum free drive threshold."
    body = f"<Error><Code>XMinioStorageFull</Code><Message>{message}</Message></Error>"
    full = 507, body.encode(), {"Content-Type": "application/xml"}
    return proxy(
        server.url,
        lambda method, path, forward: full if method in ("PUT", "DELETE") else forward(),
    )


def failing_server(url: str, trouble: list[str]) -> contextlib.AbstractContextManager[str]:
    """URL of a proxy to an MLflow server that can fail.

    Args:
        trouble: empty, or contains `away`: requests get no response; or `denied`: they get that of
            a server with logins to a wrong password.
    """
    denied = 401, b"You are not authenticated.", {"WWW-Authenticate": 'Basic realm="mlflow"'}

    def respond(method: str, path: str, forward: Callable[[], Response]) -> Response | None:
        if not trouble:
            return forward()
        return None if "away" in trouble else denied

    return proxy(url, respond)


@contextlib.contextmanager
def serve(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """URL of an HTTP server on loopback."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def free_port() -> int:
    """A free port below the ephemeral range. The system could assign an ephemeral port to another
    process before the server binds it. The order is not that of the tests' seed, which would be the
    same in all workers of pytest-xdist."""
    for port in random.SystemRandom().sample(range(20000, 32768), 1000):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port")

"""Services of a team, on loopback: Postgres with passwords, MLflow with users, S3."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.helpers.documents import ROOT, blocks
from tests.helpers.servers import S3Server, ServerProcess
from tests.helpers.sweeps import run_command

ADMIN = "admin"
OWNER = "postgres"  # Debian's user; initdb refuses root


def _programs() -> Path | None:
    """The folder of initdb and postgres, which Debian keeps off the PATH."""
    installed = Path("/usr/lib/postgresql").glob("*/bin")
    debian = sorted(installed, key=lambda folder: int(folder.parent.name), reverse=True)
    initdb = shutil.which("initdb")
    for folder in [*([Path(initdb).resolve().parent] if initdb else []), *debian]:
        if (folder / "initdb").exists() and (folder / "postgres").exists():
            return folder
    return None


PROGRAMS = _programs()
DRIVERS = find_spec("psycopg") is not None and find_spec("flask_wtf") is not None
MISSING = (
    "postgres is missing: apt-get install -y --no-install-recommends postgresql"
    if PROGRAMS is None
    else "psycopg or Flask-WTF is missing: pip install 'airsweep[server]'"
)
IS_INSTALLED = PROGRAMS is not None and DRIVERS


class PostgresServer(ServerProcess):
    """A server on a port of loopback, not run by root; every user has a password."""

    stops_at = signal.SIGINT  # without waiting for clients to disconnect

    def __init__(self) -> None:
        assert PROGRAMS is not None, MISSING
        # Not in pytest's folder, which the user `postgres` cannot read.
        self.folder = Path(tempfile.mkdtemp(prefix="airsweep-pg-"))
        super().__init__(self.folder / "log")
        self.password = secrets.token_hex(12)  # of the superuser

    def start(self) -> None:
        self._initialize()
        paths = ["-D", str(self.folder / "data"), "-p", str(self.port), "-k", str(self.folder)]
        settings = ["-c", "listen_addresses=127.0.0.1", "-F"]  # -F: no fsync
        command = [*_as_owner(), str(PROGRAMS / "postgres"), *paths, *settings]
        self._launch(command, os.environ, self.folder)

    def _connect(self) -> None:
        self.connect("postgres").close()

    def _initialize(self) -> None:
        secret = self.folder / "secret"
        secret.write_text(self.password)
        if os.geteuid() == 0:
            for path in (self.folder, secret):
                shutil.chown(path, OWNER)
        login = ["--auth=scram-sha-256", f"--pwfile={secret}", "--username=postgres"]
        arguments = ["-D", str(self.folder / "data"), *login, "--no-sync", "--encoding=UTF8"]
        command = [*_as_owner(), str(PROGRAMS / "initdb"), *arguments, "--locale=C"]
        run_command(command, cwd=self.folder)
        secret.unlink()

    def connect(self, database: str) -> Any:
        import psycopg

        return psycopg.connect(
            host="127.0.0.1",
            port=self.port,
            user="postgres",
            password=self.password,
            dbname=database,
            connect_timeout=60,
            autocommit=True,
        )

    def query(self, query: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        with contextlib.closing(self.connect(database)) as connection:
            cursor = connection.cursor()
            cursor.execute(query)
            return list(cursor.fetchall()) if cursor.description else []

    def dump(self, database: str) -> dict[str, str]:
        """All rows as text, by table."""
        query = "SELECT tablename FROM pg_tables WHERE schemaname = 'public'"
        names = [str(name) for (name,) in self.query(query, database)]
        return {name: repr(self.query(f'SELECT * FROM "{name}"', database)) for name in names}

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)


def _as_owner() -> list[str]:
    """Prefix of a command that root must run as another user."""
    if os.geteuid() != 0:
        return []
    entry = pwd.getpwnam(OWNER)
    user = [f"--reuid={entry.pw_uid}", f"--regid={entry.pw_gid}", "--clear-groups"]
    return ["setpriv", *user, "--"]


class TeamServer(ServerProcess):
    """MLflow with users, on Postgres and S3, started as docs/tracking.md describes.

    Args:
        postgres: a running server with the databases of that page.
        s3: a running server with the bucket `mlflow`.
        folder: folder with the files of that page, and for the log.
    """

    def __init__(self, postgres: PostgresServer, s3: S3Server, folder: Path) -> None:
        super().__init__(folder / "mlflow.log")
        self.folder = folder
        self.admin = secrets.token_hex(12)
        self.environment = {
            **shell_environment(),
            "OMP_NUM_THREADS": "1",
            "PGHOST": "127.0.0.1",
            "PGPORT": f"{postgres.port}",
            "PORT": f"{self.port}",
            "WORKERS": "1",
            "BUCKET": "s3://mlflow/team",
            "NAMES": f"127.0.0.1:{self.port}",
            "MLFLOW_AUTH_ADMIN_PASSWORD": self.admin,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(16),
            "MLFLOW_S3_ENDPOINT_URL": s3.url,
            "AWS_ACCESS_KEY_ID": "server",
            "AWS_SECRET_ACCESS_KEY": secrets.token_hex(12),
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def start(self) -> None:
        self._launch(["bash", "serve.sh"], self.environment, self.folder)

    def post(self, path: str, body: Any, user: str = ADMIN, password: str | None = None) -> Any:
        """Post JSON and return the JSON of the answer."""
        request = urllib.request.Request(
            f"{self.url}/{path}",
            json.dumps(body).encode(),
            {
                "Content-Type": "application/json",
                "Authorization": basic(user, password or self.admin),
            },
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read() or b"{}")

    def make_user(self, name: str) -> dict[str, str]:
        """Create a user; returns the environment variables of its clients."""
        password = secrets.token_hex(12)
        self.post("api/2.0/mlflow/users/create", {"username": name, "password": password})
        return {
            "MLFLOW_TRACKING_URI": self.url,
            "MLFLOW_TRACKING_USERNAME": name,
            "MLFLOW_TRACKING_PASSWORD": password,
        }

    def make_experiment(self, name: str) -> str:
        answer = self.post("api/2.0/mlflow/experiments/create", {"name": name})
        return str(answer["experiment_id"])

    def grant(self, user: str, experiment: str, permission: str) -> None:
        self.post(
            "api/3.0/mlflow/users/permissions/grant",
            {
                "username": user,
                "resource_type": "experiment",
                "resource_id": experiment,
                "permission": permission,
            },
        )


def shell_environment() -> dict[str, str]:
    """Environment for the scripts of docs/tracking.md: PATH has `python` and Postgres' programs."""
    path = [str(Path(sys.executable).parent), str(PROGRAMS), os.environ["PATH"]]
    root = str(Path(__file__).parents[2])
    return {**os.environ, "PATH": os.pathsep.join(path), "PYTHONPATH": root}


def write_files(folder: Path) -> None:
    """Write the files that docs/tracking.md shows."""
    for block in blocks(ROOT / "docs" / "tracking.md"):
        if block.file:
            (folder / block.file).write_text(block.text)


def basic(user: str, password: str) -> str:
    return f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"


@contextlib.contextmanager
def team(folder: Path) -> Iterator[Team]:
    """Start all services."""
    with contextlib.ExitStack() as stack:
        postgres = PostgresServer()
        stack.callback(postgres.close)
        postgres.start()
        write_files(folder)
        login = {"PGHOST": "127.0.0.1", "PGPORT": f"{postgres.port}", "PGUSER": "postgres"}
        subprocess.run(
            ["bash", "databases.sh"],
            cwd=folder,
            env={**shell_environment(), **login, "PGPASSWORD": postgres.password},
            check=True,
        )
        lines = (folder / "pgpass").read_text().split()
        passwords = {line.split(":")[3]: line.split(":")[4] for line in lines}
        s3 = S3Server()
        s3.start()
        stack.callback(s3.stop)
        s3.make_bucket("mlflow")
        mlflow = TeamServer(postgres, s3, folder)
        stack.callback(mlflow.stop)
        mlflow.start()
        yield Team(postgres, mlflow, s3, passwords)


@dataclass
class Team:
    """Running services."""

    postgres: PostgresServer
    mlflow: TeamServer
    s3: S3Server
    passwords: Mapping[str, str]

    @property
    def secrets(self) -> list[str]:
        """Passwords that no file or output may contain."""
        return [self.postgres.password, self.mlflow.admin, *self.passwords.values()]

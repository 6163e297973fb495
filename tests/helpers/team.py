"""What a team shares, for real and on loopback: Postgres with passwords, MLflow with users."""

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
from tests.helpers.servers import MlflowProcess, S3Server, free_port
from tests.helpers.sweeps import wait_until

ADMIN = "admin"
OWNER = "postgres"  # Debian's user; initdb refuses root


def _programs() -> Path | None:
    """The folder of initdb and postgres, which Debian keeps off the PATH."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda at: int(at.parent.name))
    found = shutil.which("initdb")
    folders = [*([Path(found).resolve().parent] if found else []), *reversed(debian)]
    whole = [at for at in folders if (at / "initdb").exists() and (at / "postgres").exists()]
    return whole[0] if whole else None


PROGRAMS = _programs()
DRIVERS = find_spec("psycopg") is not None and find_spec("flask_wtf") is not None
MISSING = (
    "postgres is not here: apt-get install -y --no-install-recommends postgresql"
    if PROGRAMS is None
    else "psycopg or Flask-WTF is not here: pip install 'airsweep[server]'"
)
HERE = PROGRAMS is not None and DRIVERS


class PostgresServer:
    """In a folder of its own, on one port of loopback, never as root; every user has a password."""

    def __init__(self) -> None:
        assert PROGRAMS is not None, MISSING
        self.port = free_port()
        # Not below pytest's folder, which other users may not enter.
        self.folder = Path(tempfile.mkdtemp(prefix="airsweep-pg-"))
        self.password = secrets.token_hex(12)  # of its superuser
        self._process: subprocess.Popen[bytes] | None = None
        self._made = False

    def start(self) -> None:
        if not self._made:
            self._make()
        assert PROGRAMS is not None
        where = ["-D", str(self.folder / "data"), "-p", str(self.port), "-k", str(self.folder)]
        settings = ["-c", "listen_addresses=127.0.0.1", "-F"]  # -F: no waiting for the disk
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*_as_owner(), str(PROGRAMS / "postgres"), *where, *settings],
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd=self.folder,
            )
        wait_until(self._answers, (self.folder / "log").read_text)

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self.folder / "log").read_text()
        with contextlib.suppress(Exception), contextlib.closing(self.connect("postgres")):
            return True
        return False

    def _make(self) -> None:
        assert PROGRAMS is not None
        secret = self.folder / "secret"
        secret.write_text(self.password)
        if os.geteuid() == 0:
            for path in (self.folder, secret):
                shutil.chown(path, OWNER)
        ways = ["--auth=scram-sha-256", f"--pwfile={secret}", "--username=postgres"]
        arguments = ["-D", str(self.folder / "data"), *ways, "--no-sync", "--encoding=UTF8"]
        subprocess.run(
            [*_as_owner(), str(PROGRAMS / "initdb"), *arguments, "--locale=C"],
            check=True,
            capture_output=True,
            cwd=self.folder,
        )
        secret.unlink()
        self._made = True

    def connect(self, database: str) -> Any:
        import psycopg

        return psycopg.connect(
            host="127.0.0.1",
            port=self.port,
            user="postgres",
            password=self.password,
            dbname=database,
            connect_timeout=5,
            autocommit=True,
        )

    def ask(self, query: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        with contextlib.closing(self.connect(database)) as connection:
            cursor = connection.cursor()
            cursor.execute(query)
            return list(cursor.fetchall()) if cursor.description else []

    def make_database(self, name: str) -> str:
        """A database with an owner of the same name; return the owner's password."""
        password = secrets.token_hex(12)
        self.ask(f"CREATE ROLE {name} LOGIN PASSWORD '{password}'")
        self.ask(f"CREATE DATABASE {name} OWNER {name}")
        return password

    def uri(self, database: str) -> str:
        """Without a password, which libpq finds in the environment."""
        return f"postgresql://{database}@127.0.0.1:{self.port}/{database}"

    def connections_of(self, user: str) -> int:
        query = f"SELECT count(*) FROM pg_stat_activity WHERE usename = '{user}'"
        return int(self.ask(query)[0][0])

    def dump(self, database: str) -> dict[str, str]:
        """All rows as text, by table."""
        query = "SELECT tablename FROM pg_tables WHERE schemaname = 'public'"
        names = [str(name) for (name,) in self.ask(query, database)]
        return {name: repr(self.ask(f'SELECT * FROM "{name}"', database)) for name in names}

    def kill(self) -> None:
        """At once, as a power cut would; what was committed stays."""
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def stop(self) -> None:
        """As an administrator would who does not wait for clients to go."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.kill(self._process.pid, signal.SIGINT)
            self._process.wait(timeout=20)
        self.kill()

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)


def _as_owner() -> list[str]:
    """What goes before a command that root may not run."""
    if os.geteuid() != 0:
        return []
    entry = pwd.getpwnam(OWNER)
    who = [f"--reuid={entry.pw_uid}", f"--regid={entry.pw_gid}", "--clear-groups"]
    return ["setpriv", *who, "--"]


class TeamServer(MlflowProcess):
    """MLflow over Postgres and S3, as docs/tracking.md starts it: users, files by the server alone.

    Args:
        postgres: running, with the databases of that page.
        s3: running, with the bucket `mlflow`.
        folder: with the files of that page, for its log.
    """

    def __init__(self, postgres: PostgresServer, s3: S3Server, folder: Path) -> None:
        super().__init__(folder / "mlflow.log")
        self.folder = folder
        self.admin = secrets.token_hex(12)
        self.environment = {
            **reader(),
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
        """What the server answers to JSON."""
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
        """What a client of that user has in its environment."""
        password = secrets.token_hex(12)
        self.post("api/2.0/mlflow/users/create", {"username": name, "password": password})
        return {
            "MLFLOW_TRACKING_URI": self.url,
            "MLFLOW_TRACKING_USERNAME": name,
            "MLFLOW_TRACKING_PASSWORD": password,
        }

    def make_experiment(self, name: str) -> str:
        asked = {"name": name}
        found = self.post("api/2.0/mlflow/experiments/create", asked)
        return str(found["experiment_id"])

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


def reader() -> dict[str, str]:
    """The environment of who follows docs/tracking.md: `python` and Postgres' programs are found."""
    assert PROGRAMS is not None
    path = [str(Path(sys.executable).parent), str(PROGRAMS), os.environ["PATH"]]
    root = str(Path(__file__).parents[2])
    return {**os.environ, "PATH": os.pathsep.join(path), "PYTHONPATH": root}


def write_files(folder: Path) -> None:
    """Those that docs/tracking.md shows."""
    for block in blocks(ROOT / "docs" / "tracking.md"):
        if block.file:
            (folder / block.file).write_text(block.text)


def basic(user: str, password: str) -> str:
    return f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"


@contextlib.contextmanager
def team(folder: Path) -> Iterator[Team]:
    """All of it, running."""
    with contextlib.ExitStack() as stack:
        postgres = PostgresServer()
        stack.callback(postgres.close)
        postgres.start()
        write_files(folder)
        whose = {"PGHOST": "127.0.0.1", "PGPORT": f"{postgres.port}", "PGUSER": "postgres"}
        subprocess.run(
            ["bash", "databases.sh"],
            cwd=folder,
            env={**reader(), **whose, "PGPASSWORD": postgres.password},
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
    def studies(self) -> str:
        """Where Optuna's studies go."""
        return self.postgres.uri("airsweep_studies")

    @property
    def secrets(self) -> list[str]:
        """Words that must stand nowhere."""
        return [self.postgres.password, self.mlflow.admin, *self.passwords.values()]

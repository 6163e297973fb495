"""The command that serves a store's MLflow runs, and the check of its network access."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path

from orchestrator.errors import Refused
from orchestrator.tracking_uri import ARTIFACTS, DATABASE

# Environment variables of MLflow.
AUTH_CONFIG, AUTH_SECRET = "MLFLOW_AUTH_CONFIG_PATH", "MLFLOW_FLASK_SERVER_SECRET_KEY"
# Environment of `serve_command`: no job runner beside the server, no telemetry, no deprecation
# warnings of MLflow's own code.
SERVER_ENVIRONMENT = {
    "PYTHONWARNINGS": "ignore",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def serve_command(
    store: Path,
    host: str = "127.0.0.1",
    port: int = 5000,
    auth: bool = False,
    allowed_hosts: str | None = None,
) -> list[str]:
    """The command that starts an MLflow server over a store's database and artifacts.

    Run it with SERVER_ENVIRONMENT and in a new process group: MLflow's worker process keeps the
    port if only the main process is killed. Call `check_exposure` before.
    """
    folder = store.resolve()
    return [
        *(sys.executable, "-m", "mlflow", "server"),
        *("--host", host, "--port", str(port), "--workers", "1"),
        *("--uvicorn-opts", "--log-level warning"),  # no line for each request
        *("--backend-store-uri", f"sqlite:///{folder / DATABASE}"),
        *("--serve-artifacts", "--artifacts-destination", str(folder / ARTIFACTS)),
        *(("--app-name", "basic-auth") if auth else ()),
        *(("--allowed-hosts", allowed_hosts) if allowed_hosts else ()),
    ]


def check_exposure(host: str, auth: bool, allowed_hosts: str | None) -> None:
    """Check that only intended clients can reach an MLflow server.

    A server without `--auth` lets every client read, change and delete all runs.

    Args:
        host: the address on which the server listens.
        auth: whether the server requires a login.
        allowed_hosts: the host names that the server accepts.

    Raises:
        Refused: the server would be open to the network, or accept any host name.
        ValueError: `auth` is set, and MLflow's settings for it are missing.
    """
    if not is_loopback(host) and not auth:
        raise Refused(
            f"--host {host} allows every client on the network to read, change and delete all "
            "runs; add --auth, or keep 127.0.0.1 and connect with "
            "`ssh -L 5000:127.0.0.1:5000 THIS_MACHINE` (docs/security.md)"
        )
    if not is_loopback(host) and not allowed_hosts:
        raise Refused(
            f"--host {host} needs --allowed-hosts NAME:PORT, the address that browsers use; "
            "without it, other web pages could send requests through a visitor's browser"
        )
    if auth:
        _check_auth()


def is_loopback(host: str) -> bool:
    """Whether a host is this machine alone.

    >>> [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "::", "box")]
    [True, True, True, False, False, False]
    """
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:  # a host name, which can resolve to any address
        return False


def _check_auth() -> None:
    """Check that MLflow can start with logins.

    Raises:
        ValueError: a package, the secret or the configuration file is missing.
    """
    if find_spec("flask_wtf") is None:
        raise ValueError("--auth needs the extra `auth` of MLflow: pip install 'mlflow[auth]'")
    if not os.environ.get(AUTH_SECRET):
        raise ValueError(
            f"--auth needs {AUTH_SECRET}, the key that signs web forms; set it to a long random "
            "text, such as the output of `openssl rand -hex 32`"
        )
    if not Path(os.environ.get(AUTH_CONFIG, "")).is_file():
        raise ValueError(
            f"--auth needs {AUTH_CONFIG}, the path of a file with the user database and the "
            "default permission; docs/security.md has a template"
        )

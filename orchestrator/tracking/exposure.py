"""May a server be reached by others? MLflow serves whoever reaches it, unless it has users."""

from __future__ import annotations

import os
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path

from orchestrator.errors import Refused

# MLflow's own.
AUTH_CONFIG, AUTH_SECRET = "MLFLOW_AUTH_CONFIG_PATH", "MLFLOW_FLASK_SERVER_SECRET_KEY"


def check_exposure(host: str, auth: bool, allowed_hosts: str | None) -> None:
    """Whoever reaches a server without users reads, changes and deletes all runs.

    Raises:
        Refused: that would be everybody.
        ValueError: users are asked for, and something is missing for them.
    """
    if not is_loopback(host) and not auth:
        raise Refused(
            f"--host {host} lets everybody who reaches this machine read, change and delete all "
            "runs; add --auth, or stay on 127.0.0.1 and reach it by "
            "`ssh -L 5000:127.0.0.1:5000 THIS_MACHINE` (docs/security.md)"
        )
    if not is_loopback(host) and not allowed_hosts:
        raise Refused(
            f"--host {host} needs --allowed-hosts NAME:PORT, the name by which browsers reach it: "
            "else a foreign page could use a visitor's browser"
        )
    if auth:
        _check_auth()


def is_loopback(host: str) -> bool:
    """
    >>> [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "::", "box")]
    [True, True, True, False, False, False]
    """
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:  # a name, which may mean anything
        return False


def _check_auth() -> None:
    """
    Raises:
        ValueError: MLflow would not start with users.
    """
    if find_spec("flask_wtf") is None:
        raise ValueError("--auth needs MLflow's own extra: pip install 'mlflow[auth]'")
    if not os.environ.get(AUTH_SECRET):
        raise ValueError(
            f"--auth needs {AUTH_SECRET}, by which forms are signed: a long random text, such as "
            "`openssl rand -hex 32` prints"
        )
    if not Path(os.environ.get(AUTH_CONFIG, "")).is_file():
        raise ValueError(
            f"--auth needs {AUTH_CONFIG}, a file that says where users are kept and what they may "
            "do; docs/security.md has one to begin with"
        )

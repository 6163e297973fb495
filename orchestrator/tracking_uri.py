"""Tracking URIs: the MLflow to which a sweep logs. This module does not import MLflow."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

# Both are inside the folder of the store.
DATABASE = "mlflow.db"
ARTIFACTS = "mlartifacts"


def effective_uri(uri: str | None, store: Path) -> str:
    """The given tracking URI, else MLFLOW_TRACKING_URI, else a database file in the store."""
    return uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{store.resolve() / DATABASE}"


def uri_kind(uri: str) -> Literal["none", "http", "sqlite"]:
    """The kind of a tracking URI.

    Raises:
        ValueError: the URI is not supported.
    """
    scheme, _, rest = uri.partition(":")
    match scheme:
        case "none":
            return "none"
        case "http" | "https":
            return "http"
        case "sqlite" if rest.startswith("///") and rest != "///":
            return "sqlite"
    # Show only the scheme: the address of a database often contains a password.
    raise ValueError(
        f"the tracking URI {scheme}:... is not supported; allowed: http(s)://<server>, "
        "sqlite:///<file>, none; another database is used through an MLflow server"
    )


def resolve_uri(uri: str | None, store: Path) -> tuple[str, Path | None]:
    """The URI of MLflow and, for a database file, its path.

    Raises:
        ValueError: the URI is not supported, or tracking is off.
    """
    uri = effective_uri(uri, store)
    match uri_kind(uri):
        case "none":
            raise ValueError("tracking is off; set the address of MLflow with --tracking-uri")
        case "http":
            return uri, None
        case "sqlite":
            database = Path(uri.removeprefix("sqlite:///")).absolute()
            return f"sqlite:///{database}", database

"""Tracking URIs: which MLflow a sweep logs to. Imports no MLflow."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

DATABASE = "mlflow.db"  # both lie in the store's folder and move with it


ARTIFACTS = "mlartifacts"


def uri_of(uri: str | None, store: Path) -> str:
    """The tracking URI: as given, else MLFLOW_TRACKING_URI, else a file in the store's folder."""
    return uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{store.resolve() / DATABASE}"


def kind_of(uri: str) -> Literal["none", "http", "sqlite"]:
    """Where a tracking URI leads; imports no MLflow.

    Raises:
        ValueError: nowhere.
    """
    scheme, _, rest = uri.partition(":")
    match scheme:
        case "none":
            return "none"
        case "http" | "https":
            return "http"
        case "sqlite" if rest.startswith("///") and rest != "///":
            return "sqlite"
    raise ValueError(_unknown(scheme, uri))


def _unknown(scheme: str, uri: str) -> str:
    # Only the scheme is repeated: a database's address often holds a password.
    known = "known: http(s)://<server>, sqlite:///<file>, none"
    if scheme == "jsonl":
        return (
            "the tracker that wrote lines of JSON was removed: use --tracking-uri none, and "
            f"`airsweep mlflow reconcile` fills any MLflow from the store later; {known}"
        )
    if scheme in ("postgresql", "mysql", "mssql") or scheme.startswith(("postgresql+", "mysql+")):
        return (
            f"the tracking uri is a {scheme} database, which only a server should write to: run "
            f"`mlflow server --backend-store-uri ...` and give its http address; {known}"
        )
    if scheme == "file" or ":" not in uri:
        return (
            "the tracking uri is a folder, and MLflow no longer keeps runs in folders; "
            f"give sqlite:///<file> instead; {known}"
        )
    return f"unknown tracking uri {scheme}:...; {known}"


def resolved(uri: str | None, store: Path) -> tuple[str, Path | None]:
    """MLflow's address and, where that is a file, its path.

    Raises:
        ValueError: the URI is of another kind, or switches tracking off.
    """
    uri = uri_of(uri, store)
    match kind_of(uri):
        case "none":
            raise ValueError("tracking is off here; give an MLflow with --tracking-uri")
        case "http":
            return uri, None
        case "sqlite":
            database = Path(uri.removeprefix("sqlite:///")).absolute()
            return f"sqlite:///{database}", database

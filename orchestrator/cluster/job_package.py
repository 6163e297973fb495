"""Job package: a folder with the sweep file and the code, and the job's environment variables.

The package is built in an empty folder, so that data, weights, results and passwords beside the
sweep file are never sent by accident. This module does not use Ray.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from orchestrator.errors import Refused
from orchestrator.files import ROOT
from orchestrator.git import PACKAGES, commit
from orchestrator.planning import SweepRequest
from orchestrator.planning.requests import project_of, relative_store_error
from orchestrator.redact import contains_secret, without_credentials
from orchestrator.spec import cells_of
from orchestrator.spec.sweep import split_name
from orchestrator.store import is_bucket, store_folder, user_name
from orchestrator.store.buckets import parse
from orchestrator.tracking_uri import uri_kind

# Seconds from SIGTERM to SIGKILL, 3 by default: the driver needs time to close the event log and
# the tracker. The variable of a job overrides that of the head.
STOP_WAIT = {"RAY_JOB_STOP_WAIT_TIME_S": "60"}


def is_checkout() -> bool:
    """Whether this code runs from a checkout, with pyproject.toml beside the packages."""
    return (ROOT / "pyproject.toml").is_file()


def pack(request: SweepRequest, folder: Path) -> str:
    """Write a job package into an empty folder, with the code if this is a checkout.

    Returns:
        Path of the sweep file in the package.

    Raises:
        Refused: a plugin lies outside of the folder of the sweep file.
    """
    for package in PACKAGES if is_checkout() else ():
        ignored = shutil.ignore_patterns(".*", "__pycache__")
        shutil.copytree(ROOT / package, folder / package, ignore=ignored)
    spec = f"sweeps/{Path(request.spec.source).name}"
    (folder / "sweeps").mkdir()
    (folder / spec).write_bytes(request.spec.text.encode())
    for plugin in request.spec.plugins:
        file = folder / "sweeps" / plugin.name
        if not file.resolve().is_relative_to((folder / "sweeps").resolve()):
            raise Refused(
                f"the plugin {plugin.name} is outside of the folder of {request.spec.source}; "
                "put it beside the sweep file or below"
            )
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(plugin.text.encode())
    return spec


# ---------------------------------------------------------------- paths


def job_options(
    request: SweepRequest, store: str, data_root: Path | None, tracking_uri: str | None
) -> list[str]:
    """The options of the command of a job: store, data and tracker, as every node sees them.

    Raises:
        Refused: a path is relative. A job runs in a temporary copy of its working directory.
        ValueError: an address is invalid or contains a password.
    """
    if is_bucket(store):
        parse(store)
    elif not store_folder(store).is_absolute():
        raise relative_store_error(store)
    words = ["--store", store]
    paths = sorted(_input_paths(request))
    if data_root is not None:
        paths.insert(0, ("--data-root", str(data_root), str(data_root)))
        words += ["--data-root", str(data_root)]
    if uri := tracking_uri or os.environ.get("MLFLOW_TRACKING_URI"):
        _check_tracking(uri)
        words += ["--tracking-uri", uri]
    for key, name, path in paths:
        if not Path(path).is_absolute():
            raise Refused(
                f"{key}: {name!r} is relative, but a Ray job runs in another folder, without your "
                "data; give an absolute path that every node sees (docs/datasets.md shows how to "
                "put datasets and models there)"
            )
    return [*words, *request.options]


def _check_tracking(uri: str) -> None:
    if without_credentials(uri) != uri:
        raise ValueError(
            "the tracking URI contains a password, which Ray's dashboard would show with the job; "
            "leave it out, and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the "
            "environment of the cluster"
        )
    if uri_kind(uri) == "sqlite" and not Path(uri.removeprefix("sqlite:///")).is_absolute():
        raise Refused(
            f"the tracking URI {uri!r} is relative, but Ray deletes the working directory of a job "
            "at its end; give http://<server>, or an absolute path"
        )


def _input_paths(request: SweepRequest) -> set[tuple[str, str, str]]:
    """Key, value and path of every file or folder that a sweep refers to."""
    keys = ("dataset", "test_dataset", "backbone", "generator")
    cells = cells_of(request.spec)
    values = {(key, str(cell.flat.get(key) or "")) for cell in cells for key in keys}
    located = request.spec.folders
    paths = {(key, value, path_in_name(key, located.get(value, value))) for key, value in values}
    return {(key, value, path) for key, value, path in paths if path}


def path_in_name(key: str, name: str) -> str | None:
    """The path in the name of a dataset or model; None if the name contains no path.

    >>> path_in_name("dataset", "folder:x"), path_in_name("backbone", "ViT-B-32@clip.pt")
    ('x', 'clip.pt')
    >>> path_in_name("generator", "stabilityai/sdxl-turbo"), path_in_name("generator", "./sd15")
    (None, './sd15')
    """
    before, path = split_name(name)
    if before == "folder:" or (before and key == "backbone"):
        return path
    is_path = name.startswith((".", "~", "/")) or name.count("/") > 1 or os.path.isdir(name)
    return name if is_path and name != "tiny" and not key.endswith("dataset") else None


# ---------------------------------------------------------------- variables


def job_variables(request: SweepRequest, env: Iterable[str]) -> dict[str, str]:
    """Environment variables of a job.

    Args:
        env: NAME of a variable of this process, or NAME=VALUE.

    Raises:
        ValueError: a variable is not set, or looks like a secret.
    """
    passed = {"AIRSWEEP_PROJECT": project_of(request.spec), "AIRSWEEP_USER": user_name()}
    # Another commit does not describe the code that is installed on the cluster.
    if is_checkout():
        passed["AIRSWEEP_COMMIT"] = commit()
    return {**STOP_WAIT, **passed, **dict(map(_variable, env))}


def _variable(option: str) -> tuple[str, str]:
    name, equals_sign, value = option.partition("=")
    if not name:
        raise ValueError("--env: the name is missing; allowed: NAME, or NAME=VALUE")
    if not equals_sign and name not in os.environ:
        raise ValueError(f"--env {name}: not set on this machine; set it, or write {name}=VALUE")
    value = value if equals_sign else os.environ[name]
    if contains_secret(name, value):
        raise ValueError(  # the message must not contain the value
            f"--env {name}: this looks like a secret, and Ray shows the variables of a job to all "
            "users of the cluster; set it in the environment of the cluster's nodes, or give the "
            "path of a file that they mount"
        )
    return name, value

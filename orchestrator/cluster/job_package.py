"""The package of a job: a folder with the sweep file and the code, and some variables.

The folder is made for the job and holds nothing else, so data, weights, results and passwords that
lie beside the file cannot be sent by accident. Knows no Ray.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import Refused
from orchestrator.files import ROOT
from orchestrator.git import PACKAGES, SENT_DIFF, UNKNOWN, commit, dirty, uncommitted
from orchestrator.planning import SweepRequest
from orchestrator.planning.requests import lost_store, project_of
from orchestrator.redact import shows_secret, without_credentials
from orchestrator.spec import cells_of
from orchestrator.store import folder_of, is_bucket, whoami
from orchestrator.store.buckets import parse
from orchestrator.tracking_uri import kind_of

LIMIT = 100 << 20  # bytes that the head of a cluster takes
# Seconds from SIGTERM to SIGKILL, 3 otherwise. It goes before what the head was started with, and
# nobody waits longer than a driver needs.
STOP_WAIT = {"RAY_JOB_STOP_WAIT_TIME_S": "60"}


def is_checkout() -> bool:
    """Do the packages lie beside their pyproject.toml?"""
    return (ROOT / "pyproject.toml").is_file()


def sends_code(option: str | None) -> bool:
    """What `--code` means; by default the code of a checkout is sent.

    Raises:
        ValueError: nothing, or what is not here.
    """
    allowed = ("checkout", "installed") if is_checkout() else ("installed",)
    if option not in (None, *allowed):
        raise ValueError(f"--code {option}: allowed here: {', '.join(allowed)}")
    return is_checkout() and option != "installed"


def pack(asked: SweepRequest | None, folder: Path, code: bool) -> str:
    """Put what a job needs into an empty folder.

    Args:
        asked: its sweep, if it has one.
        code: with the code of this checkout.

    Returns:
        The sweep file, as the job names it; empty: there is none.

    Raises:
        Refused: it is more than a cluster takes.
    """
    files = {file.relative_to(ROOT): file for file in _code_files()} if code else {}
    sizes = {name: file.stat().st_size / 2**20 for name, file in files.items()}
    if sum(sizes.values()) > LIMIT / 2**20:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
        raise Refused(
            f"the code is {sum(sizes.values()):.0f} MB, and a cluster takes {LIMIT >> 20} MB; "
            f"largest: {', '.join(f'{name} {sizes[name]:.0f} MB' for name in largest)}; move what "
            f"is no code out of {' and '.join(PACKAGES)}, or give --code installed where the "
            "cluster has airsweep"
        )
    for name, file in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / name)
    if code and (diff := uncommitted()):
        (folder / SENT_DIFF).write_bytes(diff)
    if asked is None:
        return ""
    spec = f"sweeps/{Path(asked.spec.source).name}"
    (folder / "sweeps").mkdir()
    (folder / spec).write_bytes(asked.spec.text.encode())
    return spec


def _code_files() -> Iterator[Path]:
    """With the ranges of what the code needs, which `doctor` reads."""
    yield ROOT / "pyproject.toml"
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*"):
            parts = path.relative_to(ROOT).parts
            if path.is_file() and not any(part.startswith((".", "__pycache__")) for part in parts):
                yield path


# ---------------------------------------------------------------- places


@dataclass(frozen=True)
class Destination:
    """Where a job works, as every node sees it."""

    store: str
    data_root: str | None
    tracking_uri: str | None


def destination(
    asked: SweepRequest, store: str, data_root: Path | None, tracking_uri: str | None
) -> Destination:
    """Where a job is to work.

    Raises:
        Refused: a path that is relative, so lost in a job.
        ValueError: a place that is none, or that holds a password.
    """
    if is_bucket(store):
        parse(store)
    elif not folder_of(store).is_absolute():
        raise lost_store(store)
    if not asked.spec.tracking_uri:
        tracking_uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    for uri in filter(None, (tracking_uri, asked.spec.tracking_uri)):
        _check_tracking(uri)
    data = data_root or asked.spec.data_root
    if data is not None:
        _check(str(data), "data_root", str(data))
    for key, name, path in sorted(_named_paths(asked)):
        _check(path, key, name)
    return Destination(store, str(data_root) if data_root else None, tracking_uri)


def _check_tracking(uri: str) -> None:
    if without_credentials(uri) != uri:
        raise ValueError(
            "the tracking uri holds a password, and what a job is given is shown by Ray's "
            "dashboard; leave it out, and set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD in the environment of the cluster"
        )
    if kind_of(uri) == "sqlite" and not Path(uri.removeprefix("sqlite:///")).is_absolute():
        raise Refused(
            f"the tracking uri {uri!r} is relative, and the working directory of a Ray job is "
            f"thrown away at the end; give http://<server>, or an absolute path"
        )


def _check(path: str, key: str, name: str) -> None:
    if not Path(path).is_absolute():
        raise Refused(
            f"{key}: {name!r} is relative to a folder of this machine, and a Ray job has another "
            f"one, without data; give an absolute path that every node sees (docs/data.md shows "
            "how to put data and models there)"
        )


def _named_paths(asked: SweepRequest) -> set[tuple[str, str, str]]:
    """Key, value and path of every file or folder that a sweep names."""
    keys = ("dataset", "test_dataset", "backbone", "generator")
    named = {(key, str(cell.flat.get(key) or "")) for cell in cells_of(asked.spec) for key in keys}
    return {(key, name, path) for key, name in named if (path := path_in(key, name))}


def path_in(key: str, name: str) -> str | None:
    """The path in a name of data or weights; None where it is no path.

    >>> path_in("dataset", "folder:my_images"), path_in("backbone", "ViT-B-32@clip.pt")
    ('my_images', 'clip.pt')
    >>> path_in("backbone", "ViT-B-32/openai"), path_in("generator", "./sd15")
    (None, './sd15')
    """
    if name.startswith("folder:"):
        return name.removeprefix("folder:")
    if key.endswith("dataset"):
        return None
    before, at, file = name.partition("@")
    if key == "backbone" and at and "/" not in before:
        return file
    is_path = name.startswith((".", "~", "/")) or name.count("/") > 1 or os.path.isdir(name)
    return name if is_path and name != "tiny" else None


# ---------------------------------------------------------------- variables


def variables(asked: SweepRequest, code: bool, env: Iterable[str]) -> dict[str, str]:
    """The environment of a job.

    Args:
        code: the code of this checkout is sent.
        env: NAME of a variable of this process, or NAME=VALUE.

    Raises:
        ValueError: one is not set, or looks like a secret.
    """
    passed = {"AIRSWEEP_PROJECT": project_of(asked.spec), "AIRSWEEP_USER": whoami()}
    known = commit()
    # Of another code than this one, its cluster knows more.
    if code and known != UNKNOWN:
        passed |= {"AIRSWEEP_COMMIT": known, "AIRSWEEP_DIRTY": dirty(uncommitted())}
    return {**STOP_WAIT, **passed, **dict(map(_variable, env))}


def _variable(option: str) -> tuple[str, str]:
    name, given, value = option.partition("=")
    if not name:
        raise ValueError("--env: allowed: NAME, or NAME=VALUE")
    if not given and name not in os.environ:
        raise ValueError(f"--env {name}: it is not set here; set it, or write {name}=VALUE")
    value = value if given else os.environ[name]
    if shows_secret(name, value):
        raise ValueError(  # without the value
            f"--env {name}: it looks like a secret, and Ray shows the variables of a job to all "
            "who reach the cluster; set it in the environment of the cluster's nodes, or give the "
            "path of a file that they mount"
        )
    return name, value

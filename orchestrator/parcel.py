"""What travels with a job: a folder with the sweep file and the code, and some variables.

The folder is made for the job and holds nothing else, so data, weights, results and passwords that
lie beside the file cannot be sent by accident. Knows no Ray.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from orchestrator.asked import Asked
from orchestrator.lineage import PACKAGES, ROOT, SENT_DIFF, UNKNOWN, commit, dirty, uncommitted
from orchestrator.place import Refused, lost_store, project_of, whoami
from orchestrator.redact import shows_secret
from orchestrator.remote import folder_of, is_bucket, parse
from orchestrator.store import smoke_store
from orchestrator.sweep import cells_of
from orchestrator.tracking import kind_of, without_credentials

Code = Literal["checkout", "installed"]

LIMIT_MB = 100  # that the head of a cluster takes, MiB to be exact; Ray's own limit
NAMED = 3  # largest files, where it is too much
NOT_CODE = "__pycache__"

# Seconds from SIGTERM to SIGKILL, 3 otherwise. It goes before what the head was started with, and
# nobody waits longer than a driver needs.
STOP_WAIT = {"RAY_JOB_STOP_WAIT_TIME_S": "60"}


@dataclass(frozen=True)
class Parcel:
    """A job's working directory, staged on this machine."""

    folder: Path
    spec: str  # the sweep file, as the job names it; empty: there is none
    code: Code
    files: int
    size: int  # bytes

    def __str__(self) -> str:
        what = "and the code of this checkout" if self.code == "checkout" else "without code"
        count = f"{self.files} file{'s' * (self.files != 1)}, {self.size / 2**20:.1f} MB"
        return f"{count}: the sweep file {what}"


# ---------------------------------------------------------------- the folder


def code_here() -> Code:
    """`checkout` where the packages lie beside their pyproject.toml."""
    return "checkout" if (ROOT / "pyproject.toml").is_file() else "installed"


def code_named(name: str | None) -> Code:
    """What `--code` means.

    Raises:
        ValueError: nothing, or what is not here.
    """
    if name not in (None, "checkout", "installed"):
        raise ValueError(f"--code {name}: allowed: checkout, installed")
    if name == "checkout" and code_here() != "checkout":
        raise ValueError(f"--code checkout: {ROOT} is none; allowed here: installed")
    return "installed" if name == "installed" else code_here()


def pack(asked: Asked | None, folder: Path, code: Code) -> Parcel:
    """Put what the job needs into an empty folder.

    Args:
        asked: its sweep, if it has one.

    Raises:
        Refused: it is more than a cluster takes.
    """
    found = sorted(_code_files()) if code == "checkout" else []
    spec = "" if asked is None else f"sweeps/{Path(asked.spec.source).name}"
    written = {} if asked is None else {spec: asked.spec.text.encode()}
    size = sum(path.stat().st_size for path in found) + sum(map(len, written.values()))
    if size > LIMIT_MB << 20:
        largest = sorted(found, key=lambda path: path.stat().st_size)[: -NAMED - 1 : -1]
        named = ", ".join(f"{path} {path.stat().st_size / 2**20:.0f} MB" for path in largest)
        raise Refused(
            f"the code is {size / 2**20:.0f} MB, and a cluster takes {LIMIT_MB} MB; largest: "
            f"{named}; move what is no code out of {' and '.join(PACKAGES)}, or give --code "
            "installed where the cluster has airsweep"
        )
    for path in found:
        place = folder / path.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)
    if code == "checkout" and (diff := uncommitted()):
        written[SENT_DIFF] = diff
    for name, content in written.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return Parcel(folder, spec, code, len(found) + len(written), size)


def _code_files() -> Iterator[Path]:
    """With the ranges of what the code needs, by which `doctor` looks."""
    yield ROOT / "pyproject.toml"
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*"):
            parts = path.relative_to(ROOT).parts
            hidden = any(part.startswith(".") or part == NOT_CODE for part in parts)
            if path.is_file() and not hidden:
                yield path


# ---------------------------------------------------------------- places


@dataclass(frozen=True)
class Destination:
    """Where a job works, as every node sees it."""

    store: str
    data_root: str | None
    tracking_uri: str | None


def destination(
    asked: Asked, store: str, data_root: Path | None, tracking_uri: str | None
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
    for key, name, path in _named_paths(asked):
        _check(path, key, name)
    return Destination(store, str(data_root) if data_root else None, tracking_uri)


def store_of(asked: Asked, store: str) -> str:
    """What the results of a sweep go to: a smoke run has a store of its own."""
    return str(smoke_store(store) if asked.smoke else store).rstrip("/")


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


def _named_paths(asked: Asked) -> Iterator[tuple[str, str, str]]:
    """Key, value and path of every file or folder that a sweep names."""
    seen: dict[tuple[str, str], None] = {}
    for cell in cells_of(asked.spec):
        for key in ("dataset", "test_dataset", "backbone", "generator"):
            if cell.flat.get(key) is not None:
                seen[key, str(cell.flat[key])] = None
    for key, name in seen:
        path = path_in(key, name)
        if path is not None:
            yield key, name, path


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


def variables(asked: Asked, code: Code, env: Iterable[str]) -> dict[str, str]:
    """The environment of a job.

    Args:
        env: NAME of a variable of this process, or NAME=VALUE.

    Raises:
        ValueError: one is not set, or looks like a secret.
    """
    passed = {"AIRSWEEP_PROJECT": project_of(asked.spec), "AIRSWEEP_USER": whoami()}
    known = commit()
    # Of another code than this one, its cluster knows more.
    if code == "checkout" and known != UNKNOWN:
        passed |= {"AIRSWEEP_COMMIT": known, "AIRSWEEP_DIRTY": dirty(uncommitted())}
    return {**STOP_WAIT, **passed, **dict(_asked_for(env, os.environ))}


def _asked_for(env: Iterable[str], here: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for option in env:
        name, given, value = option.partition("=")
        if not name:
            raise ValueError("--env: allowed: NAME, or NAME=VALUE")
        if not given and name not in here:
            raise ValueError(f"--env {name}: it is not set here; set it, or write {name}=VALUE")
        value = value if given else here[name]
        if shows_secret(name, value):
            raise ValueError(  # without the value
                f"--env {name}: it looks like a secret, and Ray shows the variables of a job to "
                "all who reach the cluster; set it in the environment of the cluster's nodes, or "
                "give the path of a file that they mount"
            )
        yield name, value

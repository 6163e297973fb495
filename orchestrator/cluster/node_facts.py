"""Facts about one machine of a cluster, as plain data: versions, code, store, inputs, GPU.

`node_facts` travels to a machine by value, so that it runs where another airsweep is installed, or
none: it uses the standard library, and imports airsweep only inside of `try`. It judges nothing
(`node_checks.py`).
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any

from orchestrator.store import ArtifactStore
from orchestrator.store.backends import BucketBackend

LIBRARIES = (
    *("ray", "torch", "open_clip_torch", "diffusers", "peft", "transformers"),
    *("numpy", "safetensors"),
)
PACKAGES = ("air_core", "orchestrator")
TOKENS = ".nodes-"  # begins the name of a folder in the store, while nodes are checked
DRIVER, HERE = "driver", "here"  # files in it: the driver's token, and its own answer
TOKEN_BYTES = 1 << 16  # of each such file: a disk with a quota may still take a few bytes
STALE = 3600.0  # seconds after which a token was left by a driver that was killed
VISIBLE = 2.0  # seconds until a network disk shows a file of another machine
SAMPLE, ENDS = 200, 1 << 16  # files of an input that are read; bytes at both ends of each

Facts = dict[str, Any]
Input = tuple[str, str]  # role (dataset, backbone, generator) and name


@dataclass(frozen=True)
class Needed:
    """What a sweep needs of each machine."""

    inputs: tuple[Input, ...] = ()
    data_root: Path | None = None
    gpus: bool = False
    bytes_left: int = 0  # that are still to be made


def node_facts(store: str, token: str, node: str, needed: Needed, use_gpu: bool) -> Facts:
    """What the machine that this runs on has, as plain data.

    Args:
        store: folder, or URI of a bucket.
        token: what the driver has written there.
        node: name of the file in which this machine answers.
        use_gpu: let torch compute on a GPU.
    """
    return {
        "versions": {"python": python_version(), **{name: _version(name) for name in LIBRARIES}},
        "code": _code_digests(),
        "store": _answer(store, token, node),
        "files": [_input_facts(role, name, needed.data_root) for role, name in needed.inputs],
        "gpu": _gpu_problem() if use_gpu else None,
    }


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return ""


def _code_digests() -> dict[str, str]:
    """Digests of airsweep's modules; empty where it is not installed."""
    found = {}
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            folder = Path(spec.origin).parent
            for file in folder.rglob("*.py"):
                digest = hashlib.blake2b(file.read_bytes(), digest_size=6).hexdigest()
                found[f"{package}/{file.relative_to(folder).as_posix()}"] = digest
    return found


def _answer(store: str, token: str, node: str) -> Facts:
    """Read the driver's token in the store, and write the answer beside it."""
    facts: Facts = {"exists": True, "token": False, "error": "", "where": store, "free": None}
    try:
        if "://" in store:
            from orchestrator.store.backends import copy_folder
            from orchestrator.store.buckets import parse

            folder = copy_folder(parse(store))
        else:
            folder = Path(store)
            facts["exists"] = folder.is_dir()
        existing = next(one for one in (folder, *folder.parents) if one.exists())
        facts |= {"where": str(folder), "free": shutil.disk_usage(existing).free}
        facts["token"] = has_token(store, token, DRIVER)
        if facts["token"]:
            write_token(store, token, node)
    except OSError as problem:
        facts["error"] = problem.strerror or str(problem)
    except Exception as problem:  # of the airsweep that is installed there
        facts["error"] = str(problem)
    return facts


def has_token(store: str, token: str, name: str) -> bool:
    """Does a file in the store hold the token, or will it soon?"""
    deadline = time.monotonic() + VISIBLE
    while (found := _read(store, f"{TOKENS}{token}/{name}")) is None:
        if time.monotonic() > deadline:
            return False
        time.sleep(VISIBLE / 8)
    return found.startswith(token.encode())


def _read(store: str, path: str) -> bytes | None:
    if "://" in store:
        from orchestrator.store.buckets import parse

        return parse(store).get(path)
    try:
        return Path(store, path).read_bytes()
    except FileNotFoundError:
        return None


def write_token(store: str, token: str, name: str) -> None:
    """Write the token into a file in the store."""
    path, data = f"{TOKENS}{token}/{name}", token.ljust(TOKEN_BYTES).encode()
    if "://" in store:
        from orchestrator.store.buckets import parse

        parse(store).put(path, data)
        return
    with open(Path(store, path), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _input_facts(role: str, name: str, data_root: Path | None) -> Facts:
    """The digest of an input, without reading gigabytes."""
    try:
        if role == "dataset":
            from air_core.datasets import get_dataset

            files = get_dataset(name).files(data_root)
        else:
            from orchestrator.planning.resolve import input_files

            _, files = input_files(role, name)
        return {"count": len(files), "digest": _sample_digest(sorted(files))}
    except Exception as problem:  # of the airsweep that is installed there
        return {"problem": str(problem)}


def _sample_digest(files: Sequence[Path]) -> str:
    """Of names, sizes and both ends: weights of one shape have equal sizes, and other ends."""
    step = -(-len(files) // SAMPLE) or 1
    common = os.path.commonpath([file.parent for file in files])
    digest = hashlib.blake2b(digest_size=8)
    for file in files[::step]:
        length = file.stat().st_size
        digest.update(f"{file.relative_to(common)} {length}\n".encode())
        with open(file, "rb") as handle:
            digest.update(handle.read(ENDS))
            handle.seek(max(ENDS, length - ENDS))
            digest.update(handle.read(ENDS))
    return digest.hexdigest()


def _gpu_problem() -> str:
    """Why torch cannot use a GPU; empty: it can, or others have taken its memory."""
    try:
        import torch

        if not torch.cuda.is_available():
            return f"torch {torch.__version__} sees none"
        with suppress(torch.cuda.OutOfMemoryError):
            torch.ones(8, device="cuda").sum().item()
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}".partition("\n")[0]
    return ""


# ---------------------------------------------------------------- the driver's token


@contextmanager
def store_token(store: ArtifactStore) -> Iterator[str]:
    """Write a random token into the store for as long as the block lasts.

    A machine that reads it there, and whose answer the driver reads, works in the same store as the
    driver, and not in another one of the same name.

    Raises:
        OSError: it cannot be written, or a bucket does not answer.
    """
    token, root = uuid.uuid4().hex, store.root
    made = [one for one in (root, *root.parents) if not one.exists()]
    try:
        _remove_tokens(store, "")
        if not isinstance(store.backend, BucketBackend):
            (root / f"{TOKENS}{token}").mkdir(parents=True)
        write_token(store.name, token, DRIVER)
        yield token
    finally:
        _remove_tokens(store, token)
        with suppress(OSError):  # another driver works there by now
            for folder in made:
                folder.rmdir()


def _remove_tokens(store: ArtifactStore, token: str) -> None:
    """Remove the files of one token, or, where it is empty, those of killed drivers."""
    oldest = time.time() - STALE
    if not isinstance(store.backend, BucketBackend):
        for folder in store.root.glob(f"{TOKENS}{token or '*'}"):
            with suppress(FileNotFoundError):  # its own driver has removed it
                if token or folder.stat().st_mtime < oldest:
                    shutil.rmtree(folder, ignore_errors=True)
        return
    remote = store.backend.remote
    for name in remote.folder("")[0]:
        if name.startswith(f"{TOKENS}{token}"):
            for entry in remote.listed(name):
                if token or entry.changed < oldest:
                    remote.delete(f"{name}/{entry.name}")

"""Node facts: versions, code, store, inputs and GPU of one machine, as plain data.

Ray sends the function `node_facts` to each node by value. The function therefore also runs if
another airsweep or none is installed there: it uses the standard library, and imports airsweep only
inside `try`. `node_checks.py` compares the facts.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any

from orchestrator.plugins import Plugin
from orchestrator.store import ArtifactStore
from orchestrator.store.backends import BucketBackend

LIBRARIES = (
    *("ray", "torch", "open_clip_torch", "diffusers", "peft", "transformers"),
    *("numpy", "safetensors"),
    "pillow-heif",  # without it a machine lists fewer images
)
PACKAGES = ("air_core", "orchestrator")
TOKENS = ".nodes-"  # prefix of a folder in the store that exists while nodes are checked
DRIVER, DRIVER_ANSWER = "driver", "here"  # files in it: the driver's token and the driver's answer
TOKEN_BYTES = 1 << 16  # size of such a file; a full quota may still accept a few bytes
STALE = 3600.0  # seconds; older tokens were left by killed drivers
VISIBLE = 2.0  # seconds until a network disk shows a file of another machine
HUB_VARIABLES = ("HF_HOME", "HF_HUB_CACHE")  # folders of models that have no path in a sweep
SAMPLE, ENDS = 200, 1 << 16  # files of an input to read; bytes to read at both ends of a file

Facts = dict[str, Any]
Input = tuple[str, str]  # role (dataset, backbone, generator) and name


@dataclass(frozen=True)
class NodeRequirements:
    """What a sweep requires of each node."""

    inputs: tuple[Input, ...] = ()
    data_root: Path | None = None
    gpus: bool = False
    bf16: tuple[str, ...] = ()  # settings that require bf16 of GPUs
    # The largest model that generators run on GPUs: its weights in words, GPUs of an actor, bytes.
    model: tuple[str, float, int] | None = None
    bytes_left: int = 0  # expected size of the missing artifacts
    plugins: tuple[Plugin, ...] = ()  # which may define the inputs


def node_facts(store: str, token: str, node: str, needs: NodeRequirements, use_gpu: bool) -> Facts:
    """Collect facts about the machine that runs this function.

    Args:
        store: folder, or URI of a bucket.
        token: random token that the driver has written into the store.
        node: name of the file in which this machine answers.
        needs: names the inputs to compare.
        use_gpu: let torch compute on a GPU.
    """
    return {
        "versions": {"python": python_version(), **{name: _version(name) for name in LIBRARIES}},
        "code": _code_digests(),
        "store": _answer(store, token, node),
        "temporary": _used_share(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()),
        "hub": {name: os.environ[name] for name in HUB_VARIABLES if name in os.environ},
        "files": [_input_facts(role, name, needs) for role, name in needs.inputs],
        "gpu": _gpu_problem() if use_gpu else None,
        "smallest_gpu": _smallest_gpu() if use_gpu else None,
    }


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return ""


def _code_digests() -> dict[str, str]:
    """Digests of airsweep's modules; empty if airsweep is not installed."""
    digests = {}
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            folder = Path(spec.origin).parent
            for file in folder.rglob("*.py"):
                digest = hashlib.blake2b(file.read_bytes(), digest_size=6).hexdigest()
                digests[f"{package}/{file.relative_to(folder).as_posix()}"] = digest
    return digests


def _answer(store: str, token: str, node: str) -> Facts:
    """Read the driver's token in the store and write the same token as this node's answer."""
    facts: Facts = {"exists": True, "token": False, "error": "", "where": store, "free": None}
    try:
        if "://" in store:
            from orchestrator.store.backends import copy_folder
            from orchestrator.store.buckets import parse

            folder = copy_folder(parse(store))
        else:
            folder = Path(store)
            facts["exists"] = folder.is_dir()
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        facts |= {"where": str(folder), "free": shutil.disk_usage(existing).free}
        facts["token"] = has_token(store, token, DRIVER)
        if facts["token"]:
            write_token(store, token, node)
    except OSError as problem:
        facts["error"] = problem.strerror or str(problem)
    except Exception as problem:  # the airsweep of this node may differ from the driver's
        facts["error"] = str(problem)
    return facts


def _used_share(folder: str) -> tuple[str, float]:
    """The folder, and the used share of its disk; 0 if unknown."""
    with suppress(OSError):
        disk = shutil.disk_usage(folder)
        return folder, disk.used / disk.total
    return folder, 0.0


def has_token(store: str, token: str, name: str) -> bool:
    """Whether a file in the store contains the token; waits VISIBLE seconds for the file."""
    deadline = time.monotonic() + VISIBLE
    while (content := _read(store, f"{TOKENS}{token}/{name}")) is None:
        if time.monotonic() > deadline:
            return False
        time.sleep(VISIBLE / 8)
    return content.startswith(token.encode())


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


def _input_facts(role: str, name: str, needs: NodeRequirements) -> Facts:
    """Number of files of an input and a digest of samples: reading all would take too long."""
    try:
        if needs.plugins:
            from orchestrator.plugins import use_plugins

            use_plugins(needs.plugins)
        if role == "dataset":
            from air_core.datasets import get_dataset

            files = get_dataset(name).files(needs.data_root)
        else:
            from orchestrator.stages.inputs import input_files

            _, files = input_files(role, name)
        return {"count": len(files), "digest": _sample_digest(sorted(files))}
    except Exception as problem:  # the airsweep of this node may differ from the driver's
        return {"problem": str(problem)}


def _sample_digest(files: Sequence[Path]) -> str:
    """Digest of names, sizes and both ends of up to SAMPLE files.

    Sizes alone do not distinguish two sets of weights with the same shapes.
    """
    step = -(-len(files) // SAMPLE) or 1
    common = os.path.commonpath([file.parent for file in files] or [Path("/")])
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
    """Why torch cannot use a GPU; empty if it can, or if the GPU's memory is in use."""
    try:
        import torch

        if not torch.cuda.is_available():
            return f"torch {torch.__version__} sees none"
        with suppress(torch.cuda.OutOfMemoryError):
            torch.ones(8, device="cuda").sum().item()
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}".partition("\n")[0]
    return ""


def _smallest_gpu() -> tuple[int, float] | None:
    """Memory and computing capability of the smallest GPU; None: unknown."""
    try:
        from orchestrator.planning.resources import smallest_gpu

        return smallest_gpu()
    except Exception:  # the airsweep of this node may differ from the driver's
        return None


# ---------------------------------------------------------------- the driver's token


@contextmanager
def store_token(store: ArtifactStore) -> Iterator[str]:
    """Keep a random token in the store while the block runs.

    If a node can read the token and the driver can read the node's answer, both use the same store.
    Equal paths are not enough: they may be separate folders on two machines.

    Raises:
        OSError: the store is not writable, or the bucket does not answer.
    """
    token, root = uuid.uuid4().hex, store.root
    new_folders = [path for path in (root, *root.parents) if not path.exists()]
    try:
        _remove_tokens(store, "")
        if not isinstance(store.backend, BucketBackend):
            (root / f"{TOKENS}{token}").mkdir(parents=True)
        write_token(store.name, token, DRIVER)
        yield token
    finally:
        _remove_tokens(store, token)
        with suppress(OSError):  # not empty: another driver uses the store now
            for folder in new_folders:
                folder.rmdir()


def _remove_tokens(store: ArtifactStore, token: str) -> None:
    """Remove the files of a token; of the empty token, those that killed drivers left."""
    oldest = time.time() - STALE
    if not isinstance(store.backend, BucketBackend):
        for folder in store.root.glob(f"{TOKENS}{token or '*'}"):
            with suppress(FileNotFoundError):  # the driver of the token has removed it
                if token or folder.stat().st_mtime < oldest:
                    shutil.rmtree(folder, ignore_errors=True)
        return
    remote = store.backend.client
    for name in remote.folder("")[0]:
        if name.startswith(f"{TOKENS}{token}"):
            for entry in remote.list_objects(name):
                if token or entry.modified < oldest:
                    remote.delete(f"{name}/{entry.name}")

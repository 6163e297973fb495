"""Node facts: code, store, inputs and GPU of one machine, as plain data.

Ray sends the function `node_facts` to each node by value. The function therefore also runs if
another airsweep or none is installed there: it uses the standard library, and imports airsweep only
inside `try`. `node_checks.py` compares the facts.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any

from orchestrator.plugins import Plugin
from orchestrator.store import ArtifactStore

LIBRARIES = (
    *("ray", "torch", "open_clip_torch", "diffusers", "peft", "transformers"),
    *("numpy", "safetensors"),
    "pillow-heif",  # without it a machine lists fewer images
)
PACKAGES = ("air_core", "orchestrator")
# Start of the names of files in the store that exist while nodes are checked. `cache gc` removes
# those of killed drivers.
TOKENS = "unfinished/.nodes-"
DRIVER, DRIVER_ANSWER = "driver", "here"  # the driver's token and the driver's answer
TOKEN_BYTES = 1 << 16  # size of such a file; a full quota may still accept a few bytes
VISIBLE = 2.0  # seconds until a network disk shows a file of another machine
SAMPLE, ENDS = 200, 1 << 16  # files of an input to read; bytes to read at both ends of a file

Facts = dict[str, Any]
Input = tuple[str, str]  # role (dataset, backbone, generator) and name


@dataclass(frozen=True)
class NodeRequirements:
    """What a sweep requires of each node."""

    inputs: tuple[Input, ...] = ()
    data_root: Path | None = None
    uses_gpus: bool = False
    # Fields of `GpuNeeds`: a node without airsweep could not read the class.
    gpu: tuple[tuple[str, ...], float, str, int] = ((), 0.0, "", 0)
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
        "code": {**_versions(), **_code_digests()},
        "store": _store_problem(store, token, node),
        "files": [_input_facts(role, name, needs) for role, name in needs.inputs],
        "gpu": _gpu_problem(needs.gpu) if use_gpu else "",
    }


def _versions() -> dict[str, str]:
    """Major and minor versions, on which results depend; patches and builds do not count."""
    found = {"python": python_version()}
    for library in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[library] = version(library)
    return {name: ".".join(each.split(".")[:2]) for name, each in found.items()}


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


def _store_problem(store: str, token: str, node: str) -> str:
    """Read the driver's token in the store and write the same token as this node's answer."""
    try:
        if has_token(store, token, DRIVER):
            write_token(store, token, node)
            return ""
        exists = "://" in store or os.path.isdir(store)
        return "is not the store that the driver uses" if exists else "does not exist"
    except OSError as problem:
        return f"cannot be used ({problem.strerror or problem})"
    except Exception as problem:  # the airsweep of this node may differ from the driver's
        return f"cannot be used ({problem})"


def has_token(store: str, token: str, name: str) -> bool:
    """Whether a file in the store contains the token; waits VISIBLE seconds for the file."""
    deadline, (storage, path) = time.monotonic() + VISIBLE, _token_file(store, token, name)
    while (content := storage.get(path)) is None:
        if time.monotonic() > deadline:
            return False
        time.sleep(VISIBLE / 8)
    return bool(content.startswith(token.encode()))


def write_token(store: str, token: str, name: str) -> None:
    """Write the token into a file in the store."""
    storage, path = _token_file(store, token, name)
    storage.put(path, token.ljust(TOKEN_BYTES).encode())


def _token_file(store: str, token: str, name: str) -> tuple[Any, Any]:
    """What has the calls `get`, `put` and `delete`, and the path to give to them."""
    from orchestrator.store.buckets import parse
    from orchestrator.store.storage import Folder

    path = f"{TOKENS}{token}-{name}"
    return (parse(store), path) if "://" in store else (Folder(Path(store)), Path(store, path))


def _input_facts(role: str, name: str, needs: NodeRequirements) -> tuple[int, str] | str:
    """Number of files of an input and a digest of samples, since reading all would take too long;
    or why it cannot be used."""
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
        return len(files), _sample_digest(sorted(files))
    except Exception as problem:  # the airsweep of this node may differ from the driver's
        return str(problem)


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


def _gpu_problem(needs: tuple[tuple[str, ...], float, str, int]) -> str:
    """Why the sweep cannot use the GPUs; empty if it can, or if their memory is in use."""
    try:
        import torch

        if torch.cuda.is_available():
            with suppress(torch.cuda.OutOfMemoryError):
                torch.ones(8, device="cuda").sum().item()
            from orchestrator.planning.checks import GpuNeeds, unfit_gpu
            from orchestrator.planning.resources import smallest_gpu

            return unfit_gpu(GpuNeeds(*needs), smallest_gpu()) or ""
        reason = f"torch {torch.__version__} sees none"
    except Exception as problem:
        reason = f"{type(problem).__name__}: {problem}".partition("\n")[0]
    return f"Ray counts a GPU, but {reason}: fix what `nvidia-smi` or torch reports there"


# ---------------------------------------------------------------- the driver's token


@contextmanager
def store_token(store: ArtifactStore, nodes: Iterable[str]) -> Iterator[str]:
    """Keep a random token in the store while the block runs.

    If a node can read the token and the driver can read the node's answer, both use the same store.
    Equal paths are not enough: they may be separate folders on two machines.

    Args:
        nodes: names of the nodes that may answer.

    Raises:
        OSError: the store is not writable, or the bucket does not answer.
    """
    token, folder = uuid.uuid4().hex, (store.root / TOKENS).parent
    new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        write_token(store.name, token, DRIVER)
        yield token
    finally:
        for name in (DRIVER, DRIVER_ANSWER, *nodes):
            storage, path = _token_file(store.name, token, name)
            storage.delete(path)
        with suppress(OSError):  # not empty: another driver uses the store now
            for new in new_folders:
                new.rmdir()

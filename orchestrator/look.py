"""What one machine of a cluster sees, as plain data: versions, code, store, files, GPUs.

This module travels to each machine as it is, and what it sees there is what airsweep would see: so
on top it has only the standard library, and imports of airsweep those of that machine. It judges
nothing (`findings.py`), and loads torch only to look at a GPU.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
import shutil
import socket
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any

LIBRARIES = (
    *("ray", "torch", "open_clip_torch", "diffusers", "peft", "transformers"),
    *("numpy", "safetensors"),
)
PACKAGES = ("air_core", "orchestrator")
PROBES = "probes"  # folder of the store, there while machines are looked at
DRIVER = "driver"  # the file that the driver writes there
WRITTEN = 1 << 16  # bytes of each such file: a disk with a quota takes the first few
SOON = 2.0  # seconds in which a file of another machine shows on a network disk
SAMPLE, ENDS = 200, 1 << 16  # files of a dataset that are opened; bytes at both ends of each
FULL = (errno.ENOSPC, errno.EDQUOT)


def look(store: str, word: str, files: Sequence[tuple[str, str]], root: str, name: str) -> Any:
    """All that a machine is asked without a GPU.

    Args:
        store: a folder or the URI of a bucket, as given with --store.
        word: what the driver has written there.
        files: role (dataset, backbone, generator) and name of what a sweep reads.
        root: folder of real datasets; empty: none.
        name: the file that this machine is to write into the store.
    """
    return {
        "host": socket.gethostname(),
        "versions": {"python": python_version(), **_versions()},
        "code": code(),
        "store": in_bucket(store, word, name) if "://" in store else _folder(store, word, name),
        "files": [_files(role, what, root) for role, what in files],
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    return found


def code() -> dict[str, str]:
    """Digests of airsweep's own modules; empty where it is not installed."""
    found = {}
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            home = Path(spec.origin).parent
            for file in home.rglob("*.py"):
                digest = hashlib.blake2b(file.read_bytes(), digest_size=6).hexdigest()
                found[f"{package}/{file.relative_to(home).as_posix()}"] = digest
    return found


# ---------------------------------------------------------------- the store


def _folder(store: str, word: str, name: str) -> dict[str, Any]:
    """Is it the folder that the driver writes to, and can this machine write there?"""
    root = Path(store)
    place = root / PROBES / word
    state = _read(place / DRIVER, word, root)
    if state == "ok":
        state = written(place / name, word)
    return {"state": state, **room(root)}


def _read(file: Path, word: str, root: Path) -> str:
    give_up = time.monotonic() + SOON
    while True:
        try:
            return "ok" if file.read_text().startswith(word) else "other"
        except FileNotFoundError:
            if time.monotonic() > give_up:
                return "other" if root.is_dir() else "absent"
            time.sleep(SOON / 8)
        except OSError as problem:
            return f"unreadable: {problem.strerror}"


def written(file: Path, word: str) -> str:
    """Write a file; how that went."""
    try:
        with open(file, "w", encoding="utf-8") as handle:
            handle.write(word.ljust(WRITTEN))
            handle.flush()
            os.fsync(handle.fileno())
    except OSError as problem:
        file.unlink(missing_ok=True) if problem.errno in FULL else None
        return "full" if problem.errno in FULL else f"unwritable: {problem.strerror}"
    return "ok"


def in_bucket(store: str, word: str, name: str) -> dict[str, Any]:
    """The same of a bucket, and of the folder in which this machine keeps its copy."""
    try:
        from orchestrator.backends import copy_folder
        from orchestrator.remote import parse

        remote = parse(store)
        found = remote.get(f"{PROBES}/{word}/{DRIVER}")
        state = "ok" if found is not None and found.decode().startswith(word) else "other"
        if state == "ok":
            remote.put(f"{PROBES}/{word}/{name}", word.ljust(WRITTEN).encode())
    except Exception as problem:  # of whatever airsweep is here
        return {"state": f"away: {problem}", "free": None}
    return {"state": state, **room(copy_folder(remote))}


def room(folder: Path) -> dict[str, Any]:
    """Bytes that are free where a folder lies, or will lie."""
    there = next((one for one in (folder, *folder.parents) if one.exists()), None)
    try:
        return {"where": str(folder), "free": shutil.disk_usage(there or "/").free}
    except OSError:
        return {"where": str(folder), "free": None}


# ---------------------------------------------------------------- files


def _files(role: str, name: str, root: str) -> dict[str, Any]:
    """Where what a sweep reads lies here, and a print of it that takes no reading of gigabytes."""
    found: dict[str, Any] = {"role": role, "name": name}
    try:
        if role == "dataset":
            from air_core.datasets import get_dataset

            files = get_dataset(name).files(Path(root) if root else None)
        else:
            from orchestrator.resolve import read_from

            _, files = read_from(role, name)
        return {**found, "count": len(files), "print": _print(sorted(files))}
    except Exception as problem:  # of whatever airsweep is here
        return {**found, "problem": str(problem)}


def _print(files: Sequence[Path]) -> str:
    """Of names, sizes and both ends: weights of one shape have equal sizes, and other ends."""
    step = -(-len(files) // SAMPLE) or 1
    common = os.path.commonpath([file.parent for file in files])
    seen = hashlib.blake2b(digest_size=8)
    for file in files[::step]:
        size = file.stat().st_size
        seen.update(f"{file.relative_to(common)} {size}\n".encode())
        with open(file, "rb") as handle:
            seen.update(handle.read(ENDS))
            handle.seek(max(ENDS, size - ENDS))
            seen.update(handle.read(ENDS))
    return seen.hexdigest()


# ---------------------------------------------------------------- GPUs


def look_at_gpu() -> dict[str, Any]:
    """In a process that was given a GPU: does torch see and use it?"""
    try:
        import torch

        if not torch.cuda.is_available():
            return {"problem": f"torch {torch.__version__} sees none"}
        torch.ones(8, device="cuda").sum().item()
        return {"problem": "", "name": torch.cuda.get_device_name(0)}
    except Exception as problem:
        return {"problem": f"{type(problem).__name__}: {problem}".partition("\n")[0]}

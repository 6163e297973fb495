"""A word that the driver writes into the store, to be read and written by every machine.

By it a store is told from another one of the same name. Nothing of it is left behind; what a killed
driver left goes with the next.
"""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from orchestrator.backends import BucketBackend
from orchestrator.look import DRIVER, PROBES, SOON
from orchestrator.remote import Remote
from orchestrator.store import ArtifactStore

STALE = 3600.0  # seconds after which it belongs to nobody

Echoed = Callable[[str], bool]  # has the machine that writes this file written the word?


@contextmanager
def word_in(store: ArtifactStore) -> Iterator[tuple[str, Echoed]]:
    """The word, which is there for as long as the block lasts.

    Raises:
        OSError: it cannot be written, or a bucket is away.
    """
    word = uuid.uuid4().hex
    with (
        _in_bucket(store.backend.remote, word)
        if isinstance(store.backend, BucketBackend)
        else _in_folder(store.root, word)
    ) as echoed:
        yield word, echoed


@contextmanager
def _in_folder(root: Path, word: str) -> Iterator[Echoed]:
    folder = root / PROBES / word
    made = [one for one in (root, *root.parents) if not one.exists()]
    try:
        for left in (root / PROBES).glob("*"):
            with suppress(OSError):  # its own driver has removed it
                if time.time() - left.stat().st_mtime > STALE:
                    shutil.rmtree(left, ignore_errors=True)
        _make(folder)
        (folder / DRIVER).write_text(word)
        yield lambda name: _comes(folder / name, word)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # somebody else is at it
            for place in (folder.parent, *made):
                place.rmdir()


def _make(folder: Path) -> None:
    """Drivers that end remove the folder above, where they find it empty."""
    for _ in range(100):
        with suppress(FileNotFoundError):
            folder.mkdir(parents=True)
            return
    folder.mkdir(parents=True)


@contextmanager
def _in_bucket(remote: Remote, word: str) -> Iterator[Echoed]:
    place = f"{PROBES}/{word}"
    for old in list(remote.listed(PROBES)):
        if time.time() - old.changed > STALE:
            remote.delete(f"{PROBES}/{old.name}")
    remote.put(f"{place}/{DRIVER}", word.encode())
    try:
        yield lambda name: _same(remote.get(f"{place}/{name}"), word)
    finally:
        for one in list(remote.listed(place)):
            remote.delete(f"{place}/{one.name}")


def _same(found: bytes | None, word: str) -> bool:
    return found is not None and found.decode().startswith(word)


def _comes(file: Path, word: str) -> bool:
    """A file that another machine has written is there, or will be soon."""
    give_up = time.monotonic() + SOON
    while True:
        with suppress(OSError):
            return _same(file.read_bytes(), word)
        if time.monotonic() > give_up:
            return False
        time.sleep(SOON / 8)
